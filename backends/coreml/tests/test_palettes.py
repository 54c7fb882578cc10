"""Palettes: close to the optimum, exact where values are few, groups by rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from backends.coreml.library import coremltools
from backends.coreml.palettes import BITS, group_rows, palettize, table_of
from spec.errors import UserError

RNG = np.random.default_rng(0)


def error(block: np.ndarray, bits: int) -> float:
    indices, table = table_of(block, bits)
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
    indices, table = table_of(block, 4)
    assert np.array_equal(table.astype(np.float32)[indices], block) and table[3:].tolist() == [3.0] * 13
    assert table_of(np.zeros((32, 8), np.float32), 8)[1].tolist() == [0.0] * 256


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
        assert np.array_equal(part.dequantize(), whole.dequantize()[32 * n : 32 * n + 32])


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(UserError, match="70000 is beyond float16"):
        table_of(np.full((32, 2), 7e4, np.float32), 4)
