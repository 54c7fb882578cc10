"""Weights for the oracle, a few rows at a time, so that a verification never holds a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_KEEP = 1 << 20
"""Elements up to which a tensor is read whole and at once."""


class SourceRows:
    """One tensor of a source as an array-like: `shape`, and rows by slice or by index array.

    Rows are read forward in blocks; asking for slices in ascending order (as the oracle's products do) reads every row
    once. An index array scans.
    """

    def __init__(self, source: Any, name: str) -> None:
        self._source, self._name = source, name
        self.shape: tuple[int, ...] = tuple(source.shape(name))
        self._step = 0
        self._stream: Iterator[tuple[int, Array]] | None = None
        self._next = 0

    def __getitem__(self, rows: Any) -> Array:
        if not isinstance(rows, slice):
            return self._gather(np.asarray(rows))
        start, stop, stride = rows.indices(self.shape[0])
        assert stride == 1, "forward rows only"
        if self._stream is None or start != self._next or stop - start > self._step:
            if start:
                return np.concatenate([part for _, part in self._between(start, stop)])
            self._step = stop - start
            self._stream = self._source.blocks(self._name, self._step)
        assert self._stream is not None
        _, block = next(self._stream)
        self._next = start + len(block)
        if stop != self._next:  # asked for less than a block, or the source cuts finer
            self._stream = None
            return np.concatenate([part for _, part in self._between(start, stop)])
        return block

    def _between(self, start: int, stop: int) -> Iterator[tuple[int, Array]]:
        for at, block in self._source.blocks(self._name, max(1, stop - start)):
            low, high = max(start - at, 0), min(stop - at, len(block))
            if low < high:
                yield at + low, block[low:high]
            if at + len(block) >= stop:
                return

    def _gather(self, index: Array) -> Array:
        out = np.empty((len(index), *self.shape[1:]), dtype=np.float32)
        last = int(index.max()) if len(index) else -1
        for at, block in self._source.blocks(self._name, None):
            here = (index >= at) & (index < at + len(block))
            out[here] = block[index[here] - at]
            if at + len(block) > last:
                break
        return out


def source_weights(source: Any) -> Callable[[str], Any]:
    """A source's tensors as the oracle asks for them: small ones whole, large ones by rows."""

    def fetch(name: str) -> Any:
        shape = source.shape(name)
        small = len(shape) < 2 or int(np.prod(shape)) <= _KEEP
        return source.tensor(name) if small else SourceRows(source, name)

    return fetch
