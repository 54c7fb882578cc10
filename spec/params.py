"""Every parameter's canonical name and shape, in canonical order. Checkpoints, converters and initialisation read this.

Shapes: D width, V vocab, H q-heads, G kv-heads, K head_dim, F mlp hidden. Linear weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from spec.config import Block, Norm, Spec

Role = Literal["embedding", "linear", "gain", "bias", "sinks"]


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
        """Whether quantization applies (linear weights and embeddings)."""
        return self.role in ("linear", "embedding")


def _linear(name: str, out: int, into: int, bias: bool) -> Iterator[Param]:
    yield Param(f"{name}.weight", (out, into), "linear")
    if bias:
        yield Param(f"{name}.bias", (out,), "bias")


def _norm(name: str, norm: Norm, size: int) -> Iterator[Param]:
    if norm.weight:
        yield Param(f"{name}.weight", (size,), "gain")
    if norm.bias:
        yield Param(f"{name}.bias", (size,), "bias")


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
    if m.gated:
        yield from _linear("mlp.gate", m.hidden, width, m.bias.gate)
    yield from _linear("mlp.up", m.hidden, width, m.bias.up)
    yield from _linear("mlp.down", width, m.hidden, m.bias.down)
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
