"""Palettes: a matrix as indices into small tables of float16 values, one table for a group of rows.

A table is the one-dimensional k-means of a group's float16 values, each weighted by its count. The optimum (Wang & Song
2011, by the copy of kmeans1d that coremltools' own palettizer uses) takes a second for 32 rows of 1024 and 256 entries,
so it is found for runs of neighbouring values, and then improved on the values themselves (Lloyd 1982): within 0.3 %
of the optimum's error at 4 and 6 bits and 2 % at 8, in a thirtieth of its time. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats
from backends.coreml.library import coremltools
from spec.errors import UserError

BITS = {"lut4": 4, "lut6": 6, "lut8": 8}
"""Levels by name, with the bits of an index."""
ROWS = 32
"""Fewest rows that share a table (all of them, where no divisor is as large)."""
RUNS, MOST = 8, 1024
"""Runs of values for each entry of a table, and at most."""
ROUNDS = 10
"""Steps of Lloyd's."""
SLICE = 1 << 20
"""Weights that are looked at together."""


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

    def __getitem__(self, rows: slice) -> Floats:
        """Rows, exact in float32."""
        at = np.arange(*rows.indices(len(self.indices))) // self.group
        return self.tables[at[:, None], self.indices[rows]].astype(np.float32)


def group_rows(rows: int) -> int:
    """Rows that share a table: the smallest divisor of at least `ROWS`, else all."""
    return next((n for n in range(ROWS, rows) if rows % n == 0), rows)


def palettize(block: NDArray[Any], bits: int, threads: int = 1, group: int = 0) -> Palette:
    """Whole groups of rows (by default those of a matrix of so many), each with its own table. Raises `UserError`
    beyond float16."""
    group = group or group_rows(len(block))
    indices = np.empty(block.shape, np.uint8)
    starts = range(0, len(block), group)
    with ThreadPoolExecutor(max(1, threads)) as pool:  # kmeans1d lets other threads run
        tables = pool.map(lambda a: table_of(block[a : a + group], bits, indices[a : a + group]), starts)
        return Palette(indices, np.stack(list(tables)), bits)


def table_of(block: NDArray[Any], bits: int, indices: NDArray[np.uint8]) -> NDArray[np.float16]:
    """The table [2^bits] of a group of rows, whose indices are written to `indices`.

    Float16 has 65,536 patterns: they are counted and labelled, a slice of rows at a time, whatever the group's size.
    """
    counts = np.zeros(1 << 16, np.int64)
    for rows in row_slices(block.shape):
        counts += np.bincount(_patterns(block[rows]).reshape(-1), minlength=len(counts))
    patterns = np.flatnonzero(counts).astype(np.uint16)
    values = patterns.view(np.float16).astype(np.float64)
    order = values.argsort()
    patterns, values = patterns[order], values[order]
    centres = _centres(values, counts[patterns], 1 << bits).astype(np.float16)
    table = np.full(1 << bits, centres[-1], np.float16)
    table[: len(centres)] = centres
    labels = np.zeros(len(counts), np.uint8)
    labels[patterns] = nearest(values, centres.astype(np.float64))
    for rows in row_slices(block.shape):
        indices[rows] = labels[_patterns(block[rows])]
    return table


def row_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """A matrix's rows, `SLICE` weights or one row at a time."""
    step = max(1, SLICE // max(1, shape[1]))
    return (slice(a, min(a + step, shape[0])) for a in range(0, shape[0], step))


def _patterns(rows: NDArray[Any]) -> NDArray[np.uint16]:
    """The bits of float16 values, -0 as 0. Raises `UserError` beyond float16."""
    with np.errstate(over="ignore"):
        half = rows.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"a weight of {float(np.abs(rows).max()):.6g} is beyond float16: use --quant f32")
    return (half + np.float16(0)).view(np.uint16)


def nearest(values: NDArray[Any], centres: NDArray[Any]) -> NDArray[np.intp]:
    """The place of the nearest of ascending centres, the lower one in the middle."""
    return np.searchsorted((centres[:-1] + centres[1:]) / 2, values)


def _centres(values: NDArray[Any], counts: NDArray[Any], most: int) -> NDArray[Any]:
    """Ascending centres, at most `most`. values: distinct and ascending, each as often as `counts` says."""
    if len(values) <= most:
        return values
    coremltools()
    from coremltools._deps import kmeans1d

    starts = _runs(values, counts, min(RUNS * most, MOST))
    weights = np.add.reduceat(counts, starts)
    means = np.add.reduceat(values * counts, starts) / weights
    if len(starts) <= most:
        means, weights = values, counts
    centres = np.asarray(kmeans1d.cluster(means.tolist(), most, weights=weights.tolist()).centroids)
    for _ in range(ROUNDS):
        labels = nearest(values, centres)
        held = np.bincount(labels, counts, most)
        better = np.where(held > 0, np.bincount(labels, values * counts, most) / np.maximum(held, 1), centres)
        if np.array_equal(better, centres):
            break
        centres = better
    return centres


def _runs(values: NDArray[Any], counts: NDArray[Any], most: int) -> NDArray[np.intp]:
    """Where runs of neighbouring values begin, as dense as a good table's entries: about the cube root of the density
    (Panter & Dite 1951), here by square roots, which are the same on every machine."""
    space = np.gradient(values)
    root = np.sqrt(np.sqrt(counts * space * space))
    share = np.cumsum(root * np.sqrt(root))
    number = np.minimum((share * (most / share[-1])).astype(np.intp), most - 1)
    return np.flatnonzero(np.diff(number, prepend=-1))
