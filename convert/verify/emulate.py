"""A runtime's own roundings, reproduced inside the oracle: what an artifact's error *should* be.

llama.cpp on a CPU rounds the input of a matrix product to the type that its dot product takes: blocks of 32 int8 for
Q4_0 and Q8_0 weights, blocks of 256 int8 for K-quants, float16 for float16 weights, bfloat16 for bfloat16. Its KV cache
is float16, and its tanh-GELU and quick-GELU are tables over float16. Running the oracle with exactly these
roundings measures the activation term instead of guessing it.

Sources: ggml's `type_traits_cpu` (vec_dot_type), `quantize_row_q8_0`, `quantize_row_q8_K_ref`, `ggml_vec_gelu_f32`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from backends.numpy.ops import Handle, NumpyOps
from spec.config import Activation, Attention, MoE, Norm
from spec.ops import Step
from spec.rope import RopeTable

Array = NDArray[Any]
Rounding = Callable[[Array], Array]


def to_f32(x: Array) -> Array:
    """Through float32."""
    return x.astype(np.float32)


def to_f16(x: Array) -> Array:
    """Through float16, ties to even."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(np.float16).astype(np.float32)


def to_bf16(x: Array) -> Array:
    """Through bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32).reshape(x.shape)


def to_q8_0(x: Array) -> Array:
    """Through int8 blocks of 32 with a float16 scale of amax / 127; codes are found for the unrounded scale."""
    b = x.astype(np.float32).reshape(-1, 32)
    amax = np.abs(b).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(b * np.where(amax > 0, np.float32(127) / amax, np.float32(0)))
    return (codes * to_f16(amax / np.float32(127))).reshape(x.shape)


def to_q8_k(x: Array) -> Array:
    """Through int8 blocks of 256 with a float32 scale; the element of largest magnitude becomes -127."""
    b = x.astype(np.float32).reshape(-1, 256)
    top = np.take_along_axis(b, np.abs(b).argmax(-1, keepdims=True), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(top != 0, np.float32(-127) / top, np.float32(0))
        codes = np.minimum(np.rint(b * inverse), 127)
        return np.where(inverse != 0, codes * (np.float32(1) / inverse), np.float32(0)).reshape(x.shape)


def to_int8(x: Array, block: int = 32) -> Array:
    """Through int8 blocks, as long as the weights' groups, with a float32 scale of amax / 127 (MLAS, for ONNX Runtime's
    accuracy level 4)."""
    b = x.astype(np.float32).reshape(-1, block)
    scale = np.abs(b).max(-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint(b * np.where(scale > 0, np.float32(1) / scale, np.float32(0)))
    return (codes * scale).reshape(x.shape)


ROUNDINGS: Mapping[str, Rounding] = {
    "f32": to_f32, "f16": to_f16, "bf16": to_bf16, "q8_0": to_q8_0, "q8_k": to_q8_k, "int8": to_int8,
    "int8-g128": partial(to_int8, block=128),
}  # fmt: skip

_Q8_0 = ("q1_0", "q2_0", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "nvfp4")
"""Types whose dot product takes Q8_0, or Q8_1, which is Q8_0 with the block's sum beside it."""


def activation_type(weight_type: str) -> str:
    """What llama.cpp rounds the input of a product with weights of this ggml type to: a key of `ROUNDINGS`."""
    t = weight_type.lower()
    if t in ("f32", "f16", "bf16"):
        return t
    return "q8_0" if t in _Q8_0 else "q8_k"


@dataclass(frozen=True)
class Typed:
    """A weight that knows how the runtime rounds what it is multiplied with; an array-like to the oracle."""

    weight: Any
    """Array-like: shape and row indexing."""
    activation: str
    """A key of `ROUNDINGS`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def __getitem__(self, rows: Any) -> Array:
        return self.weight[rows]


FLASH_TILE = 64
"""Queries from which on ggml's flash attention works in tiles, with float32 accumulators."""

GELU_TABLES: tuple[Activation, ...] = ("gelu_tanh", "quick_gelu")
"""Activations that llama.cpp looks up in a table over float16."""


class EmulatedOps(NumpyOps):
    """The oracle with a runtime's roundings in the batch rows `rows`, and none in the others.

    Batch rows never mix, so one pass over the weights (the expensive part) yields both the exact logits and the
    emulated ones. `linears`: round the inputs of products by each weight's `Typed.activation`. `kv`: rounding of
    keys and values in the cache. `tables`: GELU through float16. `online`: those batch rows whose attention rounds
    queries too and sums values key by key in float16, as ggml's flash attention does for fewer than `FLASH_TILE`
    queries (for more it works in float32 tiles). `follow`: every batch row takes the experts that the first chooses.
    `nudge`: by how much, relatively, embedding rows are off at most in the batch rows `nudged`.
    """

    def __init__(
        self,
        dtype: DTypeLike = np.float64,
        *,
        linears: bool = True,
        kv: str = "f16",
        tables: bool = True,
        rows: slice = slice(None),
        online: slice = slice(0, 0),
        follow: bool = False,
        nudge: float = 0.0,
        nudged: Sequence[int] = (),
    ) -> None:
        super().__init__(dtype)
        self.follow, self.nudge, self.nudged = follow, nudge, list(nudged)
        self.linears, self.kv, self.tables, self.rows, self.online = linears, kv, tables, rows, online

    def _round(self, x: Array, rounding: Rounding, rows: slice) -> Array:
        out = x.copy()
        out[rows] = rounding(x[rows]).astype(self.dtype)
        return out

    def embed(self, ids: Array, w: Handle, offset: int = 0) -> Array:
        y = super().embed(ids, w, offset)
        if self.nudged:
            noise = np.random.default_rng(0).uniform(-1, 1, (len(self.nudged), *y.shape[1:]))
            y[self.nudged] *= (1 + self.nudge * noise).astype(self.dtype)
        return y

    def linear(self, x: Array, w: Handle) -> Array:
        rounding = ROUNDINGS.get(getattr(w.weight, "activation", "")) if self.linears else None
        return super().linear(x if rounding is None else self._round(x, rounding, self.rows), w)

    def choose(self, scores: Array, k: int) -> Array:
        chosen = super().choose(scores, k)
        return np.broadcast_to(chosen[:1], chosen.shape) if self.follow else chosen

    def experts(self, x: Array, routes: tuple[Array, Array], w: Any, m: MoE) -> Array:
        """Batch row by batch row: experts see tokens of all of them in one heap, where `rows` means nothing."""
        rows, out = self.rows, np.empty_like(x)
        for b in range(len(x)):
            self.rows = slice(None) if b in range(len(x))[rows] else slice(0, 0)
            out[b : b + 1] = super().experts(x[b : b + 1], (routes[0][b : b + 1], routes[1][b : b + 1]), w, m)
        self.rows = rows
        return out

    def act(self, x: Array, kind: Activation) -> Array:
        y = super().act(x, kind)
        if self.tables and kind in GELU_TABLES:
            h = to_f16(x[self.rows])
            looked_up = to_f16(super().act(h, kind))
            if kind == "gelu_tanh":
                looked_up = np.where(x[self.rows] <= -10, 0, np.where(x[self.rows] >= 10, x[self.rows], looked_up))
            y[self.rows] = looked_up
        return y

    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Any, a: Attention, w: Any) -> Array:
        if self.kv in ("f16", "bf16"):
            k, v = (self._round(t, ROUNDINGS[self.kv], self.rows) for t in (k, v))
            q = self._round(q, ROUNDINGS[self.kv], self.online)
        out = super().mix(q, k, v, step, key_slots, a, w)
        for b in range(len(q))[self.online]:
            out[b] = self._summed_in_f16(q[b], k[b], v[b], step.slots[b], key_slots[b], a, w)
        return out

    def _summed_in_f16(self, q: Array, k: Array, v: Array, slots: Array, keys: Array, a: Attention, w: Any) -> Array:
        """Online softmax, key by key, with a float16 accumulator: q [H, T, K], k and v [G, S, K] -> [H, T, K]."""
        group = q.shape[0] // k.shape[0]
        k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
        scores = q @ k.swapaxes(-1, -2) * (a.scale or 1.0)  # [H, T, S]
        if a.softcap is not None:
            scores = self.softcap(scores, a.softcap)
        distance = slots[:, None] - keys[None, :]
        if w.slopes is not None:
            scores = scores - w.slopes[:, None, None] * distance
        visible = (distance >= 0) & (distance < (a.window if a.window is not None else np.inf))
        top = np.full(scores.shape[:2], -np.inf)
        total, out = np.zeros(scores.shape[:2]), np.zeros(q.shape)
        for j in range(scores.shape[-1]):
            s = np.where(visible[:, j], scores[..., j], -np.inf)
            higher = np.maximum(top, s)
            with np.errstate(invalid="ignore"):
                shrink = np.where(top > -np.inf, np.exp(top - higher), 0.0)
                weight = np.where(s > -np.inf, np.exp(s - higher), 0.0)
            out = np.where((s > top)[..., None], to_f16(out * shrink[..., None]), out)
            out = np.where((s > -np.inf)[..., None], to_f16(out + v[:, None, j] * weight[..., None]), out)
            total, top = total * shrink + weight, higher
        if w.sinks is not None:
            total = total + np.exp(w.sinks[:, None] - top)
        return (out / total[..., None]).astype(self.dtype)


class RoundedOps(EmulatedOps):
    """The oracle with every operation's result rounded to a 16-bit dtype in the batch rows `rows`: what a runtime that
    computes in that dtype, and accumulates inside each operation in float32, must reach. `rotary`: the tables are
    rounded too. `gains`: a norm without a bias rounds before its gain as well."""

    def __init__(
        self,
        dtype: DTypeLike = np.float64,
        *,
        compute: str = "f16",
        kv: str = "f32",
        rows: slice = slice(None),
        rotary: bool = False,
        gains: bool = False,
        **nudging: Any,
    ) -> None:
        super().__init__(dtype, kv=kv, tables=False, rows=rows, **nudging)
        self.compute, self.rotary, self.gains, self._fused = compute, rotary, gains, False

    def _rounded(self, x: Array) -> Array:
        return x if self.compute == "f32" or self._fused else self._round(x, ROUNDINGS[self.compute], self.rows)

    def embed(self, ids: Array, w: Handle, offset: int = 0) -> Array:
        return self._rounded(super().embed(ids, w, offset))

    def linear(self, x: Array, w: Handle) -> Array:
        return self._rounded(super().linear(x, w))

    def norm(self, x: Array, w: Handle, norm: Norm) -> Array:
        if self.gains and w.weight is not None and w.bias is None:
            bare = norm.model_copy(update={"weight": False, "offset": 0.0})
            gain = np.asarray(w.weight[:], dtype=self.dtype) + self._number(norm.offset)
            return self._rounded(self._rounded(super().norm(x, Handle(), bare)) * gain)
        return self._rounded(super().norm(x, w, norm))

    def rotation(self, table: RopeTable, step: Step[Array]) -> tuple[Array, Array]:
        cos, sin = super().rotation(table, step)
        return (self._rounded(cos), self._rounded(sin)) if self.rotary else (cos, sin)

    def act(self, x: Array, kind: Activation) -> Array:
        return self._rounded(super().act(x, kind))

    def add(self, x: Array, y: Array) -> Array:
        return self._rounded(super().add(x, y))

    def mul(self, x: Array, y: Array) -> Array:
        return self._rounded(super().mul(x, y))

    def scale(self, x: Array, factor: float) -> Array:
        return self._rounded(super().scale(x, factor))

    def softcap(self, x: Array, cap: float) -> Array:
        return self._rounded(super().softcap(x, cap))

    def rope(self, x: Array, rotation: tuple[Array, Array]) -> Array:
        return self._rounded(super().rope(x, rotation))

    def route(self, x: Array, w: Handle, m: MoE) -> tuple[Array, Array]:
        chosen, weights = super().route(x, w, m)
        return chosen, self._rounded(weights)

    def experts(self, x: Array, routes: tuple[Array, Array], w: Any, m: MoE) -> Array:
        return self._rounded(super().experts(x, routes, w, m))

    def gate(self, x: Array, y: Array) -> Array:
        return self._rounded(super().gate(x, y))

    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Any, a: Attention, w: Any) -> Array:
        self._fused = True  # scores and probabilities stay in float32
        try:
            out = super().mix(q, k, v, step, key_slots, a, w)
        finally:
            self._fused = False
        return self._rounded(out)
