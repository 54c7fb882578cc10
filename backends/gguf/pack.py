"""Rows of values to rows of bytes and back, for every ggml type."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from backends.base import QuantizedTensor, Values
from backends.gguf.importance import Importance
from backends.gguf.types import TYPES
from spec.errors import UserError

Bytes = NDArray[np.uint8]


def pack(
    values: Values, name: str, threads: int = 1, what: str = "", importance: Importance | None = None, start: int = 0
) -> Bytes:
    """[rows, cols] values to [rows, bytes] of ggml type `name`; codes and scales go in bit for bit.

    importance: of the tensor whose rows `start...` these are, for types that ggml rounds. Raises `UserError` where a
    finite value becomes infinite in float16. `what` names the tensor in errors.
    """
    if isinstance(values, QuantizedTensor) and name in ("q4_0", "q8_0"):
        return _pack_codes(values, name)
    dense = values.dequantize() if isinstance(values, QuantizedTensor) else np.ascontiguousarray(values, np.float32)
    if name == "f32":
        return dense.view(np.uint8)
    if name == "f16":
        with np.errstate(over="ignore"):
            half = dense.astype("<f2")
        if np.isinf(half).any():
            top = float(np.abs(dense).max())
            raise UserError(f"{what}: {top:g} does not fit in float16 (largest 65504): use bf16 or f32")
        return half.view(np.uint8)
    if name == "bf16":
        return to_bf16(dense).view(np.uint8)
    from backends.gguf.ggml import quantize

    try:
        if importance is None:
            return quantize(dense, name, threads)
        runs = importance.runs(start, len(dense))
        return np.concatenate([quantize(dense[a:z], name, threads, weights) for a, z, weights in runs])
    except UserError as e:
        raise UserError(f"{what}: {e}") from None


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _pack_codes(q: QuantizedTensor, name: str) -> Bytes:
    """Q4_0: byte j of a block holds elements j and j + 16, each code + 8. Q8_0: the codes. A float16 scale before."""
    q = q.grouped(32)
    assert q.group == 32, "GGUF's groups are 32 wide"
    rows, cols = q.shape
    blocks = cols // 32
    scales = q.scales.astype("<f2")
    assert (scales.astype(np.float32) == q.scales).all(), "portable scales are exact in float16"
    out = np.empty((rows, blocks, TYPES[name].size), np.uint8)
    out[..., :2] = scales[..., None].view(np.uint8)
    codes = q.codes.reshape(rows, blocks, 32)
    if name == "q4_0":
        assert q.bits == 4
        shifted = (codes + 8).astype(np.uint8)
        out[..., 2:] = shifted[..., :16] | (shifted[..., 16:] << 4)
    else:
        out[..., 2:] = codes.view(np.uint8)
    return out.reshape(rows, -1)


def unpack(data: Bytes, name: str) -> Values:
    """[rows, bytes] back: Q4_0 and Q8_0 as codes and scales, everything else as float32."""
    rows = data.shape[0]
    data = np.ascontiguousarray(data)
    if name in ("q4_0", "q8_0"):
        blocks = data.reshape(rows, -1, TYPES[name].size)
        scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
        body = blocks[..., 2:]
        if name == "q8_0":
            return QuantizedTensor(np.ascontiguousarray(body).view(np.int8).reshape(rows, -1), scales, 8)
        codes = np.concatenate([body & 15, body >> 4], -1).astype(np.int8) - np.int8(8)
        return QuantizedTensor(codes.reshape(rows, -1), scales, 4)
    if name == "f32":
        return data.view("<f4")
    if name == "f16":
        return data.view("<f2").astype(np.float32)
    if name == "bf16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    from gguf import GGMLQuantizationType, dequantize

    return dequantize(data, GGMLQuantizationType(TYPES[name].id)).astype(np.float32, copy=False)


def dense(values: Values) -> NDArray[np.float32]:
    """Float32, dequantized where it was not."""
    return values.dequantize() if isinstance(values, QuantizedTensor) else values
