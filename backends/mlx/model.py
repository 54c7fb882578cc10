"""A decoder as an MLX module whose parameters have the canonical names: what mlx-lm runs as model.py, and we do too.

B batch, T tokens, D model, V vocab. This file becomes a part of the bundled model.py.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from backends.mlx.layers import Embedding, GroupedLinear, Linear, Norm, Scores, TiedHead
from backends.mlx.ops import MLXOps
from spec.forward import block, dense, hidden, logits

SORTED = 64
"""Pairs of a token and an expert from which on they are sorted by expert."""
DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}


class Place(NamedTuple):
    """What `spec.ops.Step` says of a call, as far as these operations ask."""

    positions: mx.array
    """[B or 1, T]; below 0 in the padding before a batch's shorter rows."""


class Table(NamedTuple):
    """A rotary table on the device."""

    inv_freq: mx.array
    factor: float


class AttentionWeights(nn.Module):
    """Projections, norms and sinks of one layer."""

    def __init__(self, a: Any, width: int, slopes: Any) -> None:
        super().__init__()
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        self.q = Linear(width, q, a.bias.q)
        self.k = Linear(width, kv, a.bias.k)
        self.v = Linear(width, kv, a.bias.v)
        if a.qk_norm is not None:
            head = a.qk_norm.over == "head"
            self.q_norm = Norm(a.qk_norm, a.head_dim if head else q)
            self.k_norm = Norm(a.qk_norm, a.head_dim if head else kv)
        if a.sinks:
            self.sinks = mx.zeros((a.heads,))
        self.o = Linear(q, width, a.bias.o)
        self._slopes = None if slopes is None else mx.array(slopes)
        self._kind = (a.window, a.softcap is not None, slopes is not None)

    @property
    def slopes(self) -> mx.array | None:
        """[H] of ALiBi."""
        return self._slopes

    @property
    def kind(self) -> tuple[int | None, bool, bool]:
        """What its mask and its cache depend on: window, softcap, ALiBi."""
        return self._kind


class MLPWeights(nn.Module):
    """Projections of one layer's feed-forward part."""

    def __init__(self, m: Any, width: int, hidden: int) -> None:
        super().__init__()
        if m.gated:
            self.gate = Linear(width, hidden, m.bias.gate)
        self.up = Linear(width, hidden, m.bias.up)
        self.down = Linear(hidden, width, m.bias.down)


class Router(Scores):
    """Logits of the experts, and the correction that joins their scores for the choice."""

    def __init__(self, m: Any, width: int) -> None:
        super().__init__(width, m.experts, m.router.bias)
        if m.router.correction:
            self.correction = mx.zeros((m.experts,))


class Experts(nn.Module):
    """The feed-forward networks of a layer's experts."""

    def __init__(self, m: Any, width: int) -> None:
        super().__init__()
        if m.gated:
            self.gate = GroupedLinear(m.experts, width, m.hidden, m.bias.gate)
        self.up = GroupedLinear(m.experts, width, m.hidden, m.bias.up)
        self.down = GroupedLinear(m.experts, m.hidden, width, m.bias.down)

    def __call__(self, ops: MLXOps, x: mx.array, chosen: mx.array, weights: mx.array, m: Any) -> mx.array:
        """x [B, T, D], chosen and weights [B, T, k] -> [B, T, D]. Many tokens are sorted by expert, so that kernels
        read each expert once."""
        k, owner = chosen.shape[-1], chosen.flatten()
        ordered = owner.size >= SORTED
        order = mx.argsort(owner) if ordered else mx.arange(owner.size)
        rows = x.reshape(-1, x.shape[-1])[order // k][:, None]
        parts = SimpleNamespace(**{n: partial(p, owner=owner[order], ordered=ordered) for n, p in self.items()})
        y = dense(ops, m, parts, rows)[:, 0]
        y = (y[mx.argsort(order)] if ordered else y).reshape(*chosen.shape, -1)
        return (y.astype(mx.float32) * weights[..., None]).sum(-2).astype(x.dtype)


class MoEWeights(nn.Module):
    """One layer's mixture of experts."""

    def __init__(self, m: Any, width: int) -> None:
        super().__init__()
        self.router = Router(m, width)
        self.experts = Experts(m, width)
        if m.shared is not None:
            self.shared = MLPWeights(m, width, m.shared.hidden)
            if m.shared.gate:
                self.shared_gate = Scores(width, 1)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, b: Any, width: int, slopes: Any) -> None:
        super().__init__()
        self._block = b
        self.attn = AttentionWeights(b.attention, width, slopes)
        mixture = b.mlp.kind == "moe"
        self.mlp = MoEWeights(b.mlp, width) if mixture else MLPWeights(b.mlp, width, b.mlp.hidden)
        if b.pre:
            self.attn_norm = Norm(b.norm, width)
        if b.pre and not b.shared_norm:
            self.mlp_norm = Norm(b.norm, width)
        if b.post:
            self.attn_post_norm = Norm(b.norm, width)
            self.mlp_post_norm = Norm(b.norm, width)

    def __call__(self, ops: MLXOps, x: mx.array, step: Any, rotation: Any, cache: Any) -> tuple[mx.array, Any]:
        return block(ops, self._block, self, x, step, rotation, cache)


class Bias(nn.Module):
    """The bias of a tied head."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.bias = mx.zeros((size,))


class Model(nn.Module):
    """`args.spec` is a spec (its attributes are all that is used), `args.tables` its rotary tables as
    (frequencies, factor), `args.slopes` the ALiBi slopes of each layer or none, `args.compute` a key of `DTYPES`."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.args, self.model_type = args, "allotrope"
        self._spec = s = args.spec
        self._dtype = DTYPES[args.compute]
        self._tables: Any = [Table(mx.array(f, dtype=mx.float32), factor) for f, factor in args.tables]
        e = s.embedding
        self.embed = Embedding(s.vocab_size, s.width)
        if e.positions is not None:
            self.positions = Embedding(args.position_rows, s.width)
        if e.norm is not None:
            self.embed_norm = Norm(e.norm, s.width)
        self.layers = [Layer(b, s.width, slopes) for b, slopes in zip(s.layers, args.slopes, strict=True)]
        if s.final_norm is not None:
            self.final_norm = Norm(s.final_norm, s.width)
        if not s.head.tied:
            self.head = Linear(s.width, s.vocab_size, s.head.bias)
        elif s.head.bias:
            self.head = Bias(s.vocab_size)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """[B, T] ids that continue the cached sequences to logits [B, T, V]."""
        return self.logits(self.hidden(inputs, cache))

    def hidden(self, inputs: mx.array, cache: Any = None) -> mx.array:
        """[B, T] ids to the normed residual stream [B, T, D]."""
        t = inputs.shape[1]
        start = 0 if cache is None else cache[0].offset
        start = start[:, None] if isinstance(start, mx.array) and start.ndim else start
        step: Any = Place(mx.arange(t)[None] + start)
        x, _ = hidden(self._ops(t, cache), self._spec, self, inputs, step, self._tables, cache)
        return x

    def logits(self, x: mx.array) -> mx.array:
        """[B, T, D] to [B, T, V]."""
        return logits(MLXOps(self._dtype, {}), self._spec, _Head(self), x)

    def _ops(self, t: int, cache: Any) -> MLXOps:
        masks = {}
        for i, layer in enumerate(self.layers):
            window, softcap, alibi = kind = layer.attn.kind
            if kind not in masks:
                held = None if cache is None else cache[i]
                masks[kind] = visible(t, held, window, softcap or alibi)
        return MLXOps(self._dtype, masks)

    def make_cache(self) -> list[Any]:
        """Caches of mlx-lm's own: rotating for windows, but whole where distances are needed (ALiBi)."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache

        kinds = [layer.attn.kind for layer in self.layers]
        return [KVCache() if window is None or alibi else RotatingKVCache(window) for window, _, alibi in kinds]


class _Head:
    """The handle tree of the last step alone."""

    def __init__(self, model: Model) -> None:
        own = model.get("head")
        tied = model.args.spec.head.tied
        self.head = TiedHead(model.embed, None if own is None else own.bias) if tied else own


def visible(t: int, cache: Any, window: int | None, array: bool) -> Any:
    """The mask of T new tokens behind those in a cache: none, "causal", or a bool array (always, if `array`)."""
    if cache is not None:
        return cache.make_mask(t, return_array=array, window_size=window)
    return causal(t, 0, window, array)


def causal(t: int, past: int, window: int | None, array: bool) -> Any:
    """Of T tokens behind `past` others: none where all are visible, else "causal" or bool [T, past + T]."""
    if t == 1 and (window is None or past < window):
        return None
    if not array and (window is None or past + t <= window):
        return "causal"
    distance = mx.arange(past, past + t)[:, None] - mx.arange(past + t)
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)
