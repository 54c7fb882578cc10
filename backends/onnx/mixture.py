"""Mixtures of experts in standard operators: a loop over the experts that are called for, or all of them at once.

Shapes: B batch, T query, n = B * T tokens, D model, E experts, k of them a token's, N and K rows and columns of one
expert's matrix, F hidden.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from backends.onnx.layout import CODES, GROUP
from spec.config import MoE
from spec.forward import dense

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
        y = ops.widen(dense(ops, m, _each(w, expert=expert), g("Gather", tokens, rows, axis=0)))
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
    g, level = ops.g, ops.layout.levels[w.weight or ""]
    assert w.weight is not None
    rows, k = ops.layout.shape(w.weight)
    n = rows // w.experts
    bias = None if w.bias is None else ops.vector(w.bias, None if w.expert is None else w.experts)
    if w.expert is None:
        table = ops.dequantized(w.weight) if level in CODES else ops.vector(w.weight)
        table = g("Transpose", g("Reshape", _typed(ops, table, level), g.ints(w.experts, n, k)), perm=[0, 2, 1])
        y = g("MatMul", x, table)
        return y if bias is None else ops.add(y, ops.narrow(g("Reshape", bias, g.ints(w.experts, 1, n))))
    bias = None if bias is None else ops.narrow(g("Gather", bias, w.expert, axis=0))
    if level not in CODES:
        table = _typed(ops, g("Gather", ops.vector(w.weight, w.experts), w.expert, axis=0), level)
    else:
        table = _dequantized(ops, w, n, k)
        if level == "q4":  # a group's low codes come before its high ones there
            turned = g("Transpose", g("Reshape", x, g.ints(0, k // GROUP, GROUP // 2, 2)), perm=[0, 1, 3, 2])
            x = g("Reshape", turned, g.ints(0, k))
    return g("Gemm", x, table, bias, transB=1)


def _dequantized(ops: PortableOps, w: Weight, n: int, k: int) -> X:
    """One expert's matrix [N, K] from its codes: the even columns of each group before the odd ones at four bits.

    There is no Gather for int4, and DequantizeLinear in blocks takes four times as long on a CPU.
    """
    g, bits = ops.g, CODES[ops.layout.levels[w.weight or ""]]
    assert w.weight is not None and w.expert is not None
    codes, scales = ops.layout.parts(w.weight)
    signed = ops.layout.profile == "portable"
    kind = "u8" if bits == 4 or not signed else "i8"
    view = (w.experts, n, k // GROUP, GROUP * bits // 8)
    found = g("Gather", g.stored(codes, (f"{codes.name}.experts", kind, view)), w.expert, axis=0)
    offset = 1 << (bits - 1)
    if bits == 4:
        if signed:
            found = g("BitwiseXor", found, g.constant(0x88, "u8"))
        low, high = (
            g("BitwiseAnd", found, g.constant(15, "u8")),
            g("BitShift", found, g.constant(4, "u8"), direction="RIGHT"),
        )
        found = g("Concat", low, high, axis=-1)
    found = ops.to(found, ops.compute)
    if kind == "u8":
        found = g("Sub", found, ops.number(offset))
    each = g("Gather", ops.stacked(scales, w.experts), w.expert, axis=0)
    return g("Reshape", g("Mul", found, g("Unsqueeze", each, g.ints(-1))), g.ints(n, k))


def _typed(ops: PortableOps, table: X, level: str) -> X:
    return table if level in (*CODES, ops.compute) else ops.to(table, ops.compute)


def _each(w: Any, **change: Any) -> SimpleNamespace:
    return SimpleNamespace(**{part: replace(h, **change) for part, h in vars(w).items()})


def _by_token(ops: PortableOps, routes: Routes, m: MoE) -> Routes:
    chosen, weights = (ops.g("Reshape", t, ops.g.ints(-1, m.router.top_k)) for t in routes)
    return chosen, weights
