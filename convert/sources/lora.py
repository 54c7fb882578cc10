"""LoRA's sums, while rows are read.

    W'  = W + s B A                      s = alpha / r, or alpha / sqrt(r) with use_rslora
    W'' = m (W + s B A) / |W + s B A|    DoRA: norms of the rows of an [out, in] matrix

The sums are taken in float64, in one order whatever the blocks, and rounded to float32 once. The adapter's tensors stay
in its file; a block reads the rows of B that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.sources.store import Entry, Store

BUFFER = 1 << 15
"""Elements of a piece that is worked on at a time: its float64 sums stay in the cache."""


@dataclass
class Change:
    """What an adapter does to one external tensor. The names are its own tensors'."""

    replaced: str | None = None
    left: str | None = None
    """lora_B [out, r], of an embedding lora_embedding_B [D, r]."""
    right: str | None = None
    """lora_A [r, in], of an embedding lora_embedding_A [r, V]."""
    bias: str | None = None
    """lora_B's own bias, which is scaled with the product."""
    magnitude: str | None = None
    scale: float = 1.0
    transposed: bool = False
    """Whether rows of the tensor are columns of B A."""


class Adapted:
    """A store with an adapter merged into its rows."""

    def __init__(self, store: Store, adapter: Store, changes: Mapping[str, Change]) -> None:
        self._store, self._adapter, self._changes = store, adapter, changes
        self._norms: dict[str, NDArray[np.float64]] = {}
        self.entries: dict[str, Entry] = dict(store.entries)
        for name, change in changes.items():
            if change.replaced is not None:
                e = adapter.entries[change.replaced]
                self.entries[name] = Entry(e.dtype, e.shape, e.readable)

    @property
    def nbytes(self) -> int:
        return self._store.nbytes + self._adapter.nbytes

    def fetch(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        change = self._changes.get(name)
        if change is None:
            return self._store.fetch(name, start, stop)
        base = self._base(name, change, start, stop)
        if change.bias is not None:
            return (base + change.scale * self._adapter.fetch(change.bias, start, stop).astype(np.float64)).astype(
                "<f4"
            )
        if change.left is None:
            return base
        out = np.empty_like(base)
        for a, b, piece in self._merged(change, base, start):
            if change.magnitude is not None:
                piece *= self._factors(name, change, start + a, start + b, piece)
            out[a:b] = piece
        return out

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._store.raw(name, start, stop)

    def close(self) -> None:
        self._adapter.close()
        self._store.close()

    def _base(self, name: str, change: Change, start: int, stop: int) -> NDArray[np.float32]:
        if change.replaced is not None:
            return self._adapter.fetch(change.replaced, start, stop)
        return self._store.fetch(name, start, stop)

    def _merged(
        self, c: Change, base: NDArray[np.float32], start: int
    ) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
        """Pieces (first row, end, rows of W + s B A) of a block whose first row is `start`. Every element is summed
        over the rank in order, so that neither blocks nor libraries change it."""
        assert c.left is not None and c.right is not None, "a product"
        rows, cols = base.shape
        have = self._adapter.entries
        if c.transposed:
            left = self._adapter.fetch(c.right, 0, have[c.right].shape[0])[:, start : start + rows].T
            right = self._adapter.fetch(c.left, 0, have[c.left].shape[0]).T
        else:
            left = self._adapter.fetch(c.left, start, start + rows)
            right = self._adapter.fetch(c.right, 0, have[c.right].shape[0])
        left, right = left.astype(np.float64), np.ascontiguousarray(right, np.float64)
        step = max(1, BUFFER // cols)
        product = np.empty((min(step, rows), cols))
        for a in range(0, rows, step):
            b = min(rows, a + step)
            total, term = np.zeros((b - a, cols)), product[: b - a]
            for k in range(right.shape[0]):
                np.multiply(left[a:b, k, None], right[k], out=term)
                total += term
            total *= c.scale
            total += base[a:b]
            yield a, b, total

    def _factors(self, name: str, c: Change, start: int, stop: int, merged: NDArray[np.float64]) -> NDArray[np.float64]:
        """DoRA's magnitude / norm for rows start..stop, to multiply them with."""
        assert c.magnitude is not None
        if not c.transposed:
            m = self._adapter.fetch(c.magnitude, start, stop).reshape(-1, 1).astype(np.float64)
            return m / np.sqrt(np.square(merged).sum(axis=1, keepdims=True))
        if name not in self._norms:
            rows, cols = self.entries[name].shape
            squares, step = np.zeros(cols), max(1, (1 << 20) // cols)
            for start in range(0, rows, step):
                base = self._base(name, c, start, min(rows, start + step))
                for _, _, piece in self._merged(c, base, start):
                    for row in piece:
                        squares += row * row
            self._norms[name] = np.sqrt(squares)
        m = self._adapter.fetch(c.magnitude, 0, self._adapter.entries[c.magnitude].shape[0]).reshape(-1)
        return m.astype(np.float64) / self._norms[name]


class Copied:
    """A store that has one tensor under a second name too."""

    def __init__(self, store: Store, name: str, second: str) -> None:
        self._store, self._name, self._second = store, name, second
        self.entries: dict[str, Entry] = dict(store.entries)
        if name in self.entries:
            self.entries[second] = self.entries[name]

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    def _at(self, name: str) -> str:
        return self._name if name == self._second else name

    def fetch(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        return self._store.fetch(self._at(name), start, stop)

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._store.raw(self._at(name), start, stop)

    def close(self) -> None:
        self._store.close()
