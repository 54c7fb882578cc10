"""Tokens on disk: shards of one stream, memory-mapped one at a time, with the places of its documents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=128)
def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    """A shard. Few are open at a time, however many there are: each holds a file descriptor."""
    return np.memmap(path, dtype, mode="r")


@dataclass(frozen=True)
class Shards:
    """Arrays in files, one behind the other, read by slices; what is sent to another process is their paths alone.

    `bits` says that a file holds eight booleans a byte (the first one lowest), and counts count booleans.
    """

    paths: tuple[Path, ...]
    ends: tuple[int, ...]
    """Items up to the end of each shard."""
    kind: str
    """dtype of the items as NumPy writes it, or `bits`."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what a slice returns."""
        return np.dtype(np.bool_ if self.kind == "bits" else self.kind)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, span: slice) -> NDArray[Any]:
        """Items `start` to `stop`, clipped as for a list; a copy where they lie in several shards."""
        start, stop, step = span.indices(len(self))
        assert step == 1, "spans only"
        pieces: list[NDArray[Any]] = []
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            first = self.ends[shard - 1] if shard else 0
            last = min(stop, self.ends[shard])
            pieces.append(self._read(shard, start - first, last - first))
            start, shard = last, shard + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def _read(self, shard: int, start: int, stop: int) -> NDArray[Any]:
        if self.kind != "bits":
            return _mapped(self.paths[shard], self.kind)[start:stop]
        packed = _mapped(self.paths[shard], "u1")[start // 8 : -(-stop // 8)]
        return np.unpackbits(packed, bitorder="little")[start % 8 :][: stop - start].view(np.bool_)


@dataclass(frozen=True)
class Split:
    """One source's stream of tokens, to train on or held out: documents one behind the other.

    Document d is `tokens[offsets[d] : offsets[d + 1] + overlap]`, from its beginning to its end. Where documents end:
    ask `offsets`, not for an end's id: a chat's end is what its template writes.
    """

    tokens: Shards | NDArray[Any]
    """uint16, or uint32 for large vocabularies."""
    offsets: NDArray[np.int64]
    """[documents + 1], ascending from 0."""
    bytes: int
    """Bytes of text that the tokens stand for."""
    overlap: int = 0
    """1 where the end of a document is also the beginning of the next one (one token is both), else 0."""
    mask: Shards | NDArray[np.bool_] | None = None
    """Per token, whether it counts where it is a target; none = all do."""
    name: str = ""
    """The source, for people."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class TokenData:
    """All sources as tokens: one split a source to train on, those that are held out, and the fingerprint of it all."""

    train: tuple[Split, ...]
    validation: tuple[Split, ...]
    """Of the sources that hold something out, or of `data.validation_source` alone; may be empty."""
    weights: tuple[float, ...]
    """Of `train`, in the same order, not negative; they need not sum to 1."""
    eos: int
    bos: int | None
    fingerprint: str
    """Of everything that changes tokens or their order in the splits: content, tokenizer, options. Not of weights."""
    left_out: tuple[str, ...] = ()
    """Lines for people: which documents of the sources are not here."""
