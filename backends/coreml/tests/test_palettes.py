"""Palettes: close to the optimum, exact where values are few, groups by rows."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from backends.coreml import palettes
from backends.coreml.library import coremltools
from backends.coreml.palettes import BITS, group_rows, palettize, table_of
from spec.errors import UserError

RNG = np.random.default_rng(0)


def made(block: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    indices = np.empty(block.shape, np.uint8)
    return indices, table_of(block, bits, indices)


def error(block: np.ndarray, bits: int) -> float:
    indices, table = made(block, bits)
    return float(np.square(block.astype(np.float16).astype(np.float64) - table.astype(np.float64)[indices]).sum())


@pytest.mark.parametrize(("bits", "loss"), [(4, 0.003), (6, 0.005), (8, 0.03)])
@pytest.mark.parametrize("heavy", [False, True])
def test_tables_are_close_to_the_optimum(bits: int, loss: float, heavy: bool) -> None:
    coremltools()
    from coremltools._deps import kmeans1d

    block = RNG.standard_t(3, (32, 256)) if heavy else RNG.standard_normal((32, 256))
    block = block.astype(np.float32)
    values, counts = np.unique(block.astype(np.float16).astype(np.float64), return_counts=True)
    best = kmeans1d.cluster(values.tolist(), 1 << bits, weights=counts.tolist())
    centres: Any = np.asarray(best.centroids)[np.asarray(best.clusters)]
    optimum = float(np.sum(counts * np.square(values - centres)))
    assert error(block, bits) <= (1 + loss) * optimum


def test_few_values_are_exact_and_repeat_the_last() -> None:
    block = RNG.choice(np.array([-1, 0, 0.5, 3], np.float32), (32, 8))
    block[0, 0] = -0.0
    indices, table = made(block, 4)
    assert np.array_equal(table.astype(np.float32)[indices], block) and table[3:].tolist() == [3.0] * 13
    assert made(np.zeros((32, 8), np.float32), 8)[1].tolist() == [0.0] * 256


@pytest.mark.parametrize(("rows", "group"), [(32, 32), (64, 32), (96, 32), (97, 97), (50257, 1733), (16, 16), (40, 40)])
def test_groups_are_the_smallest_divisor_from_32_on(rows: int, group: int) -> None:
    assert group_rows(rows) == group


@pytest.mark.parametrize("bits", BITS.values())
def test_every_group_has_a_table_of_its_own(bits: int) -> None:
    block = np.concatenate([RNG.standard_normal((32, 16)), 100 + RNG.standard_normal((32, 16))]).astype(np.float32)
    whole = palettize(block, bits)
    assert whole.tables.shape == (2, 1 << bits)
    for n in (0, 1):
        part = palettize(block[32 * n : 32 * n + 32], bits)
        assert np.array_equal(part[:], whole[32 * n : 32 * n + 32])


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(UserError, match="70000 is beyond float16"):
        palettize(np.full((32, 2), 7e4, np.float32), 4)


@pytest.mark.parametrize("half", [False, True])
def test_a_table_is_that_of_the_distinct_values_whatever_the_slices(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by patterns, a few rows at a time, as by sorting all of them."""
    monkeypatch.setattr(palettes, "SLICE", 100)
    block = RNG.standard_normal((67, 31)).astype(np.float16 if half else np.float32)
    block[3, :5] = -0.0
    values, where, counts = np.unique(block.astype(np.float16).astype(float), return_inverse=True, return_counts=True)
    centres = palettes._centres(values, counts, 16).astype(np.float16)
    indices, table = made(block, 4)
    assert np.array_equal(table, centres)
    assert np.array_equal(indices, palettes.nearest(values, centres.astype(float))[where.reshape(block.shape)])


def test_a_vocabulary_without_divisors_takes_little_memory() -> None:
    """One group of all rows: a byte for each index, and no more than the slices besides."""
    block = RNG.standard_normal((32003, 128)).astype(np.float16)
    palettize(block[:32], 4)  # what is imported once
    tracemalloc.start()
    palettize(block, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < block.size + 24 * palettes.SLICE
