"""The operations in ONNX's standard operators, opset 23 (24 for a cache of fixed length).

Shapes: B batch, T query, S key, D model, H q-heads, G kv-heads, K head dim, N and K rows and columns of a matrix.

Compute is float32 or a 16-bit type; norms, rotations, and attention where it is not one operator, are float32 always.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from backends import narrow
from backends.onnx import attention, mixture
from backends.onnx.builder import DTYPES, Builder
from backends.onnx.kernels import Kernel, kernel
from backends.onnx.layout import CODED, Layout, Stored
from spec.config import Activation, Attention, Block, MoE, Norm
from spec.levels import CODES, GROUPS
from spec.ops import Ops, Step
from spec.rope import RopeTable

X = ir.Value


@dataclass(frozen=True)
class Weight:
    """A weight handle: the canonical names of what the spec has of it, and its inputs' width."""

    weight: str | None = None
    bias: str | None = None
    size: int = 0
    correction: str | None = None
    """Of a router: added to scores for the choice."""
    experts: int = 0
    """How many lie one below the other in it; 0 where it is no mixture's."""
    expert: X | None = None
    """Which of them it stands for, a scalar; none for all."""


@dataclass(frozen=True)
class Past:
    """One layer's cache on its way through the graph: [B, G, S, K] each."""

    key: X
    value: X


@dataclass(frozen=True)
class Rotation:
    """A rotary table, [P, dim / 2] each."""

    cos: X
    sin: X
    dim: int


@dataclass(frozen=True)
class Keys:
    """Where the keys of a step lie."""

    slots: X
    """[B, S] or [1, S] int64: slot of each in its sequence."""
    real: X | None = None
    """[B, S] bool: what is no padding; none where there is no padding."""
    place: X | None = None
    """[1, S] int64: place in the cache, where padding takes places too."""
    own: X | None = None
    """[1, T] int64: places of the queries."""
    mask: X | None = None
    """[B, S] int64: the attention mask as it came in."""
    write_indices: X | None = None
    """[B] int64: slots that are filled already, in caches of fixed length; none where caches grow."""
    length: X | None = None
    """[1] int64: how many slots of a cache of fixed length are attended to."""


class PortableOps(Ops[X, Weight, Past]):
    """`rows_first`: quantized embedding rows are looked up as codes and then dequantized. Otherwise the table is
    dequantized and then looked up: TensorRT's way, which ONNX Runtime would go through in every step. `loops`: experts
    that are called for are run one by one; otherwise all of them at once, which is TensorRT's way too."""

    def __init__(self, g: Builder, layout: Layout, keys: Keys, rows_first: bool = True, loops: bool = True) -> None:
        self.g, self.layout, self.compute, self.keys = g, layout, layout.compute, keys
        self.rows_first, self.loops = rows_first, loops
        self.masks: dict[int | None, X] = {}
        self._turns: dict[X, tuple[X, X]] = {}
        self._matrices: dict[str, X] = {}

    # Types and constants

    def to(self, x: X, dtype: str) -> X:
        """A cast."""
        return self.g("Cast", x, to=int(DTYPES[dtype]))

    def widen(self, x: X) -> X:
        """From the compute type to float32."""
        return x if self.compute == "f32" else self.to(x, "f32")

    def narrow(self, x: X) -> X:
        """From float32 to the compute type."""
        return x if self.compute == "f32" else self.to(x, self.compute)

    def number(self, value: float, dtype: str | None = None) -> X:
        """A scalar, of the compute type unless said otherwise."""
        return self.g.constant(value, dtype or self.compute)

    def vector(self, name: str, experts: int | None = None) -> X:
        """A tensor that is no codes as it is stored (a bias, gain, sink or slope: float32); that of `experts` as
        [E, ...]."""
        t = self.layout.tensors[name]
        return self.g.stored(t) if experts is None else self.stacked(t, experts)

    def stacked(self, t: Stored, experts: int) -> X:
        """Experts' rows, which lie one below the other, as [E, N, ...]."""
        shape = (experts, t.shape[0] // experts, *t.shape[1:])
        return self.g.stored(t, (f"{t.name}.experts", t.dtype, shape))

    # Into and out of the residual stream

    def embed(self, ids: X, w: Weight, offset: int = 0) -> X:
        assert w.weight is not None
        rows = self.g("Add", ids, self.number(offset, "i64")) if offset else ids
        level = self.layout.levels[w.weight]
        if level in CODED:
            first = self.rows_first and level in CODES
            return self.looked_up(w.weight, rows) if first else self.gather(self.dequantized(w.weight), rows)
        x = self.gather(self.vector(w.weight), rows)
        return x if level == self.compute else self.to(x, self.compute)

    def gather(self, table: X, rows: X) -> X:
        """Rows of a table."""
        return self.g("Gather", table, rows, axis=0)

    def looked_up(self, name: str, rows: X) -> X:
        """Rows [B, T] of a quantized matrix, dequantized: [B, T, K]."""
        g = self.g
        codes, scales = self.layout.parts(name)
        groups, level = scales.shape[-1], self.layout.levels[name]
        if CODES[level] == 8:
            found = self.to(self.gather(g.stored(codes), rows), self.compute)
        else:  # there is no int4 Gather: bytes are looked up, then taken apart, low code first
            view = f"{codes.name}.bytes", "u8", (codes.shape[0], codes.shape[1] // 2)
            pairs = g("Unsqueeze", self.gather(g.stored(codes, view), rows), g.ints(-1))
            low = g("BitwiseAnd", pairs, g.constant(15, "u8"))
            high = g("BitShift", pairs, g.constant(4, "u8"), direction="RIGHT")
            raised = g("BitwiseXor", g("Concat", low, high, axis=-1), g.constant(8, "u8"))  # the signed code + 8
            found = g("Sub", self.to(raised, self.compute), self.number(8))
        grouped = g("Reshape", found, g.ints(0, 0, groups, GROUPS[level]))
        each = g("Unsqueeze", self.gather(g.stored(scales), rows), g.ints(-1))
        return g("Reshape", g("Mul", grouped, each), g.ints(0, 0, groups * GROUPS[level]))

    def dequantized(self, name: str) -> X:
        """A whole quantized matrix [N, K] in the compute type."""
        level = self.layout.levels[name]
        codes, scales, *whole = (self.g.stored(t) for t in self.layout.parts(name))
        if level == "fp8":
            return self.g("DequantizeLinear", codes, scales, axis=0)
        if level == "nvfp4":
            each = self.g("DequantizeLinear", scales, *whole)
            w = self.g("DequantizeLinear", codes, each, axis=1, block_size=narrow.BLOCK)
            return self.narrow(w)  # float32 so far, as NVIDIA's own tools write it
        return self.g("DequantizeLinear", codes, scales, axis=1, block_size=GROUPS[level])

    def matrix(self, name: str) -> X:
        """A whole matrix [K, N] in the compute type."""
        if name not in self._matrices:
            level = self.layout.levels[name]
            w = self.dequantized(name) if level in CODED else self.vector(name)
            w = w if level in (*CODED, self.compute) else self.to(w, self.compute)
            self._matrices[name] = self.g("Transpose", w, perm=[1, 0])
        return self._matrices[name]

    def linear(self, x: X, w: Weight) -> X:
        assert w.weight is not None
        if w.experts:
            return mixture.linear(self, x, w)
        if self.layout.levels[w.weight] == "f32" != self.compute:
            return self.narrow(self.wide_linear(x, w))
        y = self.g("MatMul", x, self.matrix(w.weight))
        return y if w.bias is None else self.add(y, self.narrow(self.vector(w.bias)))

    def wide_linear(self, x: X, w: Weight) -> X:
        """A product in float32 with weights that are: routers."""
        assert w.weight is not None
        y = self.g("MatMul", self.widen(x), self.g("Transpose", self.vector(w.weight), perm=[1, 0]))
        return y if w.bias is None else self.g("Add", y, self.vector(w.bias))

    def unembed(self, x: X, w: Weight) -> X:
        return self.linear(x, w)

    def last(self, x: X, step: Step[X]) -> X:
        g = self.g
        return g("Slice", x, g.ints(-1), g.ints(np.iinfo(np.int64).max), g.ints(1))

    # Element by element

    def norm(self, x: X, w: Weight, norm: Norm) -> X:
        bias = None if w.bias is None else self.vector(w.bias)
        return self.narrow(self.normed(self.widen(x), self.gain(w, norm), bias, norm))

    def gain(self, w: Weight, norm: Norm) -> X:
        """The effective gain [D], float32."""
        if w.weight is None:
            return self.g.constant(np.ones(w.size), "f32")
        gain = self.vector(w.weight)
        return self.g("Add", gain, self.number(norm.offset, "f32")) if norm.offset else gain

    def normed(self, x: X, gain: X, bias: X | None, norm: Norm) -> X:
        """The norm itself, in float32."""
        if norm.kind == "layernorm":
            return self.g("LayerNormalization", x, gain, bias, axis=-1, epsilon=norm.eps)
        y = self.g("RMSNormalization", x, gain, axis=-1, epsilon=norm.eps)
        return y if bias is None else self.g("Add", y, bias)

    def act(self, x: X, kind: Activation) -> X:
        return ACTIVATIONS[kind](self, x)

    def add(self, x: X, y: X) -> X:
        return self.g("Add", x, y)

    def mul(self, x: X, y: X) -> X:
        return self.g("Mul", x, y)

    def scale(self, x: X, factor: float) -> X:
        return self.with_numbers(lambda y, f: self.g("Mul", y, f), x, factor)

    def softcap(self, x: X, cap: float) -> X:
        return self.with_numbers(self.capped, x, cap)

    def capped(self, x: X, cap: X) -> X:
        """`cap * tanh(x / cap)` in any type."""
        return self.mul(self.g("Tanh", self.g("Div", x, cap)), cap)

    def clip(self, x: X, low: float | None, high: float | None) -> X:
        return self.with_numbers(lambda y, *ends: self.g("Clip", y, *ends), x, low, high)

    def with_numbers(self, f: Callable[..., X], x: X, *values: float | None) -> X:
        """`f(x, *values)` in the compute type where it holds these numbers exactly, else in float32."""
        exact = all(v is None or self.number(v).const_value.numpy() == np.float32(v) for v in values)  # type: ignore[union-attr]
        dtype = self.compute if exact else "f32"
        numbers = [None if v is None else self.number(v, dtype) for v in values]
        return f(x, *numbers) if exact else self.narrow(f(self.widen(x), *numbers))

    def cast(self, x: X) -> X:
        return x  # looking rows up has brought them to the compute type

    # Heads and attention

    def split_heads(self, x: X, head_dim: int) -> X:
        return self.g("Transpose", self.g("Reshape", x, self.g.ints(0, 0, -1, head_dim)), perm=[0, 2, 1, 3])

    def merge_heads(self, x: X) -> X:
        return self.g("Reshape", self.g("Transpose", x, perm=[0, 2, 1, 3]), self.g.ints(0, 0, -1))

    def rotation(self, table: RopeTable, step: Step[X]) -> Rotation:
        k = len(self._turns)
        cos, sin = (self.vector(f"rope.{k}.{part}") for part in ("cos", "sin"))
        self._turns[cos] = self.gather(cos, step.positions), self.gather(sin, step.positions)  # [B, T, dim / 2]
        return Rotation(cos, sin, table.dim)

    def rope(self, x: X, rotation: Rotation) -> X:
        cos, sin = self._turns[rotation.cos]
        return self.narrow(
            self.g("RotaryEmbedding", self.widen(x), cos, sin, interleaved=0, rotary_embedding_dim=rotation.dim)
        )

    def store(self, k: X, v: X, step: Step[X], cache: Past | None) -> tuple[X, X, Keys, Past | None]:
        assert cache is not None, "the graph has a cache"
        g, keys = self.g, self.keys
        if keys.write_indices is None:
            key, value = g("Concat", cache.key, k, axis=2), g("Concat", cache.value, v, axis=2)
            return key, value, keys, Past(key, value)
        assert keys.length is not None
        key = g("TensorScatter", cache.key, k, keys.write_indices, axis=-2, mode="linear")
        value = g("TensorScatter", cache.value, v, keys.write_indices, axis=-2, mode="linear")
        whole = (g.ints(0), keys.length, g.ints(2))
        return g("Slice", key, *whole), g("Slice", value, *whole), keys, Past(key, value)

    def mix(self, q: X, k: X, v: X, step: Step[X], key_slots: Keys, a: Attention, w: Any) -> X:
        visible = attention.visible(self, step.slots, a.window)
        whole = kernel(a, "portable", self.compute) is Kernel.ATTENTION
        run = attention.operator if whole else attention.decomposed
        return self.tap(run(self, q, k, v, visible, step.slots, a, w), "attn.heads")

    # Mixture of experts

    def route(self, x: X, w: Weight, m: MoE) -> tuple[X, X]:
        return mixture.route(self, x, w, m)

    def experts(self, x: X, routes: tuple[X, X], w: Any, m: MoE) -> X:
        return (mixture.looped if self.loops else mixture.every)(self, x, routes, w, m)

    def gate(self, x: X, y: X) -> X:
        return self.narrow(self.g("Mul", self.widen(x), self.g("Sigmoid", self.widen(y))))

    # Structure

    def call(
        self, i: int, b: Block, w: Any, x: X, step: Step[X], rotation: Rotation | None, cache: Past | None
    ) -> tuple[X, Past | None]:
        self.g.scope = f"L{i}."
        try:
            return super().call(i, b, w, x, step, rotation, cache)
        finally:
            self.g.scope = ""

    def tap(self, x: X, name: str) -> X:
        return self.g.name(x, name)


def _sigmoid_gated(ops: PortableOps, x: X, slope: float) -> X:
    return ops.mul(x, ops.g("Sigmoid", x if slope == 1 else ops.scale(x, slope)))


def _squared_relu(ops: PortableOps, x: X) -> X:
    y = ops.g("Relu", x)
    return ops.mul(y, y)


ACTIVATIONS: dict[Activation, Callable[[PortableOps, X], X]] = {
    "silu": lambda ops, x: _sigmoid_gated(ops, x, 1.0),
    "gelu": lambda ops, x: ops.g("Gelu", x, approximate="none"),
    "gelu_tanh": lambda ops, x: ops.g("Gelu", x, approximate="tanh"),
    "quick_gelu": lambda ops, x: _sigmoid_gated(ops, x, 1.702),
    "relu": lambda ops, x: ops.g("Relu", x),
    "relu2": _squared_relu,
}
