"""One source's documents as rows of equal length: cut into pieces, shuffled, packed.

A piece is what the shuffle moves: `length` tokens of the stream, or a document (a longer one is cut into pieces of
`length`). Rows are made of a window of shuffled pieces at a time, so that a row can be found again from a few numbers,
and memory does not grow with the corpus.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.data.shuffle import permuted
from train.data.store import Split

Ids = NDArray[np.int64]

Row = tuple[tuple[int, int], ...]
"""The pieces of a row: first token in the stream, and inputs. The last input's target is the token behind it."""

IGNORE = -100
"""Targets that count nowhere."""

WINDOW = 4096
"""Pieces that are packed together. Part of the order: another number is another order."""

BLOCK, CHUNK = 128, 2**20
"""Documents that share one count of pieces (half a bit a document stays in memory), and that are counted at once."""


@dataclass(frozen=True)
class Rows:
    """Sequences for one forward pass, [B, T] each; `segments` only where several documents share a row unseen by each
    other."""

    ids: Ids
    targets: Ids
    segments: Ids | None

    @property
    def valid(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())

    def pinned(self) -> Rows:
        """The same in page-locked memory, from which a GPU copies while it computes."""
        ids, targets, segments = (
            None if a is None else torch.from_numpy(a).pin_memory().numpy()
            for a in (self.ids, self.targets, self.segments)
        )
        assert ids is not None and targets is not None
        return Rows(ids, targets, segments)

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
    """A split as rows of `length` tokens, in one of three ways.

    `stream`: the whole stream, cut at every `length` tokens; what is left at its end is not seen. With `document_mask`,
    documents in a row are hidden from each other. `documents`: whole documents, as many in a row as fit, always hidden
    from each other. `pad`: one document a row. The last two have every token of every document once an epoch.
    """

    split: Split
    length: int
    eos: int
    """Fills what is left of a row."""
    packing: str = "stream"
    document_mask: bool = False

    @property
    def masked(self) -> bool:
        """Whether rows have segments. Padding needs none: it lies behind the document, which never looks ahead."""
        return self.packing == "documents" or (self.packing == "stream" and self.document_mask)

    @cached_property
    def pieces(self) -> int:
        """What the shuffle moves. A stream shorter than a row is one padded piece."""
        if self.packing == "stream":
            tokens = len(self.split.tokens) - 1
            return max(tokens // self.length, int(tokens > 0))
        return int(self._before[-1])

    @property
    def inputs(self) -> int:
        """Tokens that an epoch reads, without padding (lone tokens aside)."""
        if self.packing == "stream":
            return min(self.pieces * self.length, len(self.split.tokens) - 1)
        return len(self.split.tokens) - self.split.overlap + self.split.documents * (self.split.overlap - 1)

    @cached_property
    def count(self) -> float:
        """Rows of an epoch; with `documents`, if all of them are as full as those of the first window."""
        if self.packing != "documents":
            return self.pieces
        rows = self.window(0, 0)
        return len(rows) * self.inputs / sum(size for row in rows for _, size in row)

    @property
    def longer(self) -> int:
        """Documents with more inputs than a row has."""
        offsets, beside = self.split.offsets, self.split.overlap - 1
        starts = range(0, self.split.documents, CHUNK)
        return sum(int((np.diff(offsets[n : n + CHUNK + 1]) + beside > self.length).sum()) for n in starts)

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.pieces // WINDOW)

    def window(self, number: int, *seed: int | str) -> list[Row]:
        """The rows of one window of the shuffle that `seed` names."""
        places = np.arange(number * WINDOW, min((number + 1) * WINDOW, self.pieces))
        rows = self.pack(permuted(places, self.pieces, *seed))
        if self.packing != "documents":
            return rows
        # the packer leaves short documents to the last rows
        return [rows[i] for i in permuted(np.arange(len(rows)), len(rows), *seed, "rows", number)]

    def pack(self, numbers: NDArray[np.int64]) -> list[Row]:
        """Rows that hold the pieces of these numbers."""
        starts, sizes = (a.tolist() for a in self.cut(numbers))
        if self.packing == "documents":
            return [tuple((starts[i], sizes[i]) for i in row) for row in best_fit(sizes, self.length)]
        return [((start, size),) for start, size in zip(starts, sizes, strict=True)]

    def cut(self, numbers: NDArray[np.int64]) -> tuple[Ids, Ids]:
        """First tokens and inputs of the pieces of these numbers."""
        if self.packing == "stream":
            starts = numbers * self.length
            return starts, np.minimum(self.length, len(self.split.tokens) - 1 - starts)
        block = np.searchsorted(self._before, numbers, side="right") - 1
        places = block[:, None] * BLOCK + np.arange(BLOCK + 1)
        offsets = np.asarray(self.split.offsets)[np.minimum(places, self.split.documents)]
        ends = self._count(offsets).cumsum(1)
        within = numbers - self._before[block]
        document = (ends <= within[:, None]).sum(1)
        each = np.arange(len(numbers))
        nth = within - np.where(document > 0, ends[each, document - 1], 0)
        begin, end = offsets[each, document], offsets[each, document + 1] + self.split.overlap
        starts = begin + nth * self.length
        return starts, np.minimum(self.length, end - 1 - starts)

    @cached_property
    def _before(self) -> Ids:
        """Pieces before every BLOCK-th document, and those of all."""
        counts = [np.zeros(1, np.int64)]
        for start in range(0, self.split.documents, CHUNK):
            pieces = self._count(np.asarray(self.split.offsets[start : start + CHUNK + 1]))
            counts.append(np.add.reduceat(pieces, np.arange(0, len(pieces), BLOCK)))
        return np.concatenate(counts).cumsum()

    def _count(self, offsets: Ids) -> Ids:
        """Pieces of the documents between these offsets, along the last axis. A lone token predicts nothing."""
        inputs = np.diff(offsets) + (self.split.overlap - 1)
        return -(-np.maximum(inputs, 0) // self.length)

    def fill(self, row: Row, ids: Ids, targets: Ids, segments: Ids | None) -> None:
        """Write a row into [T] arrays that hold `eos`, `IGNORE` and 0."""
        column = 0
        for number, (start, size) in enumerate(row):
            here = slice(column, column + size)
            tokens = np.asarray(self.split.tokens[start : start + size + 1])
            ids[here], targets[here] = tokens[:-1], tokens[1:]
            if self.split.mask is not None:
                counts = np.asarray(self.split.mask[start + 1 : start + size + 1])
                targets[here][~counts] = IGNORE
            if segments is not None and self.packing == "stream":
                self._divide(start, targets[here], segments[here])
            elif segments is not None:
                segments[here] = number
            column += size
        if segments is not None and column < self.length:
            segments[column:] = segments[column - 1] + 1 if column else 0

    def _divide(self, start: int, targets: Ids, segments: Ids) -> None:
        """Number the documents in a piece of the stream; none predicts the next one's beginning, unless that is its own
        end as well."""
        offsets = np.asarray(self.split.offsets)
        first, last = np.searchsorted(offsets, (start, start + len(targets)), side="right")
        begins = offsets[first:last] - start
        segments[:] = np.bincount(begins, minlength=len(targets) + 1)[:-1].cumsum()
        if not self.split.overlap:
            targets[begins - 1] = IGNORE


def gathered(chosen: Sequence[tuple[Sequences, Row]]) -> Rows:
    """Rows of one or several sources as one forward pass; an empty row is padding alone."""
    assert chosen, "at least one row"
    first = chosen[0][0]
    shape = len(chosen), first.length
    ids, targets = np.full(shape, first.eos, np.int64), np.full(shape, IGNORE, np.int64)
    segments = np.zeros(shape, np.int64) if first.masked else None
    for n, (sequences, row) in enumerate(chosen):
        sequences.fill(row, ids[n], targets[n], None if segments is None else segments[n])
    return Rows(ids, targets, segments)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in bins of `capacity`, by best fit decreasing: the largest first, each into the fullest bin
    that has room for it (Johnson et al. 1974; at most 11/9 of the fewest possible bins, and 4)."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, bin), ascending
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(room, (sizes[i], 0))
        if at < len(room):
            free, chosen = room.pop(at)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(i)
        if free > sizes[i]:
            insort(room, (free - sizes[i], chosen))
    return bins
