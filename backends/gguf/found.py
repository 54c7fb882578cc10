"""What the checks of a carrier find: refusals as text, and rewrites that change nothing."""

from __future__ import annotations

from collections.abc import Iterator

from backends.carriers import Fold
from backends.gguf.carriers import Carrier, Need

Found = Iterator[str | Fold]


def needs(path: str, has: bool, shown: object, need: Need, neutral: str, c: Carrier) -> Found:
    """The three cases of a part that a graph lacks, may have, or always has."""
    if has and need == "no":
        yield f"{path}: {shown}, which llama.cpp's {c.arch} lacks"
    if not has and need == "required":
        if neutral:
            yield Fold(neutral, cost=0)
        else:
            yield f"{path}: none, and llama.cpp's {c.arch} requires it"
