"""Global batches in one deterministic order, from one source or several, resumable at any of them.

The order depends on the seed, the data and how it is packed; not on ranks, accumulation, prefetching or how many
sequences a batch has. Shapes: A accumulation steps, B sequences of one forward pass, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from spec.errors import UserError
from train.data.ahead import Ahead
from train.data.packing import IGNORE, Row, Rows, Sequences, gathered


@dataclass(frozen=True)
class Place:
    """Where one source stands: at row `row` of window `window` of pass `epoch`; what it gave so far."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    sequences: int = 0
    tokens: int = 0
    """Inputs, without padding."""


@dataclass(frozen=True)
class DataState:
    """Where the data stands, as JSON holds it; the same on every rank, whatever their number."""

    fingerprint: Mapping[str, Any]
    """What the order depends on, by the names that people know it by."""
    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    """Targets that counted."""
    seed: int = 0
    sources: tuple[Place, ...] = ()
    """None = all at their beginning."""

    @property
    def epoch(self) -> int:
        """Passes that every source has made."""
        return min(p.epoch for p in self.sources)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def of(saved: Mapping[str, Any]) -> DataState:
        """`as_dict`, read again. Raises `KeyError` or `TypeError` for anything else."""
        return DataState(**{**saved, "sources": tuple(Place(**p) for p in saved["sources"])})


class Source:
    """The rows of one source, epoch after epoch, each in the order that `seed` and the epoch name."""

    def __init__(self, sequences: Sequences, *seed: int) -> None:
        self.sequences = sequences
        self._window = lru_cache(maxsize=2)(lambda epoch, number: sequences.window(number, *seed, epoch))

    def next(self, at: Place) -> tuple[Row, Place]:
        """The row there, and the place behind it."""
        rows = self._window(at.epoch, at.window)
        row = rows[at.row]
        epoch, window, n = at.epoch, at.window, at.row + 1
        if n == len(rows):
            window, n = window + 1, 0
        if window == self.sequences.windows:
            epoch, window = epoch + 1, 0
        return row, Place(epoch, window, n, at.sequences + 1, at.tokens + sum(size for _, size in row))


def due(places: Sequence[Place], weights: Sequence[float], length: int) -> int:
    """The source of the next row: the one that lacks most tokens of its share.

    `weights` sum to 1. A source is then never a row's tokens ahead of its share of all tokens, nor as many rows behind
    it as there are others: shares are exact in the long run, and no chance is involved.
    """
    total = sum(p.tokens for p in places) + length
    lacking = [w * total - p.tokens for w, p in zip(weights, places, strict=True)]
    return lacking.index(max(lacking))


@dataclass(frozen=True)
class _Made:
    mine: list[Rows]
    valid: int
    """Targets that count: of this share, or of all where nobody adds the shares up."""


class Batches:
    """Global batches from sources with weights.

    `count` adds a number up over the shares of a batch: each rank then reads and counts its own rows only. `prefetch`
    batches are made ahead by a thread, in memory pinned for `device` if that is a CUDA device. `waited` is how many
    seconds the last batch took to arrive.
    """

    def __init__(
        self,
        sequences: Sequence[Sequences],
        state: DataState,
        weights: Sequence[float] = (1.0,),
        count: Callable[[int], int] | None = None,
        prefetch: int = 0,
        device: torch.device | None = None,
    ) -> None:
        assert len(sequences) == len(weights), "a weight for every source"
        for s in sequences:
            if not s.pieces:
                raise UserError(
                    f"data: {s.split.name or 'source'}: nothing to train on (a document has 2 tokens or more)"
                )
        self.weights = tuple(w / sum(weights) for w in weights)
        self.sources = [Source(s, state.seed, n) for n, s in enumerate(sequences)]
        self.state = state if state.sources else replace(state, sources=(Place(),) * len(sequences))
        self.waited = 0.0
        self._count = count
        self._pin = device if device is not None and device.type == "cuda" else None
        self._ahead = Ahead(self._make, prefetch, self._pin)

    @property
    def masked(self) -> bool:
        """Whether documents that share a row are hidden from each other."""
        return self.sources[0].sequences.masked

    def next(self, total: int, micro: int, share: int = 0, shares: int = 1) -> tuple[list[Rows], int]:
        """This share of the next `total` sequences as A forward passes of `micro` rows, and the number of valid targets
        in the whole batch, over all shares. `state` is then that behind this batch, whatever was made ahead."""
        began = time.perf_counter()
        made, places = self._ahead.take(self.state.sources, (total, micro, share, shares))
        self.waited = time.perf_counter() - began
        valid = made.valid if self._count is None else self._count(made.valid)
        s = self.state
        self.state = replace(
            s, batches=s.batches + 1, sequences=s.sequences + total, tokens=s.tokens + valid, sources=places
        )
        return made.mine, valid

    def _make(self, places: tuple[Place, ...], kind: tuple[int, int, int, int]) -> tuple[_Made, tuple[Place, ...]]:
        total, micro, share, shares = kind
        at = list(places)
        length = self.sources[0].sequences.length
        chosen: list[tuple[Sequences, Row]] = []
        for _ in range(total):
            n = due(at, self.weights, length)
            row, at[n] = self.sources[n].next(at[n])
            chosen.append((self.sources[n].sequences, row))
        groups = _grouped(chosen, micro)
        try:
            mine = [gathered(g) for g in groups[share::shares]]
            counted = mine if self._count is not None or shares == 1 else [gathered(g) for g in groups]
        except OSError as e:
            raise UserError(
                f"{e.filename}: {e.strerror} (the run needs its cached tokens until it ends; continue with --resume)"
            ) from None
        valid = sum(r.valid for r in counted)
        if self._pin is not None:
            mine = [r.pinned() for r in mine]
        return _Made(mine, valid), tuple(at)

    def resumed(self, saved: Mapping[str, Any], step: int) -> DataState:
        """The state that a run saved at a step. Raises `UserError` where what the order depends on has changed since,
        and `KeyError` or `TypeError` for what is no state."""
        there, ours = DataState.of(saved), self.state
        then, now = ({**s.fingerprint, "seed": s.seed} for s in (there, ours))
        changed = [_change(name, then.get(name), now.get(name)) for name in {**then, **now}]
        if what := ", ".join(c for c in changed if c):
            raise UserError(
                f"--resume: {what} changed since step {step}; restore it, or start anew with --force or another --out"
            )
        return there

    def close(self) -> None:
        """Stop prefetching."""
        self._ahead.close()


def _grouped(chosen: Sequence[tuple[Sequences, Row]], micro: int) -> list[Sequence[tuple[Sequences, Row]]]:
    return [chosen[start : start + micro] for start in range(0, len(chosen), micro)]


def _change(name: str, then: Any, now: Any) -> str:
    if then == now:
        return ""
    if isinstance(then, str) and isinstance(now, str) and len(then) > 32:  # hashes tell people nothing
        return f"{name} ({then[:12]} -> {now[:12]})"
    return f"{name} ({then} -> {now})"


def validation_rows(
    held_out: Sequence[Sequences], tokens: int, micro: int, share: int = 0, shares: int = 1
) -> Iterator[Rows]:
    """This share of about `tokens` tokens spread evenly over what is held out; equally many passes on every share."""
    chosen: list[tuple[Sequences, Row]] = []
    whole = sum(s.inputs for s in held_out)
    for s in held_out:
        wanted = round(s.pieces * min(1.0, tokens / whole))
        wanted = min(s.pieces, max(1, wanted))
        numbers = np.linspace(0, s.pieces - 1, wanted).round().astype(np.int64)
        chosen += [(s, row) for row in s.pack(numbers)]
    chosen += [(held_out[0], ())] * (-len(chosen) % (micro * shares))
    for group in _grouped(chosen, micro)[share::shares]:
        yield gathered(group)


__all__ = [
    "IGNORE",
    "Batches",
    "DataState",
    "Place",
    "Rows",
    "Sequences",
    "Source",
    "due",
    "validation_rows",
]
