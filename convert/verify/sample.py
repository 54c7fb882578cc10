"""What a verification feeds the model: a text, and as many of its tokens as the model's size lets one afford."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spec.config import Spec
from spec.errors import UserError
from spec.load import read_file
from spec.params import params

if TYPE_CHECKING:
    from backends.base import Tokenizer

_FLOPS = 2e11
"""Multiply-adds that one pass of the oracle may take: about ten seconds of float64 on two cores."""
_MODULES = ("textwrap", "statistics", "heapq", "json.decoder", "argparse", "email.message", "asyncio.queues", "decimal")


def corpus() -> str:
    """Prose and code that every machine has: a few modules of the standard library."""
    parts: list[str] = []
    for name in _MODULES:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None and Path(found.origin).suffix == ".py":
            parts.append(Path(found.origin).read_text(encoding="utf-8"))
    return "\n".join(parts)


def read_text(source: str | Path | None) -> str:
    """The text of a file; none or `stdlib` stands for `corpus`. Raises `UserError`."""
    if source is None or str(source) == "stdlib":
        return corpus()
    text = read_file(source)
    if not text.strip():
        raise UserError(f"{source}: holds no text")
    return text


def affordable(spec: Spec) -> int:
    """Tokens for the numeric checks: 16 to 256, by the model's size, within its context."""
    weights = sum(p.size for p in params(spec) if p.matrix)
    return max(2, min(spec.context - 1, 256, max(16, int(_FLOPS / (2 * weights)))))


class Library:
    """The `tokenizers` library's object. It panics, with what is no `Exception`, where a regular expression takes too
    many steps: that is a `UserError` here."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer as Fast

        self._fast: Any = Fast.from_str(json.dumps(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        """The library's encoding of a text. Raises `UserError` where it breaks on it."""
        try:
            return self._fast.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as e:
            if isinstance(e, (KeyboardInterrupt, SystemExit)):
                raise
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"the source's tokenizer: `tokenizers` breaks on {text[:40]!r}: {reason}") from None


def open_tokenizer(tokenizer: Tokenizer) -> Library:
    """The `tokenizers` library's object."""
    return Library(tokenizer.json)


def token_ids(spec: Spec, tokenizer: Tokenizer | None, text: str | None, count: int) -> NDArray[np.int64]:
    """[1, count] ids: the text's first tokens, or random ones without a tokenizer (seeded: every run alike)."""
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, spec.vocab_size, (1, count))
    lead = text if text is not None else corpus()
    ids: list[int] = open_tokenizer(tokenizer).encode(lead[: 16 * count], add_special_tokens=False).ids
    ids = [i for i in ids if i < spec.vocab_size][:count]
    if len(ids) < 2:
        raise UserError("the verification text has fewer than two tokens (give a longer one)")
    return np.asarray([ids], dtype=np.int64)
