"""The decoder's vocabulary as a MIL program. Every operation is named after the layer and the tap that it leads to.

Shapes: T query, S key (past and new), D model, H q-heads, G kv-heads, R = H / G, K head dim, V vocab; the batch is 1.

With float16 compute the residual stream, the products and their weights, and attention are float16, and each other
operation of the forward pass works in float32 and is rounded once: norms (whose squares would overflow float16 from
256 on), rotations, softcaps, factors, and attention wherever the fused operation does not do (softcap, ALiBi, sinks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from backends.base import Floats, QuantizedTensor
from backends.coreml import names
from backends.coreml.library import coremltools
from backends.coreml.palettes import Palette
from backends.coreml.support import COUNTER
from spec.config import Activation, Attention, Block, Norm
from spec.ops import Ops, Step
from spec.rope import RopeTable

Var = Any
"""A value of the program (`coremltools...Var`)."""


@dataclass(frozen=True, eq=False)
class Half:
    """Rows stored as float16."""

    values: Any


Tensor = Floats | Half | QuantizedTensor | Palette
"""A weight as it will be stored."""


@dataclass
class Handle:
    """Canonical names of a weight's tensors, none where the spec has none."""

    weight: str | None = None
    bias: str | None = None


@dataclass
class Cache:
    """One layer's part of the states, which are passed along from layer to layer through the program's own order."""

    layer: int
    keys: Var
    values: Var


@dataclass
class Clock:
    """What the position state says: tokens before this call and after it, int32 [1]."""

    past: Var
    end: Var
    queries: Var
    """Positions of the new tokens, [1, T]."""
    keys: Var
    """Positions 0..S-1, [S]."""
    masks: dict[Any, Var] = field(default_factory=dict)


class MILOps(Ops[Var, Handle, Cache]):
    """Builds one function. tensors: every canonical tensor as stored. compute: `f16` or `f32`. fused: whether
    attention may be the one operation that MIL has for it."""

    def __init__(self, tensors: Mapping[str, Tensor], compute: str, fused: bool = True) -> None:
        coremltools()
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import types

        self._mb, self._types = Builder, types
        self._tensors, self.half, self.fused = tensors, compute == "f16", fused
        self._constants: dict[str, Var] = {}
        self._scope, self._count, self._tables = "", 0, 0
        self.clock: Clock | None = None

    # Names, constants, dtypes

    def _op(self, kind: str, **args: Any) -> Var:
        """One operation with a name of its own, which `tap` replaces."""
        self._count += 1
        return getattr(self._mb, kind)(**args, name=f"{self._scope}{kind}_{self._count}")

    def tap(self, x: Var, name: str) -> Var:
        name = (self._scope + name).replace(".", "_")
        x.set_name(name)
        x.op.name = name
        return x

    def _wide(self, x: Var) -> Var:
        """As float32."""
        return self._op("cast", x=x, dtype="fp32") if x.dtype is self._types.fp16 else x

    def _narrow(self, x: Var) -> Var:
        """As the compute dtype: where an operation of the forward pass is rounded."""
        return self._op("cast", x=x, dtype="fp16") if self.half else x

    def _island(self, run: Callable[[Var], Var], x: Var) -> Var:
        return self._narrow(run(self._wide(x)))

    def _number(self, x: Var, value: float) -> Any:
        return (np.float16 if x.dtype is self._types.fp16 else np.float32)(value)

    def constant(self, name: str, value: Any) -> Var:
        """A constant that is in the program once."""
        if name not in self._constants:
            self._constants[name] = self._mb.const(val=value, name=name)
        return self._constants[name]

    def _matrix(self, canonical: str) -> Var:
        """A weight in the compute dtype, compressed where it is."""
        name = names.mil_name(canonical)
        if name not in self._constants:
            self._constants[name] = self._stored(name, self._tensors[canonical])
        return self._constants[name]

    def _stored(self, name: str, t: Tensor) -> Var:
        dtype = np.float16 if self.half else np.float32
        match t:
            case QuantizedTensor():
                kind = self._types.np_int4_dtype if t.bits == 4 else np.int8
                data, scale = t.codes.astype(kind), t.scales.astype(dtype)
                return self._mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=name)
            case Palette():
                kind = {4: self._types.np_uint4_dtype, 6: self._types.np_uint6_dtype, 8: np.uint8}[t.bits]
                lut = t.tables.astype(dtype)[:, None, :, None]
                return self._mb.constexpr_lut_to_dense(indices=t.indices.astype(kind), lut=lut, name=name)
            case Half() if not self.half:
                return self._mb.constexpr_cast(source_val=t.values, output_dtype="fp32", name=name)
            case Half():
                return self._mb.const(val=t.values, name=name)
            case _:
                assert not self.half, f"{name}: float32 weights in a float16 program"
                return self._mb.const(val=t, name=name)

    def _vector(self, canonical: str, wide: bool) -> Var:
        """A vector: float32 inside norms and attention, in the compute dtype as a bias."""
        t = self._tensors[canonical]
        assert isinstance(t, np.ndarray), f"{canonical} is a vector"
        return self.constant(names.mil_name(canonical), t if wide or not self.half else t.astype(np.float16))

    # Into and out of the residual stream

    def embed(self, ids: Var, w: Handle, offset: int = 0) -> Var:
        assert w.weight is not None
        rows = self._op("add", x=ids, y=np.int32(offset)) if offset else ids
        return self._op("gather", x=self._matrix(w.weight), indices=rows, axis=0, validate_indices=False)

    def linear(self, x: Var, w: Handle) -> Var:
        assert w.weight is not None
        bias = {} if w.bias is None else {"bias": self._vector(w.bias, wide=False)}
        return self._op("linear", x=x, weight=self._matrix(w.weight), **bias)

    def unembed(self, x: Var, w: Handle) -> Var:
        return self.linear(x, w)

    def last(self, x: Var, step: Step[Var]) -> Var:
        masks = {"begin_mask": [True, False, True], "end_mask": [True, True, True]}
        return self._op("slice_by_index", x=x, begin=[0, -1, 0], end=[0, 0, 0], **masks)

    # Element by element

    def norm(self, x: Var, w: Handle, norm: Norm) -> Var:
        """In float32: the square of a float16 overflows from 256 on."""
        x = self._wide(x)
        if norm.kind == "layernorm":
            x = self._op("sub", x=x, y=self._op("reduce_mean", x=x, axes=[-1], keep_dims=True))
        mean = self._op("reduce_mean", x=self._op("square", x=x), axes=[-1], keep_dims=True)
        y = self._op("mul", x=x, y=self._op("rsqrt", x=mean, epsilon=np.float32(norm.eps)))
        if w.weight is not None:
            gained = self._op("mul", x=y, y=self._vector(w.weight, wide=True))
            if norm.offset:  # y (w + offset), and the stored gain stays the source's
                more = y if norm.offset == 1 else self._op("mul", x=y, y=np.float32(norm.offset))
                gained = self._op("add", x=gained, y=more)
            y = gained
        if w.bias is not None:
            y = self._op("add", x=y, y=self._vector(w.bias, wide=True))
        return self._narrow(y)

    def act(self, x: Var, kind: Activation) -> Var:
        match kind:
            case "silu" | "relu":
                return self._op(kind, x=x)
            case "gelu":
                return self._op("gelu", x=x, mode="EXACT")
            case "gelu_tanh":
                return self._op("gelu", x=x, mode="TANH_APPROXIMATION")
            case "relu2":
                return self._op("square", x=self._op("relu", x=x))
            case "quick_gelu":
                return self._island(self._quick_gelu, x)
        raise AssertionError(kind)

    def _quick_gelu(self, x: Var) -> Var:
        gate = self._op("sigmoid", x=self._op("mul", x=x, y=np.float32(1.702)))
        return self._op("mul", x=x, y=gate)

    def add(self, x: Var, y: Var) -> Var:
        return self._op("add", x=x, y=y)

    def mul(self, x: Var, y: Var) -> Var:
        return self._op("mul", x=x, y=y)

    def scale(self, x: Var, factor: float) -> Var:
        if math.frexp(factor)[0] == 0.5:  # a power of two is exact in float16
            return self._op("mul", x=x, y=self._number(x, factor))
        return self._island(lambda t: self._op("mul", x=t, y=np.float32(factor)), x)

    def softcap(self, x: Var, cap: float) -> Var:
        return self._island(lambda t: self._softcap(t, cap), x)

    def _softcap(self, x: Var, cap: float) -> Var:
        y = self._op("tanh", x=self._op("mul", x=x, y=np.float32(1 / cap)))
        return self._op("mul", x=y, y=np.float32(cap))

    def clip(self, x: Var, low: float | None, high: float | None) -> Var:
        if high is not None:
            x = self._op("minimum", x=x, y=self._number(x, high))
        return x if low is None else self._op("maximum", x=x, y=self._number(x, low))

    def cast(self, x: Var) -> Var:
        return x

    # Heads and attention

    def split_heads(self, x: Var, head_dim: int) -> Var:
        apart = self._op("reshape", x=x, shape=[1, -1, x.shape[-1] // head_dim, head_dim])
        return self._op("transpose", x=apart, perm=[0, 2, 1, 3])

    def merge_heads(self, x: Var) -> Var:
        y = self._op("transpose", x=x, perm=[0, 2, 1, 3])
        return self._op("reshape", x=y, shape=[1, -1, x.shape[1] * x.shape[3]])

    def rotation(self, table: RopeTable, step: Step[Var]) -> tuple[Var, Var]:
        """Rows of the tables [context, dim / 2], in float32: [1, 1, T, dim / 2]."""
        out = []
        for name in names.rope_names(self._tables):
            rows = self._op("gather", x=self.constant(name, self._tensors[name]), indices=step.positions, axis=0,
                            validate_indices=False)  # fmt: skip
            out.append(self._op("expand_dims", x=rows, axes=[1]))
        self._tables += 1
        return out[0], out[1]

    def rope(self, x: Var, rotation: tuple[Var, Var]) -> Var:
        cos, sin = rotation
        half, width = cos.shape[-1], x.shape[-1]
        sizes = [half, half, *([width - 2 * half] if width > 2 * half else [])]
        a, b, *rest = self._op("split", x=x, split_sizes=sizes, axis=-1)
        a, b = self._wide(a), self._wide(b)
        turned = [
            self._op("sub", x=self._op("mul", x=a, y=cos), y=self._op("mul", x=b, y=sin)),
            self._op("add", x=self._op("mul", x=b, y=cos), y=self._op("mul", x=a, y=sin)),
        ]
        return self._op("concat", values=[*map(self._narrow, turned), *rest], axis=-1)

    def store(self, k: Var, v: Var, step: Step[Var], cache: Cache | None) -> tuple[Var, Var, Any, Cache | None]:
        assert cache is not None and self.clock is not None
        k, v = (self._update(state, x, cache.layer) for state, x in ((cache.keys, k), (cache.values, v)))
        return k, v, self.clock.keys, cache

    def _update(self, state: Var, x: Var, layer: int) -> Var:
        """Write the new rows of a layer and read all rows so far: [1, G, T, K] -> [1, G, S, K]."""
        assert self.clock is not None
        _, g, _, k = x.shape
        held = state.sym_type.wrapped_type().get_shape()
        if not self.half:
            x = self._op("cast", x=x, dtype="fp16")
        first, last = np.array([layer, 0, 0], np.int32), np.array([layer + 1, 1, g], np.int32)
        end = self._op("concat", values=[last, self.clock.end, np.array([k], np.int32)], axis=0)
        begin = self._op("concat", values=[first, self.clock.past, np.array([0], np.int32)], axis=0)
        whole = self._op("slice_update", x=self._op("read_state", input=state),
                         update=self._op("expand_dims", x=x, axes=[0]), begin=begin, end=end)  # fmt: skip
        kept = self._op("coreml_update_state", state=state, value=whole)
        # masks, where an axis is taken whole, keep its size known
        rows = self._op("slice_by_index", x=kept, begin=[layer, 0, 0, 0, 0], end=end,
                        begin_mask=[False, True, True, True, True], end_mask=[False, True, True, False, True],
                        squeeze_mask=[True, False, False, False, False])  # fmt: skip
        if (g, k) != (held[2], held[4]):
            rows = self._op("slice_by_index", x=rows, begin=[0, 0, 0, 0], end=[1, g, 0, k],
                            end_mask=[False, False, True, False])  # fmt: skip
        return rows if self.half else self._wide(rows)

    def mix(self, q: Var, k: Var, v: Var, step: Step[Var], key_slots: Any, a: Attention, w: Any) -> Var:
        """The heads of a group share keys and values, so they stand in a row as queries: nothing is copied."""
        plain = a.softcap is None and w.slopes is None and w.sinks is None
        out = (self._fused if plain and self.fused else self._composed)(q, k, v, a, w)
        return self.tap(out, "attn.heads")

    def _fused(self, q: Var, k: Var, v: Var, a: Attention, w: Any) -> Var:
        _, h, _, dim = q.shape
        g = k.shape[1]
        factor = (a.scale or 1.0) * math.sqrt(dim)  # the operation itself divides by sqrt(K)
        q = q if math.isclose(factor, 1.0, rel_tol=1e-12) else self.scale(q, factor)
        rows = self._op("reshape", x=q, shape=[1, g, -1, dim])
        mask = self._mask(a.window, h // g)
        y = self._op("scaled_dot_product_attention", query=rows, key=k, value=v, attn_mask=mask)
        return self._op("reshape", x=y, shape=[1, h, -1, dim])

    def _composed(self, q: Var, k: Var, v: Var, a: Attention, w: Any) -> Var:
        """Scores and softmax in float32: [G, R, T, S]."""
        _, h, _, dim = q.shape
        g = k.shape[1]
        q = self._op("reshape", x=self._wide(q), shape=[g, h // g, -1, dim])
        k, v = (self._op("transpose", x=self._wide(x), perm=[1, 0, 2, 3]) for x in (k, v))
        s = self._op("matmul", x=q, y=k, transpose_y=True)
        s = self._op("mul", x=s, y=np.float32(a.scale or 1.0))
        if a.softcap is not None:
            s = self._softcap(s, a.softcap)
        if w.slopes is not None:
            slopes = self.constant(w.slopes, np.float32(self._tensors[w.slopes]).reshape(g, h // g, 1, 1))
            s = self._op("sub", x=s, y=self._op("mul", x=self._distance(wide=True), y=slopes))
        s = self._op("select", cond=self._mask(a.window, 1), a=s, b=np.float32(-1e30))
        if w.sinks is None:
            p = self._op("softmax", x=s, axis=-1)
        else:
            sinks = self.constant(names.mil_name(w.sinks), np.float32(self._tensors[w.sinks]).reshape(g, h // g, 1, 1))
            top = self._op("maximum", x=self._op("reduce_max", x=s, axes=[-1], keep_dims=True), y=sinks)
            e = self._op("exp", x=self._op("sub", x=s, y=top))
            own = self._op("exp", x=self._op("sub", x=sinks, y=top))
            total = self._op("add", x=self._op("reduce_sum", x=e, axes=[-1], keep_dims=True), y=own)
            p = self._op("real_div", x=e, y=total)
        y = self._narrow(self._op("matmul", x=p, y=v))
        return self._op("reshape", x=y, shape=[1, h, -1, dim])

    # The position, and what follows from it

    def start(self, ids: Var, position: Var) -> Step[Var]:
        """Read the position state, advance it, and set the clock. ids [1, T]."""
        self._scope = "position_"
        count = self._op("slice_by_index", x=self._op("shape", x=ids), begin=[1], end=[2])
        past = self._op("cast", x=self._op("read_state", input=position), dtype="int32")
        two = position.sym_type.wrapped_type().get_shape()[0] == 2
        if two:  # tokens % COUNTER and tokens // COUNTER
            parts = self._op("mul", x=past, y=np.array([1, COUNTER], np.int32))
            past = self._op("reduce_sum", x=parts, axes=[0], keep_dims=True)
        end = self._op("add", x=past, y=count)
        now = end
        if two:
            low = self._op("mod", x=end, y=np.int32(COUNTER))
            high = self._op("floor_div", x=end, y=np.int32(COUNTER))
            now = self._op("concat", values=[low, high], axis=0)
        self._op("coreml_update_state", state=position, value=self._op("cast", x=now, dtype="fp16"))
        queries = self._op("add", x=self._range(count), y=past)
        self.clock = Clock(past, end, self._op("expand_dims", x=queries, axes=[0]), self._range(end))
        self._scope = ""
        return Step("cached", self.clock.queries, self.clock.queries)

    def _range(self, length: Var) -> Var:
        """int32 0..length-1."""
        end = self._op("squeeze", x=length)
        return self._op("range_1d", start=np.int32(0), end=end, step=np.int32(1))

    def _distance(self, wide: bool = False) -> Var:
        """How far each key lies before each query: [1, 1, T, S]."""
        clock = self.clock
        assert clock is not None
        if "distance" not in clock.masks:
            query = self._op("expand_dims", x=clock.queries, axes=[1, 3])
            key = self._op("expand_dims", x=clock.keys, axes=[0, 1, 2])
            clock.masks["distance"] = self._op("sub", x=query, y=key)
        if wide and "wide" not in clock.masks:
            clock.masks["wide"] = self._op("cast", x=clock.masks["distance"], dtype="fp32")
        return clock.masks["wide" if wide else "distance"]

    def _mask(self, window: int | None, repeat: int) -> Var:
        """What each query sees, once for each window: bool [1, 1, repeat * T, S]."""
        assert self.clock is not None
        masks = self.clock.masks
        if (window, repeat) not in masks:
            if repeat > 1:
                masks[window, repeat] = self._op("tile", x=self._mask(window, 1), reps=[1, 1, repeat, 1])
            else:
                distance = self._distance()
                seen = self._op("greater_equal", x=distance, y=np.int32(0))
                if window is not None:
                    near = self._op("less", x=distance, y=np.int32(window))
                    seen = self._op("logical_and", x=seen, y=near)
                masks[window, repeat] = seen
        return masks[window, repeat]

    # Structure

    def call(
        self, i: int, b: Block, w: Any, x: Var, step: Step[Var], rotation: Any, cache: Cache | None
    ) -> tuple[Var, Cache | None]:
        self._scope = f"L{i}_"
        try:
            return super().call(i, b, w, x, step, rotation, cache)
        finally:
            self._scope = ""
