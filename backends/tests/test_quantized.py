"""Codes and scales that say the same numbers in groups of another size."""

from __future__ import annotations

import numpy as np
import pytest

from backends.base import QuantizedTensor, content_hash


def tensor(rows: int = 6, cols: int = 256, group: int = 128) -> QuantizedTensor:
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (rows, cols)).astype(np.int8)
    return QuantizedTensor(codes, rng.random((rows, cols // group)).astype(np.float16).astype(np.float32), 4, group)


def test_repeated_scales_join_again_to_the_same_hash() -> None:
    q = tensor()
    fine = q.grouped(32)
    assert (fine.group, fine.scales.shape) == (32, (6, 8))
    np.testing.assert_array_equal(fine.dequantize(), q.dequantize())
    assert content_hash([fine]) != content_hash([q]) == content_hash([fine.grouped(128)])
    assert content_hash([fine[:2].grouped(128), fine[2:].grouped(128)]) == content_hash([q])
    assert q.grouped(128) is q


@pytest.mark.parametrize("place", [(0, 1), (5, 7)])
def test_unequal_scales_stay_what_they_are(place: tuple[int, int]) -> None:
    fine = tensor().grouped(32)
    fine.scales[place] *= 2
    assert fine.grouped(128) is fine


def test_groups_that_do_not_divide_the_width_stay_too() -> None:
    q = tensor(cols=96, group=32)
    assert q.grouped(128) is q and q.grouped(48) is q
