"""The operations in NumPy, written to be read and believed.

Shapes: B batch, T query, S key, D model, H q-heads, G kv-heads, K head dim, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from spec.config import Activation, Attention, Block, MoE, Norm
from spec.forward import dense
from spec.ops import Ops, Step
from spec.rope import RopeTable

Array = NDArray[Any]

_BLOCK_BYTES = 64 << 20
"""Weights are widened to the compute dtype a block of rows at a time, so that no whole matrix is held twice."""


@dataclass
class Handle:
    """A weight handle: array-likes (`shape` and row indexing are all that is used), or none where the spec has none."""

    weight: Any = None
    bias: Any = None
    correction: Any = None
    """Of a router: added to scores for the choice."""

    def expert(self, e: int, experts: int) -> Handle:
        """Expert e of `experts` whose layers lie one below the other."""
        return Handle(*(None if t is None else _Rows(t, e * (t.shape[0] // experts), t.shape[0] // experts)
                        for t in (self.weight, self.bias)))  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """`count` rows from `start` of an array-like, read when they are asked for."""

    of: Any
    start: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.of.shape[1:])

    @property
    def activation(self) -> Any:
        """How a runtime rounds what these rows are multiplied with (`convert.verify.emulate.Typed`)."""
        return getattr(self.of, "activation", None)

    def __getitem__(self, rows: slice) -> Any:
        first, last, _ = rows.indices(self.count)
        return self.of[self.start + first : self.start + last]


@dataclass
class Cache:
    """One layer's keys and values so far: [B, G, S, K] each, and their slots [B, S]."""

    k: Array | None = None
    v: Array | None = None
    slots: Array | None = None


_erf: Callable[[Array], Any] = np.frompyfunc(math.erf, 1, 1)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))  # never overflows
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)).astype(x.dtype)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.square(np.maximum(x, 0)),
}


def largest(scores: Array, k: int) -> Array:
    """Places of the k largest of the last axis, the lower one first among equals."""
    return np.argsort(-scores, -1, kind="stable")[..., :k]


class NumpyOps(Ops[Array, Handle, Cache]):
    """`dtype` float64 is the oracle; float32 is a control that shows how much of an error is rounding."""

    def __init__(self, dtype: DTypeLike = np.float64, taps: dict[str, Array] | None = None) -> None:
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._number: Any = self.dtype.type  # a constant in the compute dtype
        self.taps = taps
        self.forced: Mapping[str, Array] | None = None
        """The experts of each token [B, T, k] by the layer's scope (`L3.`), where another run's are to be taken."""
        self._scope = ""

    def embed(self, ids: Array, w: Handle, offset: int = 0) -> Array:
        rows = np.asarray(ids) + offset
        if rows.size and (rows.min() < 0 or rows.max() >= w.weight.shape[0]):
            raise IndexError(f"row {rows.max()} of a table of {w.weight.shape[0]}")
        unique, inverse = np.unique(rows, return_inverse=True)
        return np.asarray(w.weight[unique], dtype=self.dtype)[inverse.reshape(rows.shape)]

    def linear(self, x: Array, w: Handle) -> Array:
        out, into = w.weight.shape
        rows = max(1, _BLOCK_BYTES // (self.dtype.itemsize * into))
        flat = x.reshape(-1, into)
        y = np.empty((flat.shape[0], out), dtype=self.dtype)
        for r in range(0, out, rows):
            y[:, r : r + rows] = flat @ np.asarray(w.weight[r : r + rows], dtype=self.dtype).T
        if w.bias is not None:
            y += np.asarray(w.bias[:], dtype=self.dtype)
        return y.reshape(*x.shape[:-1], out)

    def unembed(self, x: Array, w: Handle) -> Array:
        return self.linear(x, w)

    def last(self, x: Array, step: Step[Array]) -> Array:
        return x[:, -1:]

    def norm(self, x: Array, w: Handle, norm: Norm) -> Array:
        if norm.kind == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + self._number(norm.eps))
        if w.weight is not None:
            y = y * (np.asarray(w.weight[:], dtype=self.dtype) + self._number(norm.offset))
        if w.bias is not None:
            y = y + np.asarray(w.bias[:], dtype=self.dtype)
        return y

    def act(self, x: Array, kind: Activation) -> Array:
        return ACTIVATIONS[kind](x)

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def mul(self, x: Array, y: Array) -> Array:
        return x * y

    def scale(self, x: Array, factor: float) -> Array:
        return x * self._number(factor)

    def softcap(self, x: Array, cap: float) -> Array:
        c = self._number(cap)
        return c * np.tanh(x / c)

    def clip(self, x: Array, low: float | None, high: float | None) -> Array:
        return np.clip(x, low, high)

    def cast(self, x: Array) -> Array:
        return x.astype(self.dtype, copy=False)

    def split_heads(self, x: Array, head_dim: int) -> Array:
        return x.reshape(*x.shape[:-1], -1, head_dim).swapaxes(1, 2)

    def merge_heads(self, x: Array) -> Array:
        b, h, t, k = x.shape
        return x.swapaxes(1, 2).reshape(b, t, h * k)

    def rotation(self, table: RopeTable, step: Step[Array]) -> tuple[Array, Array]:
        angle = step.positions[..., None].astype(self.dtype) * table.inv_freq.astype(self.dtype)
        factor = self._number(table.factor)
        return np.cos(angle) * factor, np.sin(angle) * factor

    def rope(self, x: Array, rotation: tuple[Array, Array]) -> Array:
        cos, sin = (t[:, None] for t in rotation)  # [B, 1, T, dim / 2]
        half = cos.shape[-1]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def store(
        self, k: Array, v: Array, step: Step[Array], cache: Cache | None
    ) -> tuple[Array, Array, Array, Cache | None]:
        if cache is None:
            return k, v, step.slots, None
        if cache.k is not None and cache.v is not None and cache.slots is not None:
            k, v = np.concatenate([cache.k, k], 2), np.concatenate([cache.v, v], 2)
            return k, v, (slots := np.concatenate([cache.slots, step.slots], 1)), Cache(k, v, slots)
        return k, v, step.slots, Cache(k, v, step.slots)

    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Array, a: Attention, w: Any) -> Array:
        group = q.shape[1] // k.shape[1]
        distance = step.slots[:, None, :, None] - key_slots[:, None, None, :]  # [B, 1, T, S]
        visible = distance >= 0
        if a.window is not None:
            visible &= distance < a.window
        if step.segments is not None:
            visible &= step.segments[:, None, :, None] == step.segments[:, None, None, :]
        out = np.empty((*q.shape[:-1], v.shape[-1]), dtype=self.dtype)
        for h in range(q.shape[1]):  # head by head: the scores of one head are the largest thing held
            one = slice(h, h + 1)
            scores = self.scale(q[:, one] @ k[:, h // group : h // group + 1].swapaxes(-1, -2), a.scale or 1.0)
            if a.softcap is not None:
                scores = self.softcap(scores, a.softcap)
            if w.slopes is not None:
                scores = scores - self._number(w.slopes[h]) * distance
            scores = np.where(visible, scores, -np.inf)
            top = scores.max(-1, keepdims=True)
            if w.sinks is not None:
                top = np.maximum(top, self._number(w.sinks[h]))
            p = np.exp(scores - top)
            total = p.sum(-1, keepdims=True)
            if w.sinks is not None:
                total = total + np.exp(self._number(w.sinks[h]) - top)
            out[:, one] = (p / total) @ v[:, h // group : h // group + 1]
        return self.tap(out, "attn.heads")

    def route(self, x: Array, w: Handle, m: MoE) -> tuple[Array, Array]:
        """The chosen experts [B, T, k], and their weights."""
        r, logits = m.router, self.linear(x, w)
        if r.score == "softmax":
            scores = np.exp(logits - logits.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
        else:
            scores = _sigmoid(logits)
        ranked = scores if w.correction is None else scores + np.asarray(w.correction[:], dtype=self.dtype)
        chosen = self.choose(self.tap(ranked, "mlp.scores"), r.top_k)
        weights = np.take_along_axis(scores, chosen, -1)
        if r.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, weights * self._number(r.scale)

    def choose(self, scores: Array, k: int) -> Array:
        """The k largest of the last axis, the lower number first among equals; or those that are forced."""
        return largest(scores, k) if self.forced is None else self.forced[self._scope]

    def experts(self, x: Array, routes: tuple[Array, Array], w: Any, m: MoE) -> Array:
        chosen, weights = routes
        out, taps, self.taps = np.zeros_like(x), self.taps, None  # one expert's intermediates have no name
        for e in np.unique(chosen):
            own = SimpleNamespace(**{part: h.expert(int(e), m.experts) for part, h in vars(w).items()})
            b, t, place = np.nonzero(chosen == e)
            out[b, t] += dense(self, m, own, x[b, t]) * weights[b, t, place][:, None]
        self.taps = taps
        return out

    def gate(self, x: Array, y: Array) -> Array:
        return x * _sigmoid(y)

    def call(
        self, i: int, b: Block, w: Any, x: Array, step: Step[Array], rotation: Any, cache: Cache | None
    ) -> tuple[Array, Cache | None]:
        self._scope = f"L{i}."
        try:
            return super().call(i, b, w, x, step, rotation, cache)
        finally:
            self._scope = ""

    def tap(self, x: Array, name: str) -> Array:
        if self.taps is not None:
            self.taps[self._scope + name] = x
        return x
