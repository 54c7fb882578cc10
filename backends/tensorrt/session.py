"""Sequences over a graph with caches of fixed length: pieces, positions, bounds. What executes the graph is given.

TensorRT ignores a write beyond the end of a cache without a word, so nothing gets past `Sequences` that would not fit.

Shapes: B batch, T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.session import NOT_BEGUN, Session
from backends.tensorrt.engine import Limits
from backends.text import Text
from spec.errors import UserError


class Executor(Protocol):
    """Runs the graph."""

    def caches(self, batch: int) -> Any:
        """Caches for so many sequences; what they hold does not matter yet."""
        ...

    def run(self, ids: NDArray[np.int64], at: int, caches: Any) -> NDArray[np.float32]:
        """[B, T] ids whose first goes to slot `at` of every row's cache -> [B, T, V] logits."""
        ...


class Sequences(Session):
    """What `backends.base.Runtime` asks of numbers: `logits`, `prefill`, `step`."""

    def __init__(
        self,
        executor: Executor,
        bounds: Limits,
        vocab_size: int,
        context: int,
        name: object = "",
        text: Text | None = None,
    ) -> None:
        """context: tokens of the longest sequence, at most the caches' slots."""
        assert context <= bounds.context
        super().__init__(name, text, vocab_size, context, bounds.context)
        self._executor, self._bounds = executor, bounds
        self._used: int | None = None
        self._caches: Any = None

    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """[B, T] -> [B, T, V], no cache kept."""
        checked = self.checked(ids, 2)
        rows = []
        for i in range(0, len(checked), self._bounds.batch):
            part = checked[i : i + self._bounds.batch]
            rows.append(np.concatenate(list(self._pieces(part, 0, self._executor.caches(len(part)))), 1))
        return np.concatenate(rows)

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Start a new sequence: [T] -> [V] logits after the last token."""
        checked = self.checked(ids, 1)
        self._used = None
        if self._caches is None:
            self._caches = self._executor.caches(1)
        last = np.empty(0, np.float32)
        for piece in self._pieces(checked[None], 0, self._caches):
            last = piece[0, -1].copy()
        self._used = len(checked)
        return last

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Continue it: [T] -> [T, V]."""
        if self._used is None:
            raise UserError(NOT_BEGUN)
        checked = self.checked(ids, 1, self._used)
        out = np.concatenate(list(self._pieces(checked[None], self._used, self._caches)), 1)[0]
        self._used += len(checked)
        return out

    def _pieces(self, ids: NDArray[np.int64], at: int, caches: Any) -> Iterator[NDArray[np.float32]]:
        for i in range(0, ids.shape[1], self._bounds.chunk):
            piece = ids[:, i : i + self._bounds.chunk]
            assert at + i + piece.shape[1] <= self._bounds.context, "beyond the cache"
            yield self._executor.run(piece, at + i, caches)
