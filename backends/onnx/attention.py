"""Attention in standard operators: what each query sees, the Attention operator, and its decomposition.

Shapes: B batch, T query, S key, H q-heads, G kv-heads, R = H / G, K head dim.

ONNX's Attention (opset 23) has the softcap on the wrong side of the mask, neither sinks nor ALiBi, and `is_causal` is
aligned to the upper left, so it gets an explicit mask, and what it lacks is written out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spec.config import Attention

if TYPE_CHECKING:
    import onnx_ir as ir

    from backends.onnx.portable import PortableOps

    X = ir.Value


def visible(ops: PortableOps, slots: X, window: int | None) -> X:
    """[B, 1, T, S] bool: key j is visible to query i where 0 <= slot_i - slot_j < window and j is no padding.

    Padding sees itself: a row without any key would be NaN, and would poison the values of later layers.
    """
    if window in ops.masks:
        return ops.masks[window]
    g, keys = ops.g, ops.keys
    scope, g.scope = g.scope, ""
    if None not in ops.masks:
        query, key = g("Unsqueeze", slots, g.ints(-1)), g("Unsqueeze", keys.slots, g.ints(1))  # [B, T, 1], [B, 1, S]
        seen = g("LessOrEqual", key, query)
        if keys.real is not None:
            assert keys.place is not None and keys.own is not None
            seen = g("And", seen, g("Unsqueeze", keys.real, g.ints(1)))
            itself = g("Equal", g("Unsqueeze", keys.place, g.ints(1)), g("Unsqueeze", keys.own, g.ints(-1)))
            seen = g("Or", seen, itself)
        ops.masks[None] = g.name(g("Unsqueeze", seen, g.ints(1)), "visible")
    if window is not None:
        first = g("Sub", slots, g.constant(window, "i64"))  # the last slot that is too far away
        near = g("Greater", g("Unsqueeze", keys.slots, g.ints(1)), g("Unsqueeze", first, g.ints(-1)))
        both = g("And", ops.masks[None], g("Unsqueeze", near, g.ints(1)))
        ops.masks[window] = g.name(both, f"visible.{window}")
    g.scope = scope
    return ops.masks[window]


def operator(ops: PortableOps, q: X, k: X, v: X, seen: X, slots: X, a: Attention, w: Any) -> X:
    """The Attention operator: q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K].

    TensorRT, which the caches of fixed length are for, takes no precision for the softmax; it uses float32.
    """
    fixed = ops.keys.write_indices is not None
    return ops.g("Attention", q, k, v, seen, scale=a.scale, softmax_precision=None if fixed else 1)


def decomposed(ops: PortableOps, q: X, k: X, v: X, seen: X, slots: X, a: Attention, w: Any) -> X:
    """Scores, scale, softcap, ALiBi, mask, softmax with sinks, values, all in float32. Heads of a group share their
    keys: q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K]."""
    g = ops.g
    assert a.kv_heads is not None and a.head_dim is not None and a.scale is not None, "a resolved layer"
    each = a.heads // a.kv_heads
    q = g("Reshape", ops.widen(q), g.ints(0, a.kv_heads, each, -1, a.head_dim))  # [B, G, R, T, K]
    k, v = (g("Unsqueeze", ops.widen(t), g.ints(2)) for t in (k, v))  # [B, G, 1, S, K]
    scores = g("MatMul", q, g("Transpose", k, perm=[0, 1, 2, 4, 3]))  # [B, G, R, T, S]
    scores = g("Mul", scores, g.constant(a.scale, "f32"))
    if a.softcap is not None:
        scores = ops.capped(scores, g.constant(a.softcap, "f32"))
    if w.slopes is not None:
        slopes = g("Reshape", ops.vector(w.slopes), g.ints(1, a.kv_heads, each, 1, 1))
        scores = g("Sub", scores, g("Mul", slopes, _distance(ops, slots)))
    scores = g("Where", g("Unsqueeze", seen, g.ints(2)), scores, g.constant(-3.0e38, "f32"))
    if w.sinks is None:
        p = g("Softmax", scores, axis=-1)
    else:
        sinks = g("Reshape", ops.vector(w.sinks), g.ints(1, a.kv_heads, each, 1, 1))
        top = g("Max", g("ReduceMax", scores, g.ints(-1), keepdims=1), sinks)
        p = g("Exp", g("Sub", scores, top))
        total = g("Add", g("ReduceSum", p, g.ints(-1), keepdims=1), g("Exp", g("Sub", sinks, top)))
        p = g("Div", p, total)
    return ops.narrow(g("Reshape", g("MatMul", p, v), g.ints(0, a.heads, -1, a.head_dim)))


def _distance(ops: PortableOps, slots: X) -> X:
    """[B, 1, 1, T, S] float32: slot of the query less slot of the key."""
    g = ops.g
    query, key = g("Unsqueeze", slots, g.ints(-1)), g("Unsqueeze", ops.keys.slots, g.ints(1))
    return g("Unsqueeze", ops.to(g("Sub", query, key), "f32"), g.ints(1, 2))
