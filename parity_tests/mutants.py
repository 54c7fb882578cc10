"""Seeded bugs. The proof is only worth what it catches, so every one of these must be caught by the check that owns it.

Two families: `GRAPH` and `CACHE` mutants are wrong operations (subclasses of the NumPy ones, run in float32 as if they
were a runtime); `gguf_mutants.py` and `hf_mutants.py` hold wrong artifacts, run in the real llama.cpp and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from backends.numpy.model import Oracle
from backends.numpy.ops import Array, Cache, Handle, NumpyOps
from spec import Spec
from spec.config import Activation, Attention, MoE, Norm
from spec.ops import Step
from spec.rope import RopeTable


class Float32(NumpyOps):
    """The correct operations in float32: the mutants' base, and what must pass."""

    def __init__(self) -> None:
        super().__init__(np.float32)


class WrongEps(Float32):
    def norm(self, x: Array, w: Handle, norm: Norm) -> Array:
        return super().norm(x, w, norm.model_copy(update={"eps": norm.eps / 10}))


class MissedOffset(Float32):
    def norm(self, x: Array, w: Handle, norm: Norm) -> Array:
        return super().norm(x, w, norm.model_copy(update={"offset": 0.0}))


class MeanLeftIn(Float32):
    def norm(self, x: Array, w: Handle, norm: Norm) -> Array:
        return super().norm(x, w, norm.model_copy(update={"kind": "rmsnorm"}))


class ThetaOff(Float32):
    def rotation(self, table: RopeTable, step: Step[Array]) -> Any:
        return super().rotation(replace(table, inv_freq=(table.inv_freq * 1.001).astype(np.float32)), step)


class PositionsFromOne(Float32):
    """The rotation is relative, so a constant shift is harmless; a shift of the tail is not."""

    def rotation(self, table: RopeTable, step: Step[Array]) -> Any:
        late = step.positions + (step.positions >= step.positions.max() - 2)
        return super().rotation(table, replace(step, positions=late))


class Interleaved(Float32):
    def rope(self, x: Array, rotation: Any) -> Array:
        dim = 2 * rotation[0].shape[-1]
        order = np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2), np.arange(dim, x.shape[-1])])
        return super().rope(x[..., order], rotation)[..., np.argsort(order)]


class AttentionFactorMissed(Float32):
    def rotation(self, table: RopeTable, step: Step[Array]) -> Any:
        return super().rotation(replace(table, factor=1.0), step)


class _Mix(Float32):
    """Mutants that change a field of the attention."""

    def changed(self, a: Attention) -> dict[str, Any]:
        raise NotImplementedError

    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Any, a: Attention, w: Any) -> Array:
        return super().mix(q, k, v, step, key_slots, a.model_copy(update=self.changed(a)), w)


class ScaleOff(_Mix):
    def changed(self, a: Attention) -> dict[str, Any]:
        return {"scale": (a.scale or 1.0) * 1.01}


class WindowOffByOne(_Mix):
    def changed(self, a: Attention) -> dict[str, Any]:
        return {"window": None if a.window is None else a.window + 1}


class SoftcapMissed(_Mix):
    def changed(self, a: Attention) -> dict[str, Any]:
        return {"softcap": None}


class SoftcapAfterMask(Float32):
    """Masked scores become -cap instead of -inf: every key leaks a little."""

    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Any, a: Attention, w: Any) -> Array:
        group = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scores = q @ k.swapaxes(-1, -2) * np.float32(a.scale or 1.0)
        distance = step.slots[:, None, :, None] - key_slots[:, None, None, :]
        scores = np.where((distance >= 0) & (distance < (int(a.window) if a.window else 10**9)), scores, -np.inf)
        scores = self.softcap(scores, a.softcap or 1e9)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return (p / p.sum(-1, keepdims=True)) @ v


class SoftcapBeforeScale(Float32):
    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Any, a: Attention, w: Any) -> Array:
        scale = a.scale or 1.0
        wrong = a.model_copy(update={"softcap": None if a.softcap is None else a.softcap / scale})
        return super().mix(q, k, v, step, key_slots, wrong, w)


class HeadsInterleaved(Float32):
    """Query head h reads kv-head h % G instead of h // (H / G)."""

    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Any, a: Attention, w: Any) -> Array:
        n = q.shape[1] // k.shape[1]
        return super().mix(q, np.tile(k, (1, n, 1, 1)), np.tile(v, (1, n, 1, 1)), step, key_slots, a, w)


class SinksMissed(Float32):
    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Any, a: Attention, w: Any) -> Array:
        kept, w.sinks = w.sinks, None
        try:
            return super().mix(q, k, v, step, key_slots, a, w)
        finally:
            w.sinks = kept


class OtherGelu(Float32):
    def act(self, x: Array, kind: Activation) -> Array:
        swap: dict[Activation, Activation] = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "silu": "gelu"}
        return super().act(x, swap.get(kind, kind))


class GateAndUpSwapped(Float32):
    def glu(self, gate: Array, up: Array, m: Any) -> Array:
        return super().glu(up, gate, m)


class EmbeddingScaleTwice(Float32):
    def embed(self, ids: Array, w: Handle, offset: int = 0) -> Array:
        return super().embed(ids, w, offset) * np.float32(1.01)


class LearnedOffsetMissed(Float32):
    def embed(self, ids: Array, w: Handle, offset: int = 0) -> Array:
        return super().embed(ids, w, 0)


class LogitsCappedLow(Float32):
    def softcap(self, x: Array, cap: float) -> Array:
        return super().softcap(x, cap * 1.01)


class _Router(Float32):
    """Mutants that change a field of the router."""

    def changed(self, m: MoE) -> dict[str, Any]:
        raise NotImplementedError

    def route(self, x: Array, w: Handle, m: MoE) -> tuple[Array, Array]:
        router = m.router.model_copy(update=self.changed(m))
        return super().route(x, w, m.model_copy(update={"router": router}))


class NotRenormalised(_Router):
    def changed(self, m: MoE) -> dict[str, Any]:
        return {"renormalise": not m.router.renormalise}


class OneExpertMore(_Router):
    def changed(self, m: MoE) -> dict[str, Any]:
        return {"top_k": m.router.top_k + 1}


class RoutedScaleMissed(_Router):
    def changed(self, m: MoE) -> dict[str, Any]:
        return {"scale": 1.0}


class SoftmaxForSigmoid(_Router):
    def changed(self, m: MoE) -> dict[str, Any]:
        return {"score": "softmax"}


class CorrectionMissed(Float32):
    def route(self, x: Array, w: Handle, m: MoE) -> tuple[Array, Array]:
        return super().route(x, Handle(w.weight, w.bias), m)


class RouterBiasMissed(Float32):
    def route(self, x: Array, w: Handle, m: MoE) -> tuple[Array, Array]:
        return super().route(x, Handle(w.weight, None, w.correction), m)


class CorrectionInWeights(Float32):
    """The corrected scores weigh the experts too."""

    def route(self, x: Array, w: Handle, m: MoE) -> tuple[Array, Array]:
        chosen, _ = super().route(x, w, m)
        scores = 1 / (1 + np.exp(-self.linear(x, w))) + np.asarray(w.correction, np.float32)
        weights = np.take_along_axis(scores, chosen, -1)
        return chosen, weights / weights.sum(-1, keepdims=True) * np.float32(m.router.scale)


class ExpertsSwapped(Float32):
    """The first two experts' weights in each other's place."""

    def experts(self, x: Array, routes: tuple[Array, Array], w: Any, m: MoE) -> Array:
        chosen, weights = routes
        order = np.array([1, 0, *range(2, m.experts)])
        return super().experts(x, (order[chosen], weights), w, m)


class WeightsOnInput(Float32):
    """Experts see weighted inputs instead of being weighted themselves (Llama 4)."""

    def experts(self, x: Array, routes: tuple[Array, Array], w: Any, m: MoE) -> Array:
        chosen, weights = routes
        one = np.ones_like(weights[..., :1])
        places = range(chosen.shape[-1])
        parts = [
            super(WeightsOnInput, self).experts(x * weights[..., [j]], (chosen[..., [j]], one), w, m) for j in places
        ]
        return np.asarray(np.sum(parts, 0, dtype=np.float32))


class SharedGateMissed(Float32):
    def gate(self, x: Array, y: Array) -> Array:
        return x


class UpperLeftCausal(Float32):
    """With a cache, queries are aligned with the first keys instead of the last ones."""

    def mix(self, q: Array, k: Array, v: Array, step: Step[Array], key_slots: Any, a: Attention, w: Any) -> Array:
        if step.layout == "cached":
            t = step.slots.shape[1]
            step = replace(step, slots=np.broadcast_to(np.arange(t), step.slots.shape))
            if k.shape[2] > t:
                step = replace(step, slots=step.slots + 1)
        return super().mix(q, k, v, step, key_slots, a, w)


class SlotOffByOne(Float32):
    """New keys are filed one slot too far, so the window and the mask see them late."""

    def store(self, k: Array, v: Array, step: Step[Array], cache: Cache | None) -> Any:
        keys, values, slots, new = super().store(k, v, step, cache)
        if cache is not None and cache.k is not None:
            slots = slots.copy()
            slots[:, -k.shape[2] :] -= 1
        return keys, values, slots, new


class PositionRestarts(Float32):
    """Continuing a sequence rotates the new tokens as if they were its first."""

    def rotation(self, table: RopeTable, step: Step[Array]) -> Any:
        if step.layout == "cached":
            step = replace(step, positions=step.positions - step.positions.min())
        return super().rotation(table, step)


class LostToken(Float32):
    """The oldest key falls out of the cache with every step."""

    def store(self, k: Array, v: Array, step: Step[Array], cache: Cache | None) -> Any:
        keys, values, slots, new = super().store(k, v, step, cache)
        if cache is not None and cache.k is not None:
            return keys[:, :, 1:], values[:, :, 1:], slots[:, 1:], new
        return keys, values, slots, new


@dataclass(frozen=True)
class Mutant:
    """A wrong set of operations, and a feature (a key of `parity_tests.cases.FEATURES`) in which it matters."""

    ops: type[Float32]
    feature: str


GRAPH: dict[str, Mutant] = {
    "eps": Mutant(WrongEps, "llama"),
    "norm_offset_missed": Mutant(MissedOffset, "rms_offset"),
    "layernorm_mean_left_in": Mutant(MeanLeftIn, "layernorm"),
    "theta_0.1%": Mutant(ThetaOff, "llama"),
    "tail_position_off_by_one": Mutant(PositionsFromOne, "llama"),
    "rope_interleaved": Mutant(Interleaved, "llama"),
    "rope_factor_missed": Mutant(AttentionFactorMissed, "rope_yarn"),
    "attention_scale_1%": Mutant(ScaleOff, "llama"),
    "window_off_by_one": Mutant(WindowOffByOne, "window"),
    "softcap_missed": Mutant(SoftcapMissed, "gemma2"),
    "softcap_after_mask": Mutant(SoftcapAfterMask, "attn_softcap"),
    "softcap_before_scale": Mutant(SoftcapBeforeScale, "attn_softcap"),
    "kv_heads_interleaved": Mutant(HeadsInterleaved, "llama"),
    "sinks_missed": Mutant(SinksMissed, "sinks"),
    "gelu_tanh_for_erf": Mutant(OtherGelu, "gelu"),
    "gelu_erf_for_tanh": Mutant(OtherGelu, "gelu_tanh"),
    "gelu_for_silu": Mutant(OtherGelu, "llama"),
    "gate_and_up_swapped": Mutant(GateAndUpSwapped, "llama"),
    "embedding_scale_1%": Mutant(EmbeddingScaleTwice, "llama"),
    "learned_offset_missed": Mutant(LearnedOffsetMissed, "learned_offset"),
    "logit_softcap_1%": Mutant(LogitsCappedLow, "logit_softcap"),
    "weights_not_renormalised": Mutant(NotRenormalised, "moe"),
    "weights_renormalised": Mutant(NotRenormalised, "moe_plain_scores"),
    "one_expert_more": Mutant(OneExpertMore, "moe"),
    "routed_scale_missed": Mutant(RoutedScaleMissed, "moe_one"),
    "softmax_for_sigmoid": Mutant(SoftmaxForSigmoid, "moe_sigmoid"),
    "correction_missed": Mutant(CorrectionMissed, "moe_sigmoid"),
    "correction_in_weights": Mutant(CorrectionInWeights, "moe_sigmoid"),
    "router_bias_missed": Mutant(RouterBiasMissed, "moe_sinks"),
    "experts_swapped": Mutant(ExpertsSwapped, "moe"),
    "weights_on_the_input": Mutant(WeightsOnInput, "moe"),
    "shared_gate_missed": Mutant(SharedGateMissed, "moe_shared_gate"),
}
"""Caught by the graph check."""

CACHE: dict[str, Mutant] = {
    "causal_upper_left": Mutant(UpperLeftCausal, "llama"),
    "slot_off_by_one": Mutant(SlotOffByOne, "window"),
    "position_restarts": Mutant(PositionRestarts, "llama"),
    "oldest_token_lost": Mutant(LostToken, "llama"),
}
"""Right when everything comes at once, wrong when continued: caught by the invariants."""


class OracleRuntime:
    """A `backends.base.Runtime` over NumPy operations: how the checks see a mutant."""

    def __init__(self, spec: Spec, weights: Mapping[str, Array], ops: NumpyOps) -> None:
        self._oracle = Oracle(spec, weights, ops=ops)
        self._cache: list[Cache] = []
        self.vocab_size, self.context = spec.vocab_size, spec.context
        self.eos_ids: frozenset[int] = frozenset()

    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        return self._oracle.logits(ids).astype(np.float32)

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        self._cache = self._oracle.new_cache(1)
        return self.step(ids)[-1]

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        y, self._cache = self._oracle.forward(ids[None], self._cache)
        return y[0].astype(np.float32)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> bytes:
        return bytes(ids)

    def info(self) -> dict[str, Any]:
        return {"backend": "numpy", "device": "cpu", "precision": str(self._oracle.ops.dtype)}

    def close(self) -> None:
        self._cache = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
