"""How much each column of a matrix counts while ggml rounds it: mean squares of the inputs of its product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats

FLOOR = 2.0**-30
"""Least weight of a column beside the largest: ggml rounds a block whose weights are all zero to zeros."""

Lookup = Callable[[str], Floats | None]
"""Mean squares by canonical name: [cols], or [experts, cols]; none where nothing was measured."""


@dataclass(frozen=True, eq=False)
class Importance:
    """Weights of the columns of a tensor whose rows belong to one matrix, or to several one after the other."""

    values: Floats
    """[matrices, cols], positive"""
    rows: int
    """Of one matrix."""

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, Floats]]:
        """(first, last + 1, weights [cols]) for rows start..start + count, counted from `start`; each in one matrix."""
        at = start
        while at < start + count:
            matrix = at // self.rows
            end = min(start + count, (matrix + 1) * self.rows)
            yield at - start, end - start, self.values[matrix]
            at = end


def even(cols: int) -> Importance:
    """Every column counts the same, in whatever matrix."""
    return Importance(np.ones((1, cols), np.float32), 1 << 48)


def conditioned(found: NDArray[np.floating], shape: tuple[int, ...]) -> Importance:
    """Mean squares [cols] or [experts, cols] of a canonical tensor [rows, cols], as ggml needs them.

    A power of four brings the largest of a matrix to 1..4, which changes no rounding (ggml takes square roots too) but
    keeps its sums away from its thresholds, and nothing is less than `FLOOR`. A matrix that nothing was measured for
    has zeros, which become ones, as in llama.cpp.
    """
    values = np.atleast_2d(np.asarray(found, np.float64))
    assert values.shape[1] == shape[-1] and shape[0] % len(values) == 0, f"importance {values.shape} of {shape}"
    assert np.isfinite(values).all() and (values >= 0).all(), "mean squares"
    top = values.max(axis=1, keepdims=True)
    scaled = np.ldexp(values, -2 * ((np.frexp(top)[1] - 1) // 2))
    out = np.where(top > 0, np.maximum(scaled, FLOOR), 1.0).astype(np.float32)
    return Importance(out, shape[0] // len(values))
