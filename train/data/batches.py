"""The order of tokens: cut into sequences, shuffled globally, resumable at any of them.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.data.order import batched
from train.data.store import Split

Ids = NDArray[np.int64]

IGNORE = -100
"""Targets that count nowhere."""


@dataclass(frozen=True)
class Rows:
    """Sequences for one forward pass, [B, T] each; `segments` only where documents are masked."""

    ids: Ids
    targets: Ids
    segments: Ids | None

    @property
    def valid(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids, targets and segments on a device."""
        ids, targets, segments = (
            None if a is None else torch.from_numpy(a).to(device, non_blocking=True)
            for a in (self.ids, self.targets, self.segments)
        )
        assert ids is not None and targets is not None
        return ids, targets, segments


@dataclass(frozen=True)
class Sequences:
    """A stream cut into sequences of `length` tokens: row i predicts tokens i * length + 1 and on."""

    split: Split
    length: int
    eos: int
    bos: int | None
    document_mask: bool

    @property
    def count(self) -> int:
        """Whole sequences; one padded sequence where the stream is shorter than that."""
        return max(1, (len(self.split.tokens) - 1) // self.length)

    def rows(self, indices: Sequence[int]) -> Rows:
        """The sequences of these numbers; a negative number is a row without targets, to fill a batch."""
        window = np.full((len(indices), self.length + 1), self.eos, np.int64)
        targets = np.full((len(indices), self.length), IGNORE, np.int64)
        for row, i in enumerate(indices):
            if i < 0:
                continue
            tokens = self.split.tokens[i * self.length : (i + 1) * self.length + 1]
            window[row, : len(tokens)] = tokens
            targets[row, : len(tokens) - 1] = tokens[1:]
        segments = self._segments(window) if self.document_mask else None
        if segments is not None:
            # An end that also begins the next document still belongs to the one it ends.
            crossing = (segments[:, 1:] != segments[:, :-1]) & (window[:, 1:] != self.eos)
            targets[crossing] = IGNORE
            segments = segments[:, :-1]
        return Rows(window[:, :-1], targets, segments)

    def _segments(self, window: Ids) -> Ids:
        if self.bos is not None:
            return np.cumsum(window == self.bos, axis=1)
        ends = np.cumsum(window == self.eos, axis=1)
        return np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)


@dataclass
class DataState:
    """Where the data stands. The order depends on the seed and `sequences` alone, not on the number of ranks."""

    fingerprint: str
    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    seed: int = 0
    epoch: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


class Batches:
    """Global batches in a deterministic order: every epoch is one permutation of all sequences."""

    def __init__(self, sequences: Sequences, state: DataState) -> None:
        self.sequences, self.state = sequences, state

    def next(self, total: int, micro: int, rank: int = 0, world: int = 1) -> tuple[list[Rows], int]:
        """This rank's share of the next `total` sequences as A forward passes of `micro` rows, and the number of valid
        targets in the whole batch, over all ranks."""
        count, state = self.sequences.count, self.state
        places = range(state.sequences, state.sequences + total)
        indices = [int(_order(count, state.seed, p // count)[p % count]) for p in places]
        groups = list(batched(indices, micro))
        mine = [self.sequences.rows(g) for g in groups[rank::world]]
        valid = sum(r.valid for r in mine) if world == 1 else sum(self.sequences.rows(g).valid for g in groups)
        state.batches += 1
        state.sequences += total
        state.tokens += valid
        state.epoch = state.sequences // count
        return mine, valid


def validation_rows(sequences: Sequences, tokens: int, micro: int, rank: int = 0, world: int = 1) -> Iterator[Rows]:
    """This rank's share of about `tokens` tokens spread evenly over the stream; equally many passes on every rank."""
    wanted = min(sequences.count, max(1, tokens // sequences.length))
    indices = [int(i) for i in np.linspace(0, sequences.count - 1, wanted).round()]
    indices += [-1] * (-len(indices) % (micro * world))
    for group in list(batched(indices, micro))[rank::world]:
        yield sequences.rows(group)
