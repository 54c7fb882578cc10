"""Weight handles that are layers: `linear(x, w)` is `w(x)`. They are mlx's own, with roundings where they belong.

Metal's and CUDA's kernels accumulate in float32 and round once. The CPU's do not (a product of float16 activations
with 4-bit weights loses 1e-5 of NMSE, 250 times its final rounding), so there 16-bit activations are widened first.
This file becomes a part of the bundled model.py.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


def wide() -> bool:
    """Whether this device's kernels round inside an operation, so that 16-bit operands are widened before it."""
    return mx.default_device() == mx.cpu


def widened(x: mx.array) -> mx.array:
    """[...] in float32 where the device needs it, else as it is."""
    return x.astype(mx.float32) if wide() else x


def floats(x: mx.array) -> mx.array:
    """Scales in float32; those of the 8-bit float formats are codes and stay."""
    return x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x


BLOCK = 256
"""Columns that a CPU product sums at once in float32. MLX's kernels there add one term after the other, whose rounding
grows with the width (at 4096 ten times that of a blocked sum)."""

EXPERT_BLOCK = 64
"""The same for experts, whose rounding a router amplifies."""


def product(x: mx.array, weight: mx.array) -> mx.array:
    """`x @ weight.T`: [..., in] and [out, in] to [..., out], in the wider of both dtypes."""
    width = weight.shape[1]
    if width <= BLOCK or x.dtype != mx.float32 or not wide():
        return x @ weight.T
    parts = (slice(i, i + BLOCK) for i in range(0, width, BLOCK))
    return total(x[..., part] @ weight[:, part].T for part in parts)


def total(parts: Any) -> mx.array:
    """The sum of arrays."""
    first, *rest = parts
    for x in rest:
        first = first + x
    return first


class Linear(nn.Linear):
    """[..., in] -> [..., out] in the dtype of x, whatever the weight's is."""

    def __call__(self, x: mx.array) -> mx.array:
        y = product(x, self["weight"])
        return (y + self["bias"] if "bias" in self else y).astype(x.dtype)

    def to_quantized(self, *args: Any, **kwargs: Any) -> Any:
        return QuantizedLinear.from_linear(self, *args, **kwargs)


class QuantizedLinear(nn.QuantizedLinear):
    """The same with a quantized weight."""

    def __call__(self, x: mx.array) -> mx.array:
        y = quantized_product(self, x)
        return (y + self["bias"] if "bias" in self else y).astype(x.dtype)


class Embedding(nn.Embedding):
    """Token ids to rows; as a tied head, a product with the rows."""

    def as_linear(self, x: mx.array) -> mx.array:
        return product(x, self["weight"]).astype(x.dtype)

    def to_quantized(self, *args: Any, **kwargs: Any) -> Any:
        return QuantizedEmbedding.from_embedding(self, *args, **kwargs)


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """The same with a quantized table; rows come in float32, since codes times scales are exact there."""

    def __call__(self, x: mx.array) -> mx.array:
        biases = self.get("biases")
        return mx.dequantize(
            self["weight"][x],
            floats(self["scales"][x]),
            None if biases is None else floats(biases[x]),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            dtype=mx.float32,
        )

    def as_linear(self, x: mx.array) -> mx.array:
        return quantized_product(self, x).astype(x.dtype)


def quantized_product(w: Any, x: mx.array) -> mx.array:
    """`x @ weight.T` of a quantized layer; in float32 on devices that need it."""
    return in_blocks(mx.quantized_matmul, x, w, [w[n] for n in ("weight", "scales", "biases") if n in w], BLOCK)


def in_blocks(multiply: Any, x: mx.array, w: Any, arrays: list[mx.array], block: int, **how: Any) -> mx.array:
    """A product with a quantized layer's weight, scales and biases (if any), [..., out, n] each; in float32 on devices
    that need it, and there over `block` inputs, or a group, at a time."""

    def part(first: int, last: int) -> mx.array:
        packed = slice(first * w.bits // 32, last * w.bits // 32)
        groups = slice(first // w.group_size, last // w.group_size)
        own = [a[..., packed if i == 0 else groups] for i, a in enumerate(arrays)]
        return multiply(
            x[..., first:last], *own, transpose=True, group_size=w.group_size, bits=w.bits, mode=w.mode, **how
        )

    width, block = x.shape[-1], max(block, w.group_size)
    if not wide():
        return part(0, width)
    step = block if x.dtype == mx.float32 else width
    x, arrays = x.astype(mx.float32), [arrays[0], *(floats(a) for a in arrays[1:])]
    return total(part(i, min(i + step, width)) for i in range(0, width, step))


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis of `size`; the gain holds the offset already."""

    def __init__(self, norm: Any, size: int) -> None:
        super().__init__()
        self.kind, self.eps = norm.kind, norm.eps
        if norm.weight:
            self.weight = mx.ones((size,))
        if norm.bias:
            self.bias = mx.zeros((size,))

    def __call__(self, x: mx.array) -> mx.array:
        weight, bias = self.get("weight"), self.get("bias")
        h = widened(x)
        if self.kind == "layernorm":
            y = mx.fast.layer_norm(h, weight, bias, self.eps)
        else:
            y = mx.fast.rms_norm(h, weight, self.eps)
            y = y if bias is None else y + bias
        return y.astype(x.dtype)


class Scores(nn.Module):
    """[..., in] -> [..., out] in float32, whatever the dtype of x: what chooses experts, or weighs one."""

    def __init__(self, width: int, out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = mx.zeros((out, width))
        if bias:
            self.bias = mx.zeros((out,))

    def __call__(self, x: mx.array) -> mx.array:
        y = product(x.astype(mx.float32), self["weight"].astype(mx.float32))
        return y + self["bias"] if "bias" in self else y


class GroupedLinear(nn.Module):
    """The same linear of every expert, one below the other: weight [experts * out, in], bias [experts * out]."""

    def __init__(self, experts: int, width: int, out: int, bias: bool) -> None:
        super().__init__()
        self._experts = experts
        self.weight = mx.zeros((experts * out, width))
        if bias:
            self.bias = mx.zeros((experts * out,))

    def __call__(self, x: mx.array, owner: mx.array, ordered: bool) -> mx.array:
        """[N, 1, in] -> [N, 1, out] in the dtype of x: row n through expert owner[n]; `ordered`: they ascend."""
        y = self.product(x, owner, ordered)
        return (y + by_expert(self["bias"], self._experts)[owner][:, None] if "bias" in self else y).astype(x.dtype)

    def product(self, x: mx.array, owner: mx.array, ordered: bool) -> mx.array:
        """The products alone; in float32 where nothing else is there."""
        weight, width = by_expert(self["weight"], self._experts), x.shape[-1]
        step = EXPERT_BLOCK if wide() and x.dtype == mx.float32 else width
        x, weight = widened(x), widened(weight)
        return total(
            mx.gather_mm(
                x[..., i : i + step], weight[..., i : i + step].swapaxes(-1, -2), rhs_indices=owner,
                sorted_indices=ordered,
            )
            for i in range(0, width, step)
        )  # fmt: skip

    def to_quantized(self, group_size: int = 64, bits: int = 4, mode: str = "affine", **_: Any) -> Any:
        return QuantizedGroupedLinear(self, group_size, bits, mode)


class QuantizedGroupedLinear(GroupedLinear):
    """The same with quantized weights."""

    def __init__(self, plain: GroupedLinear, group_size: int, bits: int, mode: str) -> None:
        nn.Module.__init__(self)
        self._experts, self.group_size, self.bits, self.mode = plain._experts, group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(plain.weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        if "bias" in plain:
            self.bias = plain.bias

    def product(self, x: mx.array, owner: mx.array, ordered: bool) -> mx.array:
        """The products alone; in float32 on devices that need it."""
        arrays = [by_expert(self[n], self._experts) for n in ("weight", "scales", "biases") if n in self]
        how = {"rhs_indices": owner, "sorted_indices": ordered}
        return in_blocks(mx.gather_qmm, x, self, arrays, EXPERT_BLOCK, **how)


def by_expert(x: mx.array, experts: int) -> mx.array:
    """[experts * n, ...] as [experts, n, ...]."""
    return x.reshape(experts, -1, *x.shape[1:])


class TiedHead:
    """The embedding as a head, with a bias of its own if there is one."""

    def __init__(self, embedding: Any, bias: mx.array | None) -> None:
        self.embedding, self.bias = embedding, bias

    def __call__(self, x: mx.array) -> mx.array:
        y = self.embedding.as_linear(x)
        return y if self.bias is None else (y + self.bias).astype(x.dtype)
