"""Long documents, encoded in pieces: the same tokens, without a whole document's tokens in the tokenizer's memory.

Text is cut between a letter and a space with a letter behind it, where the pre-tokenizers of byte-level tokenizers cut
too. A tokenizer that treats the beginning of a text apart (a space is put before it) is asked whether it means the
same without that space. Where a piece has no such place it is cut between characters, and there tokens may differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from train.data.tokenizer import TextTokenizer

PIECE = 2**18
"""Characters of a piece."""
LOOKED = 2**14
"""Characters before a piece's end in which a place is looked for."""
SAFE = re.compile(r"[^\W\d_](?= [^\W\d_])")
"""A letter before a space and a letter."""


def encode(tok: TextTokenizer, texts: Sequence[str]) -> Iterator[NDArray[np.int64]]:
    """Ids of each text, without special tokens."""
    skip = None
    if any(len(t) > 2 * PIECE for t in texts):
        skip = _skipped(tok)
    short = [t for t in texts if skip is None or len(t) <= 2 * PIECE]
    ids = iter(tok.encode(short))
    for t in texts:
        if skip is None or len(t) <= 2 * PIECE:
            yield np.array(next(ids), np.int64)
        else:
            pieces = [np.array(tok.encode([p])[0], np.int64) for p in _cut(t, skip)]
            yield np.concatenate(pieces)


def _skipped(tok: TextTokenizer) -> int | None:
    """Spaces that a piece leaves out at its beginning, since the tokenizer puts one there; none = it can't be cut."""
    whole, first, kept, left = tok.encode(["before after", "before", " after", "after"])
    return 0 if whole == first + kept else 1 if whole == first + left else None


def _cut(text: str, skip: int) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * PIECE:
        end = start + PIECE
        places = [m.end() for m in SAFE.finditer(text, end - LOOKED, end)]
        stop = places[-1] if places else end
        yield text[start:stop]
        start = stop + (skip if places else 0)
    yield text[start:]
