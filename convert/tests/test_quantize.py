"""The portable rounding: exact in every float format, never worse than nearest, independent of how rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from backends.base import QuantizedTensor
from convert.quantize import GRIDS, TooLarge, error, quantize, round_floats, round_scale
from spec.errors import UserError

BITS = pytest.mark.parametrize("bits", [4, 8])


def blocks(low: float = -1e4, high: float = 1e4) -> st.SearchStrategy[np.ndarray]:
    """Rows of a wide range of magnitudes, zeros and repeated values among them."""
    values = st.one_of(
        st.floats(low, high, width=32, allow_subnormal=True),
        st.sampled_from([0.0, 1.0, -1.0, 6e-8, -3e-8, 2e-5, 1e-30]),
    )
    shapes = st.tuples(st.integers(1, 3), st.sampled_from([32, 96]))
    return shapes.flatmap(lambda s: hnp.arrays(np.float32, s, elements=values, fill=st.just(np.float32(0))))


def nearest(x: np.ndarray, bits: int) -> QuantizedTensor:
    """Plain round-to-nearest: scale amax / (2^(bits-1) - 1)."""
    g = x.reshape(-1, 32)
    s = round_scale(np.abs(g).max(1) / np.float32(GRIDS[bits].high))
    codes = np.clip(np.rint(g / s[:, None]), GRIDS[bits].low, GRIDS[bits].high).astype(np.int8)
    return QuantizedTensor(codes.reshape(x.shape), s.reshape(len(x), -1), bits)


def bf16(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@BITS
@given(x=blocks())
@settings(max_examples=150, deadline=None)
def test_scales_and_biases_are_exact_in_float16_and_bfloat16(bits: int, x: np.ndarray) -> None:
    q = quantize(x, bits)
    for value in (q.scales, q.scales * np.float32(GRIDS[bits].low)):
        np.testing.assert_array_equal(value, value.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(value, bf16(value))
    assert (q.scales > 0).all()
    assert q.codes.min() >= GRIDS[bits].low and q.codes.max() <= GRIDS[bits].high


@BITS
@given(x=blocks())
@settings(max_examples=150, deadline=None)
def test_never_worse_than_round_to_nearest(bits: int, x: np.ndarray) -> None:
    plain, total = error(x, nearest(x, bits))
    assert error(x, quantize(x, bits))[0] <= plain * (1 + 1e-5) + total * 1e-13


@BITS
@given(x=blocks())
@settings(max_examples=150, deadline=None)
def test_codes_are_the_nearest_to_the_rounded_scale(bits: int, x: np.ndarray) -> None:
    q = quantize(x, bits)
    scale = np.repeat(q.scales, 32, axis=1)
    ideal = np.clip(np.rint(x / scale), GRIDS[bits].low, GRIDS[bits].high)
    np.testing.assert_array_equal(q.codes, ideal)


@BITS
@given(x=blocks(-100, 100))
@settings(max_examples=100, deadline=None)
def test_a_tensor_on_the_grid_stays(bits: int, x: np.ndarray) -> None:
    once = quantize(x, bits).dequantize()
    np.testing.assert_array_equal(quantize(once, bits).dequantize(), once)


@BITS
def test_block_boundaries_change_nothing(bits: int) -> None:
    x = np.random.default_rng(0).standard_t(4, (70, 1056)).astype(np.float32)
    whole = quantize(x, bits)
    for cut in (1, 33, 69):
        for part, rows in ((quantize(x[:cut], bits), slice(0, cut)), (quantize(x[cut:], bits), slice(cut, None))):
            np.testing.assert_array_equal(part.codes, whole.codes[rows])
            np.testing.assert_array_equal(part.scales, whole.scales[rows])


@BITS
def test_zero_groups_stay_zero(bits: int) -> None:
    x = np.zeros((2, 64), np.float32)
    x[1, 40] = 3
    q = quantize(x, bits)
    assert not q.codes[0].any() and not q.codes[1, :32].any()
    np.testing.assert_allclose(q.dequantize()[1, 40], 3, rtol=0.08 if bits == 4 else 0.01)


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.0076), (8, 2.8e-5)])
def test_gaussian_weights_lose_no_more_than_expected(bits: int, bound: float) -> None:
    x = np.random.default_rng(1).standard_normal((64, 2048)).astype(np.float32)
    lost, total = error(x, quantize(x, bits))
    assert lost / total < bound
    if bits == 4:  # plain rounding: 0.0094
        assert lost < 0.82 * error(x, nearest(x, bits))[0]


@BITS
def test_importances_move_the_error_where_it_matters_less(bits: int) -> None:
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((64, 256)).astype(np.float32), rng.gamma(0.3, size=256).astype(np.float32) + 1e-3
    plain, weighted = quantize(x, bits).dequantize(), quantize(x, bits, weights=w).dequantize()
    assert np.sum(w * (x - weighted) ** 2) < np.sum(w * (x - plain) ** 2)
    even = quantize(x, bits, weights=np.ones(256, np.float32))
    np.testing.assert_array_equal(even.dequantize(), plain)


@BITS
def test_weights_beyond_a_float16_scale_are_refused(bits: int) -> None:
    x = np.ones((3, 64), np.float32)
    x[2, 5] = 1e6
    with pytest.raises(UserError, match=r"row 2: a weight of 1e\+06 is beyond q"):
        quantize(x, bits)


@BITS
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_never_becomes_a_scale(bits: int, value: float) -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 40] = value
    with pytest.raises(UserError, match="row 1: a weight of"):
        quantize(x, bits)


@pytest.mark.parametrize(("bits", "largest"), [(4, 57120), (8, 64770)])
def test_float16s_largest_numbers_are_held_to_the_last_that_fits(bits: int, largest: float) -> None:
    x = np.full((2, 32), 1e-3, np.float32)
    x[1, :2] = largest, -largest
    q = quantize(x, bits)
    np.testing.assert_array_equal(q.dequantize()[1, :2], [largest, -largest])
    assert np.isfinite((q.scales * GRIDS[bits].low).astype(np.float16)).all()
    x[1, 0] = 65504
    with pytest.raises(UserError, match=rf"head.weight: row 8: a weight of 65504 is beyond q{bits}.*'head=f16'"):
        raise UserError(_refusal(x, bits).at("head.weight", 7))


def _refusal(x: np.ndarray, bits: int) -> TooLarge:
    with pytest.raises(TooLarge) as e:
        quantize(x, bits)
    return e.value


@BITS
@pytest.mark.parametrize("value", [1.0, -1.0, 0.02, 2.0**-14, 1e-7, 57000.0, -57000.0])
def test_constant_groups_are_as_near_as_a_scale_of_eight_bits_can_be(bits: int, value: float) -> None:
    q = quantize(np.full((1, 32), value, np.float32), bits)
    assert len(np.unique(q.codes)) == 1
    # a scale is within 2^-9 of what is wanted, and within half of float16's smallest number where that is coarser
    near = max(abs(value) * 2.0**-9, abs(int(q.codes[0, 0])) * 2.0**-25)
    np.testing.assert_allclose(q.dequantize(), value, rtol=0, atol=near)


@BITS
@pytest.mark.parametrize("value", [1e-45, -1e-40, 1.1e-38, 2.0**-26])
def test_denormals_round_to_zero_or_to_the_smallest_scale(bits: int, value: float) -> None:
    x = np.full((1, 32), value, np.float32)
    q = quantize(x, bits)
    assert (q.scales > 0).all()
    assert np.abs(q.dequantize() - x).max() <= 2.0**-25


@given(st.floats(2.0**-30, 8000, width=32))
def test_rounded_scales_are_as_near_as_they_can_be(s: float) -> None:
    r = float(round_scale(np.array([s], np.float32))[0])
    assert abs(r - s) <= max(s * 2**-8, 2**-25) or r == 2**-24


@given(x=blocks(-6e4, 6e4))
@settings(max_examples=50, deadline=None)
def test_float_levels_round_to_nearest_even(x: np.ndarray) -> None:
    np.testing.assert_array_equal(round_floats(x, "f16"), x.astype(np.float16).astype(np.float32))
    assert round_floats(x, "f32") is x
    half = round_floats(x, "bf16")
    np.testing.assert_array_equal(half, bf16(half))
    smallest = 2.0**-134  # half of bfloat16's smallest subnormal number
    assert (np.abs(half.astype(np.float64) - x) <= np.maximum(np.abs(x.astype(np.float64)) * 2**-8, smallest)).all()


@pytest.mark.parametrize(("level", "value"), [("f16", 7e4), ("bf16", 3.4e38)])
def test_floats_that_would_become_infinite_are_refused(level: str, value: float) -> None:
    x = np.ones((3, 4), np.float32)
    x[1, 2] = value
    with pytest.raises(UserError, match="row 1: a weight of"):
        round_floats(x, level)
