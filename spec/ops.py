"""The operations that every backend implements: what the one forward pass in `spec/forward.py` is written in.

Shapes: B batch, T query, S key, D model, H q-heads, G kv-heads, K head dim, V vocab, E experts.

`X` is the backend's activation (array, tensor, graph value), `W` its opaque weight handle (an array with its
quantization, or the layer itself: in torch and MLX `linear(x, w)` is `w(x)`), `C` one layer's cache. Operations
without a body are the backend's; the others are compounds made of them, which a backend may override with a fused
kernel, and then a test compares the two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from spec.config import Activation, Attention, Block, FeedForward, MoE, Norm
from spec.rope import RopeTable

X = TypeVar("X")
W = TypeVar("W")
C = TypeVar("C")

Layout = Literal["causal", "cached", "packed"]


@dataclass(frozen=True)
class Step(Generic[X]):
    """What one call of the forward pass needs to know besides the token ids.

    Key j is visible to query i if and only if both are of the same segment and 0 <= slot_i - slot_j < window.
    """

    layout: Layout
    """Static. `causal`: no cache, slots 0..T-1; `cached`: keys come from the cache too; `packed`: several documents
    in a row, no cache, told apart by `segments`."""
    positions: X
    """[B, T] int: position of each token in its document, for rotary and learned positions."""
    slots: X
    """[B, T] int: place of each token in the sequence or cache."""
    segments: X | None = None
    """[B, T] int: document of each token (packed), or none where there is only one."""


class Ops(ABC, Generic[X, W, C]):
    """The decoder's vocabulary. Weight arguments named `w` may be handles without a tensor (a norm without gain)."""

    # Into and out of the residual stream

    @abstractmethod
    def embed(self, ids: X, w: W, offset: int = 0) -> X:
        """Rows `ids + offset` of a table: [B, T] -> [B, T, D]."""

    @abstractmethod
    def linear(self, x: X, w: W) -> X:
        """`x @ weight.T + bias`: [..., in] -> [..., out]."""

    @abstractmethod
    def unembed(self, x: X, w: W) -> X:
        """The head's linear: [B, T, D] -> [B, T, V]."""

    @abstractmethod
    def last(self, x: X, step: Step[X]) -> X:
        """The last position only: [B, T, D] -> [B, 1, D]."""

    # Element by element

    @abstractmethod
    def norm(self, x: X, w: W, norm: Norm) -> X:
        """RMSNorm or LayerNorm over the last axis, statistics in at least float32."""

    @abstractmethod
    def act(self, x: X, kind: Activation) -> X:
        """An activation function."""

    @abstractmethod
    def add(self, x: X, y: X) -> X: ...

    @abstractmethod
    def mul(self, x: X, y: X) -> X: ...

    @abstractmethod
    def scale(self, x: X, factor: float) -> X:
        """`x * factor`."""

    @abstractmethod
    def softcap(self, x: X, cap: float) -> X:
        """`cap * tanh(x / cap)`."""

    @abstractmethod
    def clip(self, x: X, low: float | None, high: float | None) -> X:
        """`x` clamped to [low, high]; none leaves a side open."""

    def drop(self, x: X, p: float) -> X:
        """Dropout with probability p; only training drops."""
        return x

    @abstractmethod
    def cast(self, x: X) -> X:
        """To the compute dtype of the residual stream."""

    # Heads and attention

    @abstractmethod
    def split_heads(self, x: X, head_dim: int) -> X:
        """[B, T, H*K] -> [B, H, T, K]. Takes no head count, since tensor parallelism shards heads."""

    @abstractmethod
    def merge_heads(self, x: X) -> X:
        """[B, H, T, K] -> [B, T, H*K]."""

    @abstractmethod
    def rotation(self, table: RopeTable, step: Step[X]) -> Any:
        """What `rope` needs of one table for this step (cos and sin [B, T, dim/2], a graph's caches); once a step."""

    @abstractmethod
    def rope(self, x: X, rotation: Any) -> X:
        """The first `dim` of K dimensions rotated in half-split pairs, the rest passed through: [B, H, T, K]."""

    @abstractmethod
    def store(self, k: X, v: X, step: Step[X], cache: C | None) -> tuple[X, X, Any, C | None]:
        """New keys and values into the cache. Returns all keys and values [B, G, S, K], their slots, and the cache."""

    @abstractmethod
    def mix(self, q: X, k: X, v: X, step: Step[X], key_slots: Any, a: Attention, w: Any) -> X:
        """Scores, scale, softcap, mask (window, segments, ALiBi by `w.slopes`), softmax in float32 with `w.sinks`,
        values: q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K]. Query head h reads kv-head h // (H / G)."""

    def attend(
        self, q: X, k: X, v: X, step: Step[X], cache: C | None, rotation: Any | None, a: Attention, w: Any
    ) -> tuple[X, C | None]:
        """Rotate, store, mix: q, k and v come unrotated. `rotation` is none where the layer does not rotate."""
        if rotation is not None:
            q = self.tap(self.rope(q, rotation), "attn.q_rope")
            k = self.tap(self.rope(k, rotation), "attn.k_rope")
        k, v, key_slots, cache = self.store(k, v, step, cache)
        return self.mix(q, k, v, step, key_slots, a, w), cache

    # Mixture of experts

    @abstractmethod
    def route(self, x: X, w: W, m: MoE) -> Any:
        """Which experts each token of x [B, T, D] goes to and how much each counts (`config.Router` has the formula),
        computed in at least float32: whatever `experts` of this backend takes."""

    @abstractmethod
    def experts(self, x: X, routes: Any, w: Any, m: MoE) -> X:
        """Sum over a token's experts of weight * `dense`(x): [B, T, D] -> [B, T, D]. `w` has `gate`, `up`, `down`: the
        layers of all experts, one below the other."""

    @abstractmethod
    def gate(self, x: X, y: X) -> X:
        """`x * sigmoid(y)`: [B, T, D], [B, T, 1] -> [B, T, D]."""

    # Compounds that runtimes fuse

    def project(self, x: X, ws: Sequence[W]) -> list[X]:
        """Several linears of one input: q, k, v or gate, up."""
        return [self.linear(x, w) for w in ws]

    def glu(self, gate: X, up: X, m: FeedForward) -> X:
        """`act(gate) * up`, or the clamped form of GPT-OSS."""
        if m.activation != "clamped_swiglu":
            return self.mul(self.act(gate, m.activation), up)
        gate = self.clip(gate, None, m.limit)
        up = self.clip(up, -m.limit, m.limit)
        swish = self.scale(self.act(self.scale(gate, m.alpha), "silu"), 1 / m.alpha)  # g * sigmoid(alpha * g)
        return self.add(self.mul(swish, up), swish)

    def add_norm(self, x: X, y: X, w: W, norm: Norm) -> tuple[X, X]:
        """`x + y`, and its norm."""
        x = self.add(x, y)
        return x, self.norm(x, w, norm)

    # Structure

    def call(self, i: int, b: Block, w: Any, x: X, step: Step[X], rotation: Any, cache: C | None) -> tuple[X, C | None]:
        """Run layer i. torch calls the layer's module, so that FSDP hooks fire; a builder opens a name scope."""
        from spec.forward import block

        return block(self, b, w, x, step, rotation, cache)

    def tap(self, x: X, name: str) -> X:
        """Give an intermediate its canonical name (relative to the layer inside one); returns it."""
        return x
