"""The decoder's vocabulary as a MIL program. Every operation is named after the layer and the tap that it leads to.

Shapes: T query, S key (past and new), D model, H q-heads, G kv-heads, R = H / G, K head dim, V vocab, E experts, k of
them a token's; the batch is 1.

With float16 compute the residual stream, the products and their weights, and attention are float16, and each other
operation of the forward pass works in float32 and is rounded once: norms (whose squares would overflow float16 from
256 on), rotations, softcaps, factors, and attention wherever the fused operation does not do (softcap, ALiBi, sinks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from backends.coreml import names
from backends.coreml.clock import Clock
from backends.coreml.emitter import Emitter, Var
from spec.config import Activation, Attention, Block, MoE, Norm
from spec.forward import dense
from spec.ops import Ops, Step
from spec.rope import RopeTable


@dataclass
class Handle:
    """Canonical names of a weight's tensors, none where the spec has none."""

    weight: str | None = None
    bias: str | None = None
    correction: str | None = None
    """Of a router: added to scores for the choice."""
    experts: int = 0
    """How many lie one below the other in it; 0 where it is no mixture's."""
    chosen: Var = None
    """[k] which of them it stands for; none for all."""


@dataclass
class Cache:
    """One layer's part of the states."""

    layer: int
    keys: Var
    values: Var


def in_half(value: float) -> bool:
    """Whether float16 holds a number exactly."""
    with np.errstate(over="ignore"):
        return float(np.float16(value)) == value


class MILOps(Ops[Var, Handle, Cache]):
    """Builds one function. fused: whether attention may be the one operation that MIL has for it."""

    def __init__(self, emit: Emitter, clock: Clock, fused: bool = True) -> None:
        self.emit, self.clock, self.fused = emit, clock, fused
        self._tables = 0

    def _number(self, x: Var, value: float) -> Any:
        """A constant in the dtype of x."""
        return (np.float16 if self.emit.is_half(x) else np.float32)(value)

    # Into and out of the residual stream

    def embed(self, ids: Var, w: Handle, offset: int = 0) -> Var:
        assert w.weight is not None
        rows = self.emit.op("add", x=ids, y=np.int32(offset)) if offset else ids
        return self.emit.op("gather", x=self.emit.matrix(w.weight), indices=rows, axis=0, validate_indices=False)

    def linear(self, x: Var, w: Handle) -> Var:
        assert w.weight is not None
        if w.experts:
            return self._every(x, w)
        if self.emit.half and self.emit.is_float32(w.weight):  # what chooses or gates
            return self.emit.narrow(self._wide_linear(x, w))
        bias = {} if w.bias is None else {"bias": self.emit.vector(w.bias, wide=False)}
        return self.emit.op("linear", x=x, weight=self.emit.matrix(w.weight), **bias)

    def _wide_linear(self, x: Var, w: Handle) -> Var:
        """In float32, with weights that are."""
        assert w.weight is not None
        bias = {} if w.bias is None else {"bias": self.emit.vector(w.bias)}
        table = self.emit.constant(names.mil_name(w.weight), self.emit.array(w.weight))
        return self.emit.op("linear", x=self.emit.wide(x), weight=table, **bias)

    def _every(self, x: Var, w: Handle) -> Var:
        """Every expert's product, or those chosen: [1 or E, T, K] -> [E, T, N]."""
        assert w.weight is not None
        table = self.emit.matrix(w.weight, w.experts)
        bias = None if w.bias is None else self.emit.vector(w.bias, wide=False, shape=(w.experts, 1, -1))
        if w.chosen is not None:
            table, bias = (None if t is None else self._pick(t, w.chosen) for t in (table, bias))
        y = self.emit.op("matmul", x=x, y=table, transpose_y=True)
        return y if bias is None else self.emit.op("add", x=y, y=bias)

    def _pick(self, table: Var, rows: Var) -> Var:
        return self.emit.op("gather", x=table, indices=rows, axis=0, validate_indices=False)

    def unembed(self, x: Var, w: Handle) -> Var:
        return self.linear(x, w)

    def last(self, x: Var, step: Step[Var]) -> Var:
        masks = {"begin_mask": [True, False, True], "end_mask": [True, True, True]}
        return self.emit.op("slice_by_index", x=x, begin=[0, -1, 0], end=[0, 0, 0], **masks)

    # Element by element

    def norm(self, x: Var, w: Handle, norm: Norm) -> Var:
        """In float32: the square of a float16 overflows from 256 on."""
        x = self.emit.wide(x)
        if norm.kind == "layernorm":
            x = self.emit.op("sub", x=x, y=self.emit.op("reduce_mean", x=x, axes=[-1], keep_dims=True))
        mean = self.emit.op("reduce_mean", x=self.emit.op("square", x=x), axes=[-1], keep_dims=True)
        y = self.emit.op("mul", x=x, y=self.emit.op("rsqrt", x=mean, epsilon=np.float32(norm.eps)))
        if w.weight is not None:
            gained = self.emit.op("mul", x=y, y=self.emit.vector(w.weight))
            if norm.offset:  # y (w + offset), and the stored gain stays the source's
                more = y if norm.offset == 1 else self.emit.op("mul", x=y, y=np.float32(norm.offset))
                gained = self.emit.op("add", x=gained, y=more)
            y = gained
        if w.bias is not None:
            y = self.emit.op("add", x=y, y=self.emit.vector(w.bias))
        return self.emit.narrow(y)

    def act(self, x: Var, kind: Activation) -> Var:
        match kind:
            case "silu" | "relu":
                return self.emit.op(kind, x=x)
            case "gelu":
                return self.emit.op("gelu", x=x, mode="EXACT")
            case "gelu_tanh":
                return self.emit.op("gelu", x=x, mode="TANH_APPROXIMATION")
            case "relu2":
                return self.emit.op("square", x=self.emit.op("relu", x=x))
            case "quick_gelu":
                return self.emit.island(self._quick_gelu, x)
        raise AssertionError(kind)

    def _quick_gelu(self, x: Var) -> Var:
        gate = self.emit.op("sigmoid", x=self.emit.op("mul", x=x, y=np.float32(1.702)))
        return self.emit.op("mul", x=x, y=gate)

    def add(self, x: Var, y: Var) -> Var:
        return self.emit.op("add", x=x, y=y)

    def mul(self, x: Var, y: Var) -> Var:
        return self.emit.op("mul", x=x, y=y)

    def scale(self, x: Var, factor: float) -> Var:
        if math.frexp(factor)[0] == 0.5 and in_half(factor):  # a power of two: rounded once all the same
            return self.emit.op("mul", x=x, y=self._number(x, factor))
        return self.emit.island(lambda t: self.emit.op("mul", x=t, y=np.float32(factor)), x)

    def softcap(self, x: Var, cap: float) -> Var:
        return self.emit.island(lambda t: self._softcap(t, cap), x)

    def _softcap(self, x: Var, cap: float) -> Var:
        y = self.emit.op("tanh", x=self.emit.op("mul", x=x, y=np.float32(1 / cap)))
        return self.emit.op("mul", x=y, y=np.float32(cap))

    def clip(self, x: Var, low: float | None, high: float | None) -> Var:
        if self.emit.is_half(x) and not all(v is None or in_half(v) for v in (low, high)):
            return self.emit.island(lambda t: self.clip(t, low, high), x)
        if high is not None:
            x = self.emit.op("minimum", x=x, y=self._number(x, high))
        return x if low is None else self.emit.op("maximum", x=x, y=self._number(x, low))

    def cast(self, x: Var) -> Var:
        return x

    # Heads and attention

    def split_heads(self, x: Var, head_dim: int) -> Var:
        apart = self.emit.op("reshape", x=x, shape=[1, -1, x.shape[-1] // head_dim, head_dim])
        return self.emit.op("transpose", x=apart, perm=[0, 2, 1, 3])

    def merge_heads(self, x: Var) -> Var:
        y = self.emit.op("transpose", x=x, perm=[0, 2, 1, 3])
        return self.emit.op("reshape", x=y, shape=[1, -1, x.shape[1] * x.shape[3]])

    def rotation(self, table: RopeTable, step: Step[Var]) -> tuple[Var, Var]:
        """Rows of the tables [context, dim / 2], in float32: [1, 1, T, dim / 2]."""
        out = []
        for name in names.rope_names(self._tables):
            table = self.emit.constant(name, self.emit.array(name))
            rows = self.emit.op("gather", x=table, indices=step.positions, axis=0, validate_indices=False)
            out.append(self.emit.op("expand_dims", x=rows, axes=[1]))
        self._tables += 1
        return out[0], out[1]

    def rope(self, x: Var, rotation: tuple[Var, Var]) -> Var:
        cos, sin = rotation
        half, width = cos.shape[-1], x.shape[-1]
        sizes = [half, half, *([width - 2 * half] if width > 2 * half else [])]
        a, b, *rest = self.emit.op("split", x=x, split_sizes=sizes, axis=-1)
        a, b = self.emit.wide(a), self.emit.wide(b)
        turned = [
            self.emit.op("sub", x=self.emit.op("mul", x=a, y=cos), y=self.emit.op("mul", x=b, y=sin)),
            self.emit.op("add", x=self.emit.op("mul", x=b, y=cos), y=self.emit.op("mul", x=a, y=sin)),
        ]
        return self.emit.op("concat", values=[*map(self.emit.narrow, turned), *rest], axis=-1)

    def store(self, k: Var, v: Var, step: Step[Var], cache: Cache | None) -> tuple[Var, Var, Any, Cache | None]:
        assert cache is not None
        k, v = (self._update(state, x, cache.layer) for state, x in ((cache.keys, k), (cache.values, v)))
        return k, v, self.clock.keys, cache

    def _update(self, state: Var, x: Var, layer: int) -> Var:
        """Write the new rows of a layer and read all rows so far: [1, G, T, K] -> [1, G, S, K]."""
        _, g, _, k = x.shape
        held = state.sym_type.wrapped_type().get_shape()
        if not self.emit.half:
            x = self.emit.op("cast", x=x, dtype="fp16")
        first, last = np.array([layer, 0, 0], np.int32), np.array([layer + 1, 1, g], np.int32)
        end = self.emit.op("concat", values=[last, self.clock.end, np.array([k], np.int32)], axis=0)
        begin = self.emit.op("concat", values=[first, self.clock.past, np.array([0], np.int32)], axis=0)
        whole = self.emit.op("slice_update", x=self.emit.op("read_state", input=state),
                         update=self.emit.op("expand_dims", x=x, axes=[0]), begin=begin, end=end)  # fmt: skip
        kept = self.emit.op("coreml_update_state", state=state, value=whole)
        # masks, where an axis is taken whole, keep its size known
        rows = self.emit.op("slice_by_index", x=kept, begin=[layer, 0, 0, 0, 0], end=end,
                        begin_mask=[False, True, True, True, True], end_mask=[False, True, True, False, True],
                        squeeze_mask=[True, False, False, False, False])  # fmt: skip
        if (g, k) != (held[2], held[4]):
            rows = self.emit.op("slice_by_index", x=rows, begin=[0, 0, 0, 0], end=[1, g, 0, k],
                            end_mask=[False, False, True, False])  # fmt: skip
        return rows if self.emit.half else self.emit.wide(rows)

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
        rows = self.emit.op("reshape", x=q, shape=[1, g, -1, dim])
        mask = self.clock.mask(a.window, h // g)
        y = self.emit.op("scaled_dot_product_attention", query=rows, key=k, value=v, attn_mask=mask)
        return self.emit.op("reshape", x=y, shape=[1, h, -1, dim])

    def _composed(self, q: Var, k: Var, v: Var, a: Attention, w: Any) -> Var:
        """Scores and softmax in float32: [G, R, T, S]."""
        _, h, _, dim = q.shape
        g = k.shape[1]
        q = self.emit.op("reshape", x=self.emit.wide(q), shape=[g, h // g, -1, dim])
        k, v = (self.emit.op("transpose", x=self.emit.wide(x), perm=[1, 0, 2, 3]) for x in (k, v))
        s = self.emit.op("matmul", x=q, y=k, transpose_y=True)
        s = self.emit.op("mul", x=s, y=np.float32(a.scale or 1.0))
        if a.softcap is not None:
            s = self._softcap(s, a.softcap)
        if w.slopes is not None:
            slopes = self.emit.vector(w.slopes, shape=(g, h // g, 1, 1))
            s = self.emit.op("sub", x=s, y=self.emit.op("mul", x=self.clock.distance(wide=True), y=slopes))
        s = self.emit.op("select", cond=self.clock.mask(a.window), a=s, b=np.float32(-1e30))
        if w.sinks is None:
            p = self.emit.op("softmax", x=s, axis=-1)
        else:
            sinks = self.emit.vector(w.sinks, shape=(g, h // g, 1, 1))
            top = self.emit.op("maximum", x=self.emit.op("reduce_max", x=s, axes=[-1], keep_dims=True), y=sinks)
            e = self.emit.op("exp", x=self.emit.op("sub", x=s, y=top))
            own = self.emit.op("exp", x=self.emit.op("sub", x=sinks, y=top))
            total = self.emit.op("add", x=self.emit.op("reduce_sum", x=e, axes=[-1], keep_dims=True), y=own)
            p = self.emit.op("real_div", x=e, y=total)
        y = self.emit.narrow(self.emit.op("matmul", x=p, y=v))
        return self.emit.op("reshape", x=y, shape=[1, h, -1, dim])

    # Mixture of experts

    def route(self, x: Var, w: Handle, m: MoE) -> tuple[Var, Var]:
        """The experts of each token, int32, and their weights, float32: [1, T, k] each."""
        emit, r = self.emit, m.router
        y = self._wide_linear(x, w)
        scores = emit.op("softmax", x=y, axis=-1) if r.score == "softmax" else emit.op("sigmoid", x=y)
        ranked = scores if w.correction is None else emit.op("add", x=scores, y=emit.vector(w.correction))
        weights, chosen = emit.op("topk", x=self.tap(ranked, "mlp.scores"), k=r.top_k, axis=-1)
        if w.correction is not None:
            weights = emit.op("gather_along_axis", x=scores, indices=chosen, axis=-1, validate_indices=False)
        if r.renormalise:
            weights = emit.op("real_div", x=weights, y=emit.op("reduce_sum", x=weights, axes=[-1], keep_dims=True))
        return chosen, weights if r.scale == 1 else emit.op("mul", x=weights, y=np.float32(r.scale))

    def experts(self, x: Var, routes: tuple[Var, Var], w: Any, m: MoE) -> Var:
        """A call of one token looks its experts' weights up; where there may be more, all experts run on all tokens,
        and of each token's results those count that it chose."""
        chosen, weights = routes
        if x.shape[1] == 1:
            rows = self.emit.op("reshape", x=chosen, shape=[m.router.top_k])
            w = SimpleNamespace(**{part: replace(h, chosen=rows) for part, h in vars(w).items()})
            share = self.emit.op("reshape", x=weights, shape=[m.router.top_k, 1, 1])
        else:
            share = self._spread(chosen, weights, m)
        y = self.emit.op("mul", x=self.emit.wide(dense(self, m, w, x)), y=share)  # [E or k, T, D]
        return self.emit.narrow(self.emit.op("reduce_sum", x=y, axes=[0], keep_dims=True))

    def _spread(self, chosen: Var, weights: Var, m: MoE) -> Var:
        """[E, T, 1] float32: the weight of every expert for every token, 0 where it is not chosen."""
        emit = self.emit
        every = emit.constant(f"experts_{m.experts}", np.arange(m.experts, dtype=np.int32))
        is_it = emit.op("equal", x=emit.op("expand_dims", x=chosen, axes=[-1]), y=every)  # [1, T, k, E]
        each = emit.op("mul", x=emit.op("cast", x=is_it, dtype="fp32"), y=emit.op("expand_dims", x=weights, axes=[-1]))
        return emit.op("transpose", x=emit.op("reduce_sum", x=each, axes=[2], keep_dims=False), perm=[2, 1, 0])

    def gate(self, x: Var, y: Var) -> Var:
        y = self.emit.op("sigmoid", x=self.emit.wide(y))
        return self.emit.narrow(self.emit.op("mul", x=self.emit.wide(x), y=y))

    # Structure

    def call(
        self, i: int, b: Block, w: Any, x: Var, step: Step[Var], rotation: Any, cache: Cache | None
    ) -> tuple[Var, Cache | None]:
        self.emit.scope = f"L{i}_"
        try:
            return super().call(i, b, w, x, step, rotation, cache)
        finally:
            self.emit.scope = ""

    def tap(self, x: Var, name: str) -> Var:
        return self.emit.rename(x, name)
