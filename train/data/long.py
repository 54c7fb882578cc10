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


def encode(tok: TextTokenizer, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
    """Ids of each text, without special tokens."""
    whole = [len(t) <= 2 * PIECE or tok.seam is None for t in texts]
    ids = iter(tok.arrays([t for t, w in zip(texts, whole, strict=True) if w]))
    for t, w in zip(texts, whole, strict=True):
        if w:
            yield next(ids)
        else:
            yield np.concatenate([tok.arrays([p])[0] for p in _cut(t, tok.seam or 0)])


def _cut(text: str, skip: int) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * PIECE:
        end = start + PIECE
        places = [m.end() for m in SAFE.finditer(text, end - LOOKED, end)]
        stop = places[-1] if places else end
        yield text[start:stop]
        start = stop + (skip if places else 0)
    yield text[start:]
