"""The decoder's vocabulary in MLX: fused kernels, and compositions in float32 where a kernel lacks a feature.

B batch, T query, S key, D model, H q-heads, G kv-heads, K head dim. This file becomes a part of the bundled model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi, sqrt
from typing import Any, NamedTuple

import mlx.core as mx

from backends.mlx.layers import wide, widened
from spec.config import Activation, Attention, FeedForward, MoE, Norm
from spec.ops import Ops, Step


class Rotation(NamedTuple):
    """One table at the positions of one step."""

    dim: int
    """Rotated dimensions of a head."""
    cos: mx.array
    """[B or 1, T, dim / 2], float32, like sin."""
    sin: mx.array
    wavelengths: mx.array | None
    """1 / inv_freq, for the fused kernel; none where the table scales cos and sin, which the kernel cannot."""
    start: mx.array
    """[B or 1]: the first token's position."""


def elementwise(f: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`f` in float32, rounded once to the dtype of its first argument; one kernel where the device compiles."""

    def rounded(x: mx.array, *rest: Any) -> mx.array:
        others = (r.astype(mx.float32) if isinstance(r, mx.array) else r for r in rest)
        return f(x.astype(mx.float32), *others).astype(x.dtype)

    compiled = mx.compile(rounded, shapeless=True)

    def run(*arguments: Any) -> mx.array:
        return (rounded if wide() else compiled)(*arguments)

    return run


ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "silu": lambda x: x * mx.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + mx.erf(x / sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + mx.tanh(sqrt(2 / pi) * (x + 0.044715 * x * x * x))),
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
    "relu": lambda x: mx.maximum(x, 0),
    "relu2": lambda x: mx.square(mx.maximum(x, 0)),
}
ACT = {kind: elementwise(f) for kind, f in ACTIVATIONS.items()}
GLU = {kind: elementwise(lambda gate, up, f=f: f(gate) * up) for kind, f in ACTIVATIONS.items()}


@elementwise
def clamped_swiglu(gate: mx.array, up: mx.array, alpha: float, limit: float) -> mx.array:
    """GPT-OSS: (up + 1) * g * sigmoid(alpha * g), with g below limit and up within it."""
    gate = mx.minimum(gate, limit)
    return (mx.clip(up, -limit, limit) + 1) * gate * mx.sigmoid(alpha * gate)


@elementwise
def scaled(x: mx.array, factor: float) -> mx.array:
    """`x * factor`, the factor in float32."""
    return x * factor


@elementwise
def gated(x: mx.array, y: mx.array) -> mx.array:
    """`x * sigmoid(y)`."""
    return x * mx.sigmoid(y)


@elementwise
def softcapped(x: mx.array, cap: float) -> mx.array:
    """`cap * tanh(x / cap)`."""
    return cap * mx.tanh(x / cap)


class MLXOps(Ops[mx.array, Any, Any]):
    """Operations of one forward pass.

    dtype: of the residual stream. masks: one for each kind of attention (`kind`): none where everything is visible,
    "causal", or bool [T, S] or [B, 1, T, S], true where visible.
    """

    def __init__(self, dtype: mx.Dtype, masks: Mapping[Any, Any]) -> None:
        self.dtype, self.masks = dtype, masks

    def embed(self, ids: mx.array, w: Any, offset: int = 0) -> mx.array:
        return w(mx.maximum(ids + offset, 0))  # positions of padding are negative

    def linear(self, x: mx.array, w: Any) -> mx.array:
        return w(x)

    def unembed(self, x: mx.array, w: Any) -> mx.array:
        return w(x)

    def last(self, x: mx.array, step: Step[mx.array]) -> mx.array:
        return x[:, -1:]

    def norm(self, x: mx.array, w: Any, norm: Norm) -> mx.array:
        return w(x)

    def act(self, x: mx.array, kind: Activation) -> mx.array:
        return ACT[kind](x)

    def add(self, x: mx.array, y: mx.array) -> mx.array:
        return x + y

    def mul(self, x: mx.array, y: mx.array) -> mx.array:
        return x * y

    def scale(self, x: mx.array, factor: float) -> mx.array:
        return scaled(x, factor)

    def softcap(self, x: mx.array, cap: float) -> mx.array:
        return softcapped(x, cap)

    def clip(self, x: mx.array, low: float | None, high: float | None) -> mx.array:
        return mx.clip(x, low, high)

    def cast(self, x: mx.array) -> mx.array:
        return x.astype(self.dtype)

    def glu(self, gate: mx.array, up: mx.array, m: FeedForward) -> mx.array:
        if m.activation == "clamped_swiglu":
            return clamped_swiglu(gate, up, m.alpha, m.limit)
        return GLU[m.activation](gate, up)

    def route(self, x: mx.array, w: Any, m: MoE) -> tuple[mx.array, mx.array]:
        """The chosen experts [B, T, k], and their weights in float32."""
        r, logits = m.router, w(x)
        scores = mx.softmax(logits, axis=-1, precise=True) if r.score == "softmax" else mx.sigmoid(logits)
        ranked = scores + w["correction"] if "correction" in w else scores
        chosen = mx.argsort(-ranked, axis=-1)[..., : r.top_k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if r.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, weights * r.scale

    def experts(self, x: mx.array, routes: tuple[mx.array, mx.array], w: Any, m: MoE) -> mx.array:
        return w(self, x, *routes, m)

    def gate(self, x: mx.array, y: mx.array) -> mx.array:
        return gated(x, y)

    def split_heads(self, x: mx.array, head_dim: int) -> mx.array:
        return x.reshape(*x.shape[:-1], -1, head_dim).swapaxes(1, 2)

    def merge_heads(self, x: mx.array) -> mx.array:
        b, h, t, k = x.shape
        return x.swapaxes(1, 2).reshape(b, t, h * k)

    def rotation(self, table: Any, step: Step[mx.array]) -> Rotation:
        """The positions of a row follow one another."""
        angle = step.positions[..., None].astype(mx.float32) * table.inv_freq
        cos, sin = mx.cos(angle), mx.sin(angle)
        if table.factor == 1:
            return Rotation(2 * len(table.inv_freq), cos, sin, 1 / table.inv_freq, step.positions[:, 0])
        return Rotation(2 * len(table.inv_freq), cos * table.factor, sin * table.factor, None, step.positions[:, 0])

    def rope(self, x: mx.array, rotation: Rotation) -> mx.array:
        """The fused kernel takes wavelengths, a rounding away from the table's frequencies: lost in the rounding of
        16-bit activations, but not in float32, where cosines and sines of the table itself are used."""
        r = rotation
        if r.wavelengths is not None and x.dtype != mx.float32 and not wide():
            start = mx.broadcast_to(r.start, (x.shape[0],))
            return mx.fast.rope(
                x, r.dim, traditional=False, base=None, scale=1.0, offset=start, freqs=r.wavelengths
            )  # fmt: skip
        cos, sin = r.cos[:, None], r.sin[:, None]
        h, half = x.astype(mx.float32), r.dim // 2
        a, b = h[..., :half], h[..., half : r.dim]
        turned = mx.concatenate([a * cos - b * sin, b * cos + a * sin, h[..., r.dim :]], -1)
        return turned.astype(x.dtype)

    def store(self, k: mx.array, v: mx.array, step: Step[mx.array], cache: Any) -> tuple[mx.array, mx.array, Any, Any]:
        if cache is None:
            return k, v, None, None
        keys, values = cache.update_and_fetch(k, v)
        if hasattr(cache, "bits"):  # mlx-lm's quantized cache
            keys, values = (
                mx.dequantize(*t, group_size=cache.group_size, bits=cache.bits).astype(k.dtype) for t in (keys, values)
            )
        return keys, values, None, cache

    def mix(
        self, q: mx.array, k: mx.array, v: mx.array, step: Step[mx.array], key_slots: Any, a: Attention, w: Any
    ) -> mx.array:
        """`w.kind` names the mask; keys are in the order of their slots where `w.slopes` needs distances."""
        assert a.scale is not None
        mask, sinks = self.masks[w.kind], w.get("sinks")
        if a.softcap is not None or w.slopes is not None:
            return composed(q, k, v, a, mask, sinks, w.slopes)
        y = mx.fast.scaled_dot_product_attention(
            widened(q), widened(k), widened(v), scale=a.scale, mask=mask,
            sinks=None if sinks is None else sinks.astype(mx.float32 if wide() else q.dtype),
        )  # fmt: skip
        return y.astype(q.dtype)

    def call(
        self, i: int, b: Any, w: Any, x: mx.array, step: Step[mx.array], rotation: Any, cache: Any
    ) -> tuple[mx.array, Any]:
        return w(self, x, step, rotation, cache)


def composed(
    q: mx.array, k: mx.array, v: mx.array, a: Attention, mask: Any, sinks: mx.array | None, slopes: mx.array | None
) -> mx.array:
    """Attention with every feature, scores in memory and in float32: q [B, H, T, K], k and v [B, G, S, K]."""
    assert a.scale is not None
    dtype, (batch, heads, t, dim), groups, s = q.dtype, q.shape, k.shape[1], k.shape[2]
    q = q.astype(mx.float32).reshape(batch, groups, -1, t, dim)
    k, v = (x.astype(mx.float32)[:, :, None] for x in (k, v))
    scores = (q @ k.swapaxes(-1, -2)) * a.scale
    if a.softcap is not None:
        scores = a.softcap * mx.tanh(scores / a.softcap)
    if slopes is not None:
        distance = mx.arange(s - t, s)[:, None] - mx.arange(s)
        scores = scores - slopes.astype(mx.float32).reshape(groups, -1, 1, 1) * distance
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 4 else mask
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
    if sinks is not None:
        sink = mx.broadcast_to(sinks.astype(mx.float32).reshape(groups, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = mx.concatenate([scores, sink], -1)
    p = mx.softmax(scores, axis=-1, precise=True)[..., :s]
    return (p @ v).reshape(batch, heads, t, -1).astype(dtype)
