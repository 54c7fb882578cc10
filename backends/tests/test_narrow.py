"""fp8 and nvfp4: exact where they say so, searched better than the usual scale, and whatever the weights are."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("ml_dtypes")

import ml_dtypes

from backends import narrow
from spec.errors import UserError


def matrix(rows: int = 40, cols: int = 96, seed: int = 0, size: float = 0.02) -> NDArray[np.float32]:
    return (size * np.random.default_rng(seed).standard_t(4, (rows, cols))).astype(np.float32)


def rmse(x: NDArray[np.float32], level: str) -> float:
    return float(np.sqrt(np.square(narrow.quantize(x, level).dequantize() - x).sum() / np.square(x).sum()))


@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
def test_codes_are_the_nearest_numbers(kind: str) -> None:
    """As ml_dtypes converts them, to even among equals; every number is its own code."""
    numbers = np.unique(narrow.decode(np.arange(256 if kind == "e4m3" else 16, dtype=np.uint8), kind))
    finite = numbers[np.isfinite(numbers)]
    assert np.array_equal(narrow.decode(narrow.encode(finite, kind), kind), finite)
    between = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    dtype = ml_dtypes.float8_e4m3fn if kind == "e4m3" else ml_dtypes.float4_e2m1fn
    x = np.concatenate([between, np.nextafter(between, np.inf), np.nextafter(between, -np.inf)])
    assert np.array_equal(narrow.decode(narrow.encode(x, kind), kind), x.astype(dtype).astype(np.float32))
    beyond = narrow.encode(np.array([1e9, -1e9], np.float32), kind)
    assert narrow.decode(beyond, kind).tolist() == [finite[-1], finite[0]]


@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
def test_bytes_come_back(kind: str) -> None:
    codes = np.random.default_rng(0).integers(0, 256 if kind == "e4m3" else 16, (6, 32)).astype(np.uint8)
    packed = narrow.pack(codes, kind)
    assert len(packed) == codes.size // (1 if kind == "e4m3" else 2)
    assert np.array_equal(narrow.unpack(packed, kind).reshape(6, 32), codes)


@pytest.mark.parametrize("level", narrow.LEVELS)
@pytest.mark.parametrize("size", [1e-9, 1e-6, 0.02, 3.0, 4000.0])
def test_weights_are_exact_in_sixteen_bits_and_stay_where_they_are(level: str, size: float) -> None:
    x = np.clip(matrix(size=size), -5e4, 5e4)
    once = narrow.quantize(x, level).dequantize()
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert np.array_equal(once.astype(dtype).astype(np.float32), once)
    assert np.array_equal(narrow.quantize(once, level).dequantize(), once)


@pytest.mark.parametrize(("level", "bound"), [("fp8", 0.028), ("nvfp4", 0.09)])
def test_the_error_is_that_of_the_bits(level: str, bound: float) -> None:
    """At most 2^-4 / sqrt(3) for the three bits of a mantissa; measured .0265, and .081 with four bits."""
    assert 0.8 * bound <= rmse(matrix(), level) <= bound


def test_the_search_beats_the_largest_weight_at_six() -> None:
    x = matrix(200)
    q = narrow.quantize(x, "nvfp4")
    grouped = x.reshape(-1, narrow.BLOCK)
    usual = narrow.decode(narrow.encode(np.abs(grouped).max(1) / np.float32(6 * q.whole), "e4m3"), "e4m3")
    scale = np.maximum(usual, np.float32(2**-9)) * np.float32(q.whole)
    plain = narrow.decode(narrow.encode(grouped / scale[:, None], "e2m1"), "e2m1") * scale[:, None]
    ours = np.square(q.dequantize().reshape(grouped.shape) - grouped).sum(1)
    theirs = np.square(plain - grouped).sum(1)
    assert (ours <= theirs * 1.000001).all() and ours.sum() < 0.93 * theirs.sum()


def test_rows_of_a_matrix_alone_are_those_of_the_whole() -> None:
    x = matrix()
    for level in narrow.LEVELS:
        whole = narrow.whole_scale(x) if level == "nvfp4" else None
        parts = [narrow.quantize(x[a : a + 7], level, whole).dequantize() for a in range(0, len(x), 7)]
        assert np.array_equal(np.concatenate(parts), narrow.quantize(x, level).dequantize())


@pytest.mark.parametrize("level", narrow.LEVELS)
def test_zeros_denormals_constants_and_outliers(level: str) -> None:
    x = np.zeros((5, 32), np.float32)
    x[1], x[2], x[3], x[4, 3] = 1e-42, 0.37, -6e4, 5e4
    q = narrow.quantize(x, level)
    found = q.dequantize()
    assert np.isfinite(found).all() and (q.scales > 0).all() and q.whole > 0
    assert not found[:2].any() and found[4, 3] == pytest.approx(5e4, rel=2**-4 if level == "fp8" else 0.2)
    assert np.ptp(found[2]) == 0 and found[2, 0] == pytest.approx(0.37, rel=0.1)
    assert found[3, 0] == pytest.approx(-6e4, rel=0.1)
    with pytest.raises(UserError, match="beyond float16"):
        narrow.quantize(np.full((1, 16), 65504, np.float32), level)
