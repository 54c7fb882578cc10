"""Bytes and places in the data file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from backends.base import QuantizedTensor
from backends.onnx.layout import Profile, constants, decode, encode, layout, pack, unpack
from convert.quantize import round_floats
from convert.recipe import plan
from parity_tests.cases import FEATURES
from spec.rope import rope_tables


def quantized(bits: int) -> QuantizedTensor:
    """Every code, in both halves of a byte."""
    half = 1 << (bits - 1)
    codes = np.arange(-half, half, dtype=np.int16)
    both = np.stack([np.resize(codes, 256), np.resize(codes[::-1], 256)]).astype(np.int8)
    return QuantizedTensor(both, np.ones((2, 8), np.float32), bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_codes_come_back(bits: int, profile: Profile) -> None:
    q = quantized(bits)
    data = pack(q, profile)
    assert len(data) == q.codes.size * bits // 8
    assert np.array_equal(unpack(data, bits, profile).reshape(q.codes.shape), q.codes)


def test_the_low_nibble_comes_first() -> None:
    codes = np.resize(np.array([1, -2], np.int8), (1, 32))
    q = QuantizedTensor(codes, np.ones((1, 1), np.float32), 4)
    assert pack(q, "portable")[0] == 0xE1
    assert pack(q, "ort")[0] == 0x69


@given(hnp.arrays(np.float32, 16, elements=st.floats(-60000, 60000, width=32)), st.sampled_from(["f32", "f16", "bf16"]))
def test_floats_are_rounded_as_the_levels_are(values: np.ndarray, dtype: str) -> None:
    got = decode(encode(values, dtype), dtype)
    assert np.array_equal(got, round_floats(values, dtype))
    assert np.array_equal(decode(encode(got, dtype), dtype), got)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_places_are_aligned_and_do_not_overlap(name: str, profile: Profile) -> None:
    for level in ("f32", "q4"):
        places = layout(FEATURES[name], plan(FEATURES[name], level), profile, "f32")
        end = 0
        for t in places.tensors.values():
            assert t.offset >= end
            assert t.offset % (4096 if t.nbytes >= 4096 else 64) == 0
            end = t.offset + t.nbytes
        assert end == places.nbytes


def test_tables_are_float64_angles_rounded_once() -> None:
    spec = FEATURES["rope_yarn"]
    (table,) = rope_tables(spec)
    found = {n: np.zeros((spec.context, len(table.inv_freq)), np.float32) for n in ("rope.0.cos", "rope.0.sin")}
    for name, start, rows in constants(spec, rows=7):
        found[name][start : start + len(rows)] = rows
    angles = np.arange(spec.context)[:, None] * table.inv_freq.astype(np.float64)
    assert np.array_equal(found["rope.0.cos"], (np.cos(angles) * table.factor).astype(np.float32))
    assert np.array_equal(found["rope.0.sin"], (np.sin(angles) * table.factor).astype(np.float32))
