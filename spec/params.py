"""Every parameter's canonical name and shape, in canonical order. Checkpoints, converters and initialisation read this.

Shapes: D width, V vocab, H q-heads, G kv-heads, K head_dim, F mlp hidden, E experts.
Linear weights are [out, in]. Experts lie one after another in the rows of one tensor, as heads do in q: [E * F, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from spec.config import Block, FeedForward, MoE, Norm, Spec

Role = Literal["embedding", "linear", "experts", "router", "gain", "bias", "sinks"]
"""`experts`: the linear weights of all experts of a layer, one below the other, [E * out, in]; `router`: products that
choose (or gate) and are never quantized."""


@dataclass(frozen=True)
class Param:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def matrix(self) -> bool:
        """Whether quantization applies (linear weights, those of experts, and embeddings)."""
        return self.role in ("linear", "embedding", "experts")


def _linear(name: str, out: int, into: int, bias: bool) -> Iterator[Param]:
    yield Param(f"{name}.weight", (out, into), "linear")
    if bias:
        yield Param(f"{name}.bias", (out,), "bias")


def _norm(name: str, norm: Norm, size: int) -> Iterator[Param]:
    if norm.weight:
        yield Param(f"{name}.weight", (size,), "gain")
    if norm.bias:
        yield Param(f"{name}.bias", (size,), "bias")


def _feed_forward(name: str, m: FeedForward, width: int, experts: int = 1, role: Role = "linear") -> Iterator[Param]:
    shapes = {"gate": (m.hidden, width), "up": (m.hidden, width), "down": (width, m.hidden)}
    for part, (out, into) in shapes.items():
        if part != "gate" or m.gated:
            yield Param(f"{name}.{part}.weight", (experts * out, into), role)
            if getattr(m.bias, part):
                yield Param(f"{name}.{part}.bias", (experts * out,), "bias")


def _mixture(m: MoE, width: int) -> Iterator[Param]:
    yield Param("mlp.router.weight", (m.experts, width), "router")
    if m.router.bias:
        yield Param("mlp.router.bias", (m.experts,), "bias")
    if m.router.correction:
        yield Param("mlp.router.correction", (m.experts,), "bias")
    yield from _feed_forward("mlp.experts", m, width, m.experts, "experts")
    if m.shared is not None:
        yield from _feed_forward("mlp.shared", m.shared_mlp, width)
        if m.shared.gate:
            yield Param("mlp.shared_gate.weight", (1, width), "router")


def block_params(b: Block, width: int) -> Iterator[Param]:
    """Parameters of one resolved layer, named relative to `layers.{i}.`."""
    a, m = b.attention, b.mlp
    assert a.kv_heads is not None and a.head_dim is not None, "a resolved layer"
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    if b.pre:
        yield from _norm("attn_norm", b.norm, width)
    yield from _linear("attn.q", q, width, a.bias.q)
    yield from _linear("attn.k", kv, width, a.bias.k)
    yield from _linear("attn.v", kv, width, a.bias.v)
    if a.qk_norm is not None:
        head = a.qk_norm.over == "head"
        yield from _norm("attn.q_norm", a.qk_norm, a.head_dim if head else q)
        yield from _norm("attn.k_norm", a.qk_norm, a.head_dim if head else kv)
    if a.sinks:
        yield Param("attn.sinks", (a.heads,), "sinks")
    yield from _linear("attn.o", width, q, a.bias.o)
    if b.post:
        yield from _norm("attn_post_norm", b.norm, width)
    if b.pre and not b.shared_norm:
        yield from _norm("mlp_norm", b.norm, width)
    if isinstance(m, MoE):
        yield from _mixture(m, width)
    else:
        yield from _feed_forward("mlp", m, width)
    if b.post:
        yield from _norm("mlp_post_norm", b.norm, width)


def params(spec: Spec) -> Iterator[Param]:
    """Every parameter of the model. A tied head has no weight of its own."""
    d = spec.width
    yield Param("embed.weight", (spec.vocab_size, d), "embedding")
    if spec.embedding.positions is not None:
        yield Param("positions.weight", (spec.position_rows, d), "embedding")
    if spec.embedding.norm is not None:
        yield from _norm("embed_norm", spec.embedding.norm, d)
    for i, b in enumerate(spec.layers):
        for p in block_params(b, d):
            yield Param(f"layers.{i}.{p.name}", p.shape, p.role)
    if spec.final_norm is not None:
        yield from _norm("final_norm", spec.final_norm, d)
    if not spec.head.tied:
        yield Param("head.weight", (spec.vocab_size, d), "linear")
    if spec.head.bias:
        yield Param("head.bias", (spec.vocab_size,), "bias")
