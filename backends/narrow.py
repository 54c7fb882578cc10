"""Floats of 8 and 4 bits with shared scales: `fp8` and `nvfp4`, as ONNX's DequantizeLinear and TensorRT read them.

    fp8     weight = code * scale               codes E4M3 (OCP FP8, arXiv:2209.05433), a scale for each row
    nvfp4   weight = code * (scale * whole)     codes E2M1 (OCP Microscaling Formats 1.0), a scale in E4M3 for 16
                                                weights of a row, and one in float32 for the whole matrix (NVIDIA)

Scales of rows and of whole matrices are powers of two: a float's relative error does not depend on where its scale
lies, and so every weight has at most 6 significant bits and is exact in float16, bfloat16 and float32. The scale of 16
weights is searched: of the E4M3 numbers from about amax / 7 to amax / 3.5, the one with the smallest squared error (its
neighbours map the largest weight to 6 or to 4: arXiv:2512.02010).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats
from spec.errors import UserError

LEVELS = {"fp8": 8.0, "nvfp4": 4.5}
"""Levels and the bits that they store a weight in; a row's own scale is not counted."""

BLOCK = 16
"""Weights that share a scale in nvfp4."""
E4M3, E2M1 = 448.0, 6.0
"""Largest numbers."""
LEAST = {"fp8": -15, "nvfp4": -14}
"""Smallest exponents of the powers of two: the smallest weight is 2^-24, float16's."""
CANDIDATES = range(-2, 8)
"""Scales that are tried, counted in E4M3's numbers from the one next to amax / 6."""
LIMIT = 65504.0
SLICE = 1 << 20
"""Weights that are looked at together."""
CHUNK = 4096
"""Blocks that are searched together: their buffers stay in a core's cache."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Narrow:
    """Rows of a matrix at one of `LEVELS`."""

    level: str
    codes: Bytes
    """[rows, cols]: bits of E4M3, or of E2M1 in the low half of a byte"""
    scales: NDArray[np.float32]
    """[rows], or [rows, cols / 16], which E4M3 holds exactly"""
    whole: float = 1.0

    def dequantize(self) -> Floats:
        """[rows, cols], exact in float32."""
        table = _numbers("e4m3" if self.level == "fp8" else "e2m1")
        values = table[self.codes]
        if self.level == "fp8":
            return values * self.scales[:, None]
        rows, cols = self.codes.shape
        each = np.multiply(self.scales, np.float32(self.whole), dtype=np.float32)
        return (values.reshape(rows, -1, BLOCK) * each[..., None]).reshape(rows, cols)


def fits(level: str, width: int) -> bool:
    """Whether rows of `width` weights are whole blocks."""
    return level == "fp8" or width % BLOCK == 0


def quantize(block: Floats, level: str, whole: float | None = None) -> Narrow:
    """Rows [r, c] of finite float32. whole: the scale of the matrix that they are a part of (`whole_scale`); by default
    they are all of it. Raises `UserError` for a weight beyond float16, in which the products are computed."""
    if level == "fp8":
        scale = power(np.abs(block).max(1, initial=0.0) / np.float32(E4M3), LEAST[level])
        codes = encode(block / scale[:, None], "e4m3")
        return _checked(Narrow(level, codes, scale), block)
    shared = whole_scale(block) if whole is None else whole
    assert fits(level, block.shape[1]), f"{block.shape[1]} columns are no whole blocks of {BLOCK}"
    grouped = (block / np.float32(shared)).reshape(-1, BLOCK)
    codes = np.empty(grouped.shape, np.uint8)
    scales = np.empty(len(grouped), np.float32)
    step = CHUNK
    for a in range(0, len(grouped), step):
        codes[a : a + step], scales[a : a + step] = _searched(grouped[a : a + step])
    out = Narrow(level, codes.reshape(block.shape), scales.reshape(len(block), -1), shared)
    return _checked(out, block)


def whole_scale(block: Floats) -> float:
    """nvfp4's scale of a whole matrix: the largest block scale stays within E4M3."""
    amax = np.float32(max((np.abs(rows).max(initial=0.0) for _, rows in _slices(block)), default=0.0))
    return float(power(np.array([amax / np.float32(E4M3 * E2M1)], np.float32), LEAST["nvfp4"])[0])


def power(x: NDArray[np.float32], least: int) -> NDArray[np.float32]:
    """The power of two at or above each number, and at or above 2^least."""
    mantissa, exponent = np.frexp(x)
    up = np.where(mantissa == 0.5, exponent - 1, exponent)
    return np.ldexp(np.float32(1), np.where(x > 0, np.maximum(up, least), least)).astype(np.float32)


def _checked(q: Narrow, block: Floats) -> Narrow:
    for start, rows in _slices(block):
        part = q.scales[start : start + len(rows)]
        largest = np.abs(Narrow(q.level, q.codes[start : start + len(rows)], part, q.whole).dequantize()).max(initial=0)
        if not largest <= LIMIT:
            raise UserError(f"a weight of {np.abs(rows).max():.6g} becomes {largest:.6g} at {q.level}, beyond float16 "
                            f"({LIMIT:.6g}): use --quant f32")  # fmt: skip
    return q


def _slices(block: Floats) -> Iterator[tuple[int, Floats]]:
    step = max(1, SLICE // max(1, block.shape[1]))
    return ((a, block[a : a + step]) for a in range(0, len(block), step))


def _searched(grouped: Floats) -> tuple[Bytes, NDArray[np.float32]]:
    """E2M1 codes [n, 16] and the scales [n] with the smallest squared error, the first of equal ones."""
    positive = _numbers("e4m3")[1:127]  # 2^-9 .. 448
    x = np.ascontiguousarray(grouped.T)  # so that every operation runs along n
    y, q = np.empty_like(x), np.empty_like(x)
    amax = np.abs(x).max(0)
    above = np.searchsorted(positive, amax / np.float32(E2M1))
    best = np.full(x.shape[1], np.inf, np.float32)
    scale = np.full(x.shape[1], positive[0], np.float32)
    unit = np.maximum(amax, positive[0])  # errors in units of amax neither overflow nor underflow
    for k in CANDIDATES:
        s = positive[np.clip(above + k, 0, len(positive) - 1)]
        np.divide(x, s, out=y)
        _nearest(y, q)
        np.subtract(y, q, out=y)
        np.multiply(y, y, out=y)
        error = np.add.reduce(y, axis=0)
        error *= np.square(s / unit)
        better = error < best
        np.copyto(best, error, where=better)
        np.copyto(scale, s, where=better)
    return encode(np.divide(x, scale, out=y).T, "e2m1"), scale


def _nearest(y: Floats, out: Floats | None = None) -> Floats:
    """The nearest numbers of E2M1, ties to even, the largest beyond them: steps are half of the power of two below a
    number, and at least a half."""
    y = np.ascontiguousarray(y)
    q = np.bitwise_and(y.view(np.uint32), np.uint32(0x7F800000), out=None if out is None else out.view(np.uint32))
    step = q.view(np.float32)
    np.maximum(step, np.float32(1), out=step)
    step *= np.float32(1.5 * 2.0**22)  # what is added to this and taken away again is rounded to whole steps
    q = np.subtract(y + step, step, out=step)
    return np.clip(q, -np.float32(E2M1), np.float32(E2M1), out=q)


def encode(x: Floats, kind: str) -> Bytes:
    """The bits of the nearest numbers of `e4m3` or `e2m1`, one to a byte, ties to even; the largest beyond them."""
    import ml_dtypes

    if kind == "e4m3":
        return np.clip(x, -E4M3, E4M3).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return _nearest(x).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def decode(codes: Bytes, kind: str) -> NDArray[np.float32]:
    """Numbers of bits that lie one to a byte."""
    return _numbers(kind)[codes]


@cache
def _numbers(kind: str) -> NDArray[np.float32]:
    """All numbers by their bits."""
    import ml_dtypes

    if kind == "e4m3":
        return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def pack(codes: Bytes, kind: str) -> Bytes:
    """Bits as a file holds them: of E2M1 two codes to a byte, the low half first."""
    flat = codes.reshape(-1)
    return flat if kind == "e4m3" else flat[::2] | (flat[1::2] << np.uint8(4))


def unpack(data: Bytes, kind: str) -> Bytes:
    """What `pack` was given, in one row."""
    if kind == "e4m3":
        return data
    return np.stack([data & np.uint8(15), data >> np.uint8(4)], -1).reshape(-1)
