"""Palettes: a matrix as indices into small tables of float16 values, one table for a group of rows.

The tables are the optimal one-dimensional k-means of a group's float16 values, each value weighted by its count
(Wang & Song 2011, by the copy of kmeans1d that coremltools' own palettizer uses), so they are deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats
from backends.coreml.library import coremltools
from spec.errors import UserError

BITS = {"lut4": 4, "lut6": 6, "lut8": 8}
"""Levels by name, with the bits of an index."""
ROWS = 32
"""Fewest rows that share a table (all of them, where no divisor is as large)."""


@dataclass(frozen=True, eq=False)
class Palette:
    """Rows of a matrix: `weight[r, c] = tables[r // group, indices[r, c]]`."""

    indices: NDArray[np.uint8]
    """[rows, cols]"""
    tables: NDArray[np.float16]
    """[rows / group, 2^bits], ascending; where there are fewer distinct values, the last one repeats"""
    bits: int

    @cached_property
    def group(self) -> int:
        """Rows that share a table."""
        return len(self.indices) // len(self.tables)

    def dequantize(self) -> Floats:
        """[rows, cols], exact in float32."""
        table = np.repeat(self.tables.astype(np.float32), self.group, axis=0)
        return np.take_along_axis(table, self.indices.astype(np.intp), axis=1)


def group_rows(rows: int) -> int:
    """Rows that share a table: the smallest divisor of at least `ROWS`, else all."""
    return next((n for n in range(ROWS, rows) if rows % n == 0), rows)


def palettize(block: Floats, bits: int) -> Palette:
    """Whole groups of rows, each with its own table. Raises `UserError` beyond float16."""
    group = group_rows(len(block))
    made = [table_of(block[a : a + group], bits) for a in range(0, len(block), group)]
    return Palette(np.concatenate([i for i, _ in made]), np.stack([t for _, t in made]), bits)


def table_of(block: Floats, bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Indices of a group of rows and its table [2^bits]."""
    coremltools()
    from coremltools._deps import kmeans1d

    with np.errstate(over="ignore"):
        half = block.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"a weight of {float(np.abs(block).max()):.6g} is beyond float16: use --quant f32")
    half = half + np.float16(0)  # -0 and 0 are one value
    values, where, counts = np.unique(half.astype(np.float32), return_inverse=True, return_counts=True)
    if len(values) <= 1 << bits:
        centres, labels = values, np.arange(len(values))
    else:
        found = kmeans1d.cluster(values.tolist(), 1 << bits, weights=counts.tolist())
        centres, labels = np.asarray(found.centroids), np.asarray(found.clusters)
    table = np.full(1 << bits, centres[-1], np.float16)
    table[: len(centres)] = centres
    return labels.astype(np.uint8)[where.reshape(block.shape)], table
