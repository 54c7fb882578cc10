"""Mixtures of experts in standard operators: a loop over the experts that are called for, or all of them at once.

Shapes: B batch, T query, n = B * T tokens, D model, E experts, k of them a token's, N and K rows and columns of one
expert's matrix.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from backends.onnx.layout import CODED
from spec.config import MoE
from spec.forward import dense
from spec.levels import CODES, GROUPS

if TYPE_CHECKING:
    import onnx_ir as ir

    from backends.onnx.portable import PortableOps, Weight

    X = ir.Value
    Routes = tuple[X, X]


def route(ops: PortableOps, x: X, w: Weight, m: MoE) -> Routes:
    """The experts of each token, int64, and their weights, float32: [B, T, k] each. TopK takes the lower number first
    among equals, as the oracle does."""
    g, r = ops.g, m.router
    logits = ops.wide_linear(x, w)
    scores = g("Softmax", logits, axis=-1) if r.score == "softmax" else g("Sigmoid", logits)
    ranked = scores if w.correction is None else g("Add", scores, ops.vector(w.correction))
    top, chosen = g.several("TopK", 2, ops.tap(ranked, "mlp.scores"), g.ints(r.top_k), axis=-1)
    weights = top if w.correction is None else g("GatherElements", scores, chosen, axis=-1)
    if r.renormalise:
        weights = g("Div", weights, g("ReduceSum", weights, g.ints(-1), keepdims=1))
    return chosen, weights if r.scale == 1 else g("Mul", weights, g.constant(r.scale, "f32"))


def spread(ops: PortableOps, routes: Routes, m: MoE) -> X:
    """The weight of every expert for every token, 0 where it is not chosen: [n, E] float32."""
    g = ops.g
    chosen, weights = _by_token(ops, routes, m)
    shape = g("Concat", g("Shape", chosen, start=0, end=1), g.ints(m.experts), axis=0)
    return g("ScatterElements", g("Expand", g.constant(0, "f32"), shape), chosen, weights, axis=1)


def looped(ops: PortableOps, x: X, routes: Routes, w: Any, m: MoE) -> X:
    """One expert after the other, those that any token chose, each on its own tokens: [B, T, D] -> [B, T, D]."""
    g, width = ops.g, ops.layout.shape(w.down.weight)[0] // m.experts
    tokens = g("Reshape", x, g.ints(-1, width))
    chosen, weights = _by_token(ops, routes, m)
    called = g("Unique", chosen)

    def one(i: X, total: X) -> X:
        expert = g("Gather", called, i)
        at = g("NonZero", g("Equal", chosen, expert))  # [2, tokens of this expert]: which token, which of its k places
        rows = g("Gather", at, g.constant(0, "i64"), axis=0)
        share = g("GatherND", weights, g("Transpose", at, perm=[1, 0]))
        own = SimpleNamespace(**{part: replace(h, expert=expert) for part, h in vars(w).items()})
        y = ops.widen(dense(ops, m, own, g("Gather", tokens, rows, axis=0)))
        y = g("Mul", y, g("Unsqueeze", share, g.ints(-1)))
        return g("ScatterND", total, g("Unsqueeze", rows, g.ints(-1)), y, reduction="add")

    none = g("Expand", g.constant(0, "f32"), g("Shape", tokens))
    total = g.loop(g("Size", called), none, "f32", ("rows", width), one)
    return g("Reshape", ops.narrow(total), g("Shape", x))


def every(ops: PortableOps, x: X, routes: Routes, w: Any, m: MoE) -> X:
    """All experts on all tokens, and of each token's results those that count: [B, T, D] -> [B, T, D]."""
    g, width = ops.g, ops.layout.shape(w.down.weight)[0] // m.experts
    with g.unnamed():
        y = ops.widen(dense(ops, m, w, g("Reshape", x, g.ints(1, -1, width))))  # [E, n, D]
    share = g("Unsqueeze", g("Transpose", spread(ops, routes, m), perm=[1, 0]), g.ints(-1))
    total = g("ReduceSum", g("Mul", y, share), g.ints(0), keepdims=0)
    return g("Reshape", ops.narrow(total), g("Shape", x))


def linear(ops: PortableOps, x: X, w: Weight) -> X:
    """The product with one expert's matrix, [tokens, K] -> [tokens, N], or with everyone's, [1 or E, n, K] ->
    [E, n, N]."""
    assert w.weight is not None
    rows, k = ops.layout.shape(w.weight)
    return (_everyones if w.expert is None else _ones_own)(ops, x, w, ops.layout.levels[w.weight], rows // w.experts, k)


def _everyones(ops: PortableOps, x: X, w: Weight, level: str, n: int, k: int) -> X:
    g, name = ops.g, w.weight or ""
    table = ops.dequantized(name) if level in CODED else ops.vector(name)
    table = g("Transpose", g("Reshape", _typed(ops, table, level), g.ints(w.experts, n, k)), perm=[0, 2, 1])
    y = g("MatMul", x, table)
    return y if w.bias is None else ops.add(y, ops.narrow(g("Reshape", ops.vector(w.bias), g.ints(w.experts, 1, n))))


def _ones_own(ops: PortableOps, x: X, w: Weight, level: str, n: int, k: int) -> X:
    g, name = ops.g, w.weight or ""
    bias = None if w.bias is None else ops.narrow(g("Gather", ops.vector(w.bias, w.experts), w.expert, axis=0))
    if level in CODES:
        table = _dequantized(ops, w, level, n, k)
    else:
        table = _typed(ops, g("Gather", ops.vector(name, w.experts), w.expert, axis=0), level)
    if CODES.get(level) == 4:  # a group's even columns come before its odd ones
        pairs = g("Reshape", x, g.ints(0, k // GROUPS[level], GROUPS[level] // 2, 2))
        x = g("Reshape", g("Transpose", pairs, perm=[0, 1, 3, 2]), g.ints(0, k))
    return g("Gemm", x, table, bias, transB=1)


def _dequantized(ops: PortableOps, w: Weight, level: str, n: int, k: int) -> X:
    """One expert's matrix [N, K] from its codes. At four bits the even columns of a group come before the odd ones:
    putting them in turn would take longer than all the rest.

    There is no Gather for int4, and DequantizeLinear in blocks takes four times as long on a CPU.
    """
    g, signed, bits, group = ops.g, ops.layout.profile == "portable", CODES[level], GROUPS[level]
    codes, scales = ops.layout.parts(w.weight or "")
    kind = "i8" if signed and bits == 8 else "u8"
    view = (w.experts, n, k // group, group * bits // 8)
    found = g("Gather", g.stored(codes, (f"{codes.name}.experts", kind, view)), w.expert, axis=0)
    if bits == 4:
        if signed:
            found = g("BitwiseXor", found, g.constant(0x88, "u8"))  # the signed codes + 8
        low = g("BitwiseAnd", found, g.constant(15, "u8"))
        high = g("BitShift", found, g.constant(4, "u8"), direction="RIGHT")
        found = g("Concat", low, high, axis=-1)
    found = ops.to(found, ops.compute)
    if kind == "u8":
        found = g("Sub", found, ops.number(1 << (bits - 1)))
    each = g("Unsqueeze", g("Gather", ops.stacked(scales, w.experts), w.expert, axis=0), g.ints(-1))
    return g("Reshape", g("Mul", found, each), g.ints(n, k))


def _typed(ops: PortableOps, table: X, level: str) -> X:
    return table if level in (*CODED, ops.compute) else ops.to(table, ops.compute)


def _by_token(ops: PortableOps, routes: Routes, m: MoE) -> Routes:
    chosen, weights = (ops.g("Reshape", t, ops.g.ints(-1, m.router.top_k)) for t in routes)
    return chosen, weights
