"""The decoder, once. Every backend runs this, so who has read it has understood them all.

`w` mirrors the canonical parameter names: `w.embed`, `w.layers[i].attn.q`, ... hold the backend's weight handles.
Shapes: B batch, T tokens, D model, H q-heads, G kv-heads, K head dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spec.config import Attention, Block, FeedForward, MoE, Spec
from spec.ops import C, Ops, Step, W, X
from spec.rope import RopeTable, rope_keys


def attention(
    ops: Ops[X, W, C], a: Attention, w: Any, x: X, step: Step[X], rotation: Any, cache: C | None
) -> tuple[X, C | None]:
    """Causal self-attention: [B, T, D] -> [B, T, D]."""
    assert a.head_dim is not None
    q, k, v = ops.project(x, [w.q, w.k, w.v])
    if a.clip is not None:
        q, k, v = (ops.clip(t, -a.clip, a.clip) for t in (q, k, v))
    if a.qk_norm is not None and a.qk_norm.over == "width":
        q, k = ops.norm(q, w.q_norm, a.qk_norm), ops.norm(k, w.k_norm, a.qk_norm)
    q, k, v = (ops.split_heads(t, a.head_dim) for t in (q, k, v))
    if a.qk_norm is not None and a.qk_norm.over == "head":
        q, k = ops.norm(q, w.q_norm, a.qk_norm), ops.norm(k, w.k_norm, a.qk_norm)
    q, k, v = ops.tap(q, "attn.q"), ops.tap(k, "attn.k"), ops.tap(v, "attn.v")
    y, cache = ops.attend(q, k, v, step, cache, rotation, a, w)
    y = ops.tap(ops.merge_heads(y), "attn.mix")
    return ops.tap(ops.linear(y, w.o), "attn.o"), cache


def dense(ops: Ops[X, W, C], m: FeedForward, w: Any, x: X, name: str = "mlp") -> X:
    """A feed-forward network: [B, T, D] -> [B, T, D]."""
    if m.gated:
        gate, up = ops.project(x, [w.gate, w.up])
        h = ops.glu(gate, up, m)
    else:
        h = ops.act(ops.linear(x, w.up), m.activation)
    h = ops.drop(ops.tap(h, f"{name}.act"), m.dropout)
    return ops.tap(ops.linear(h, w.down), f"{name}.down")


def mixture(ops: Ops[X, W, C], m: MoE, w: Any, x: X) -> X:
    """Mixture of experts: [B, T, D] -> [B, T, D]."""
    y = ops.experts(x, ops.route(x, w.router, m), w.experts, m)
    if m.shared is not None:
        y, shared = ops.tap(y, "mlp.experts"), dense(ops, m, w.shared, x, "mlp.shared")
        y = ops.add(y, ops.gate(shared, ops.linear(x, w.shared_gate)) if m.shared.gate else shared)
    return ops.tap(y, "mlp.mix")


def mlp(ops: Ops[X, W, C], m: FeedForward, w: Any, x: X) -> X:
    """The feed-forward part of a layer: [B, T, D] -> [B, T, D]."""
    return mixture(ops, m, w, x) if isinstance(m, MoE) else dense(ops, m, w, x)


def block(
    ops: Ops[X, W, C], b: Block, w: Any, x: X, step: Step[X], rotation: Any, cache: C | None
) -> tuple[X, C | None]:
    """One decoder layer: [B, T, D] -> [B, T, D]."""

    def branch(y: X, post: str) -> X:
        if b.post:
            y = ops.norm(y, getattr(w, post), b.norm)
        return ops.drop(y if b.residual_scale == 1 else ops.scale(y, b.residual_scale), b.dropout)

    h = ops.tap(ops.norm(x, w.attn_norm, b.norm), "attn_norm") if b.pre else x
    y, cache = attention(ops, b.attention, w.attn, h, step, rotation, cache)
    y = branch(y, "attn_post_norm")
    if b.parallel:
        if b.pre and not b.shared_norm:
            h = ops.tap(ops.norm(x, w.mlp_norm, b.norm), "mlp_norm")
        x = ops.add(x, y)
    elif b.pre:
        x, h = ops.add_norm(x, y, w.mlp_norm, b.norm)
        h = ops.tap(h, "mlp_norm")
    else:
        x = h = ops.add(x, y)
    y = branch(mlp(ops, b.mlp, w.mlp, h), "mlp_post_norm")
    return ops.tap(ops.add(x, y), "out"), cache


def begin(ops: Ops[X, W, C], spec: Spec, w: Any, ids: X, step: Step[X]) -> X:
    """Token ids [B, T] to the residual stream [B, T, D] before the first layer."""
    e = spec.embedding
    x = ops.cast(ops.embed(ids, w.embed))
    if e.scale is not None:
        x = ops.scale(x, e.scale)
    if e.positions is not None:
        x = ops.add(x, ops.cast(ops.embed(step.positions, w.positions, e.positions.offset)))
    if e.norm is not None:
        x = ops.norm(x, w.embed_norm, e.norm)
    return ops.tap(ops.drop(x, e.dropout), "embed")


def blocks(
    ops: Ops[X, W, C],
    spec: Spec,
    w: Any,
    x: X,
    step: Step[X],
    tables: Sequence[RopeTable],
    cache: Sequence[C] | None = None,
    span: range | None = None,
) -> tuple[X, list[C] | None]:
    """The residual stream [B, T, D] through layers `span` (default: all); `tables` are `rope_tables(spec, length)`."""
    rotations, keys = [ops.rotation(table, step) for table in tables], rope_keys(spec)
    caches: list[Any] = []
    for i in range(len(spec.layers)) if span is None else span:
        rotation = None if (key := keys[i]) is None else rotations[key]
        x, c = ops.call(i, spec.layers[i], w.layers[i], x, step, rotation, None if cache is None else cache[i])
        caches.append(c)
    return x, None if cache is None else caches


def end(ops: Ops[X, W, C], spec: Spec, w: Any, x: X) -> X:
    """The residual stream [B, T, D] after the last layer, normed."""
    if spec.final_norm is not None:
        x = ops.norm(x, w.final_norm, spec.final_norm)
    return ops.tap(x, "final_norm")


def hidden(
    ops: Ops[X, W, C],
    spec: Spec,
    w: Any,
    ids: X,
    step: Step[X],
    tables: Sequence[RopeTable],
    cache: Sequence[C] | None = None,
) -> tuple[X, list[C] | None]:
    """Token ids [B, T] to the normed residual stream [B, T, D]."""
    x, caches = blocks(ops, spec, w, begin(ops, spec, w, ids, step), step, tables, cache)
    return end(ops, spec, w, x), caches


def logits(ops: Ops[X, W, C], spec: Spec, w: Any, x: X) -> X:
    """The normed residual stream [B, T, D] to logits [B, T, V]. A tied head's handle `w.head` holds the embedding."""
    y = ops.unembed(x, w.head)
    if spec.head.scale is not None:
        y = ops.scale(y, spec.head.scale)
    if spec.head.softcap is not None:
        y = ops.softcap(y, spec.head.softcap)
    return ops.tap(y, "logits")
