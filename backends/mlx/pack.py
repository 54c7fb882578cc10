"""Rows between NumPy and the bytes of an MLX file. r rows, c columns, b bits, g columns in a group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats, QuantizedTensor
from backends.mlx.levels import Packing
from spec.errors import MissingDependency, UserError

Parts = dict[str, NDArray[Any]]
"""`weight`, `scales` and (affine) `biases` of a quantized matrix."""


COMPUTE, LEVEL = "use --compute f32", "use --quant bf16 or f32"
"""What helps where a value is too large: vectors and scales have the dtype of the activations, matrices the level's."""


def to_floats(x: Floats, dtype: str, name: str, hint: str = COMPUTE) -> NDArray[Any]:
    """Float32 rounded to nearest even in a safetensors dtype. Raises `UserError` beyond its range."""
    if dtype == "F32":
        return np.ascontiguousarray(x, "<f4")
    if dtype == "F16":
        with np.errstate(over="ignore"):
            out = np.ascontiguousarray(x).astype("<f2")
        finite = np.isfinite(out)
    else:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        out = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
        finite = (out & 0x7F80) != 0x7F80
    if not finite.all():
        raise UserError(f"{name}: {np.abs(x).max():.6g} is beyond {dtype.lower()} ({hint})")
    return out


def from_floats(raw: NDArray[Any], dtype: str) -> Floats:
    """What is stored, as float32."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def from_grid(q: QuantizedTensor, p: Packing, dtype: str, name: str) -> Parts:
    """The portable grid as affine: unsigned codes, bias = -2^(b-1) scale. Scales of 8 significant bits and such
    biases are exact in every dtype. A 4-bit tensor may go into 8 bits, and one of groups of 128 into groups of 32."""
    q = q.grouped(p.group)
    assert q.group == p.group and q.bits <= p.bits
    zero = 1 << (p.bits - 1)
    codes = (q.codes.astype(np.int16) + zero).astype(np.uint8)
    if p.bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    biases = q.scales * np.float32(-zero)
    return {
        "weight": np.ascontiguousarray(codes).view("<u4"),
        "scales": to_floats(q.scales, dtype, name),
        "biases": to_floats(biases, dtype, name),
    }


def on_grid(parts: Parts, p: Packing, dtype: str) -> bool:
    """Whether they are codes and scales of the portable grid, whose biases follow from the scales."""
    if p.mode != "affine" or p.bits not in (4, 8):
        return False
    scales, biases = (from_floats(parts[k], dtype) for k in ("scales", "biases"))
    return bool((biases == scales * np.float32(-(1 << (p.bits - 1)))).all())


def to_grid(parts: Parts, p: Packing, dtype: str) -> QuantizedTensor:
    """Back to codes and scales, where they are `on_grid`."""
    raw = np.ascontiguousarray(parts["weight"]).view(np.uint8)
    codes = np.stack([raw & 15, raw >> 4], -1).reshape(len(raw), -1) if p.bits == 4 else raw
    codes = (codes.astype(np.int16) - (1 << (p.bits - 1))).astype(np.int8)
    return QuantizedTensor(codes, from_floats(parts["scales"], dtype), p.bits, p.group)


def quantize(x: Floats, p: Packing, dtype: str) -> Parts:
    """`mx.quantize` of rows that were rounded to the dtype of the activations, as `mlx_lm.convert` does it."""
    mx = _mlx()
    with mx.stream(mx.cpu):  # the same everywhere
        kind = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype]
        got = mx.quantize(mx.array(x).astype(kind), group_size=p.group, bits=p.bits, mode=p.mode)
        names = ("weight", "scales", "biases")
        return {n: _raw(a) for n, a in zip(names, got, strict=False)}


def dequantize(parts: Parts, p: Packing, dtype: str) -> Floats:
    """What MLX takes the parts for, in float32."""
    mx = _mlx()
    with mx.stream(mx.cpu):
        scales, biases = parts["scales"], parts.get("biases")
        return np.array(
            mx.dequantize(
                mx.array(parts["weight"]),
                mx.array(from_floats(scales, dtype) if p.mode == "affine" else scales),
                None if biases is None else mx.array(from_floats(biases, dtype)),
                group_size=p.group, bits=p.bits, mode=p.mode, dtype=mx.float32,
            )
        )  # fmt: skip


def _mlx() -> Any:
    """mlx.core, which only its own levels need. Raises `MissingDependency`."""
    try:
        import mlx.core
    except ImportError:
        raise MissingDependency("mlx's own levels need mlx: pip install 'allotrope[mlx]'") from None
    return mlx.core


def _raw(a: Any) -> NDArray[Any]:
    mx = _mlx()
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)
