"""What a spec costs: parameters, arithmetic, cache and memory, by formulas alone.

Shapes: D width, V vocab, H q-heads, G kv-heads, K head_dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spec.config import Block, MoE, Spec
from spec.levels import GROUPS, LEVELS, fits
from spec.params import Param, params

TRAIN_STATE: Mapping[str, int] = {"weights": 4, "gradients": 4, "AdamW moments": 8}
"""Bytes a parameter while training: float32 master weights, gradients, and two float32 moments."""

BITS: Mapping[str, float] = {name: 4.95 if level.bits == 4 else level.stored for name, level in LEVELS.items()}
"""Bits a weight of the portable levels (matrices, scales counted). For those of four bits an upper bound."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part. A tied head has none of its own."""

    embedding: int
    positions: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """Everything that is stored."""
        return self.embedding + self.positions + self.attention + self.mlp + self.norms + self.head

    @property
    def body(self) -> int:
        """Everything but the embedding, the position table and the head."""
        return self.attention + self.mlp + self.norms


def part(p: Param) -> str:
    """The field of `Parameters` that a parameter belongs to (QK-norms and sinks belong to attention)."""
    first, *rest = p.name.split(".")
    if first in ("embed", "positions", "head"):
        return {"embed": "embedding"}.get(first, first)
    if first == "layers" and rest[1] in ("attn", "mlp"):
        return "attention" if rest[1] == "attn" else "mlp"
    return "norms"


def count(spec: Spec) -> Parameters:
    """How many parameters the model has, by part."""
    out = dict.fromkeys(Parameters.__dataclass_fields__, 0)
    for p in params(spec):
        out[part(p)] += p.size
    return Parameters(**out)


def active(spec: Spec) -> int:
    """Parameters that one token passes: of a mixture's experts only the chosen ones."""
    return round(sum(p.size * used(spec, p) for p in params(spec)))


def used(spec: Spec, p: Param) -> float:
    """The share of a parameter that one token meets."""
    if ".mlp.experts." not in p.name:
        return 1.0
    m = spec.layers[int(p.name.split(".")[1])].mlp
    assert isinstance(m, MoE)
    return m.router.top_k / m.experts


def seen(b: Block, length: int) -> int:
    """Keys that the last of `length` tokens sees in a resolved layer: its window, or all of them."""
    return min(length, b.attention.window or length)


def flops(spec: Spec, length: int | None = None) -> int:
    """Floating-point operations of one token's forward pass in a sequence of `length` (default: the context).

    2 W + sum over layers of 4 H K min(T, window): W are the weights that a token is multiplied with (every linear,
    and the head even where it is tied; the embedding is a look-up), a multiply-add counts as two, and attention
    counts q.k and p.v over all T keys, masked ones included, as in PaLM (Chowdhery et al. 2022, appendix B), so that
    the figure agrees with published utilisation. Norms, activations, rotations and biases are left out.
    """
    length = length or spec.context
    linear = round(sum(p.size * used(spec, p) for p in params(spec) if p.role in ("linear", "experts", "router")))
    if spec.head.tied:
        linear += spec.vocab_size * spec.width
    attention = sum(4 * b.attention.heads * _head_dim(b) * seen(b, length) for b in spec.layers)
    return 2 * linear + attention


def training_flops(spec: Spec, length: int | None = None) -> int:
    """Floating-point operations a token of training: three forward passes, since the backward pass costs two."""
    return 3 * flops(spec, length)


def cache_bytes(spec: Spec, length: int | None = None, width: int = 2) -> int:
    """Bytes of the key/value cache of one sequence of `length` tokens (default: the context), `width` bytes a number.

    Sum over layers of 2 G K min(T, window) width: a layer with a window never needs more keys than that.
    """
    length = length or spec.context
    return sum(2 * _kv_width(b) * seen(b, length) * width for b in spec.layers)


def cache_bytes_per_token(spec: Spec, width: int = 2) -> int:
    """Bytes by which the cache grows with each token while no window is full: sum over layers of 2 G K width."""
    return sum(2 * _kv_width(b) * width for b in spec.layers)


def weight_bytes(spec: Spec, level: str) -> int:
    """Bytes of the weights at a portable level: vectors in float32; learned positions, and matrices whose input width
    is no multiple of the level's group, in float16. For q4 and q4-g128 an upper bound; file headers and tokenizers come
    on top."""
    bits = BITS[level]
    total = 0.0
    for p in params(spec):
        if not p.matrix:
            total += 32 * p.size
        else:
            whole = fits(level, p.shape[-1]) and p.name != "positions.weight"
            total += (bits if whole or level not in GROUPS else 16) * p.size
    return int(-(-total // 8))


def training_bytes(spec: Spec) -> int:
    """Bytes of weights, gradients and AdamW's moments in float32, summed over all devices; activations come on top."""
    return sum(TRAIN_STATE.values()) * count(spec).total


def activation_bytes(spec: Spec, length: int | None = None, width: int = 4) -> int:
    """An estimate of what the backward pass of one sequence keeps, `width` bytes a number, without recomputation.

    A layer keeps for each token the input and output of its norms, q, k and v before and after the rotation, the mix,
    and the MLP's inner vectors (gate, up, activation, product); the head keeps the logits in float32 twice (logits and
    their gradient). Attention keeps no scores (flash kernels).
    """
    length = length or spec.context
    per_token = 0
    for b in spec.layers:
        q, kv = b.attention.heads * _head_dim(b), _kv_width(b)
        norms = 2 * (b.pre + b.post)
        m = b.mlp
        hidden = (
            m.hidden if not isinstance(m, MoE) else m.hidden * m.router.top_k + (m.shared.hidden if m.shared else 0)
        )
        inner = (4 if m.gated else 2) * hidden
        per_token += 2 * norms * spec.width + 3 * q + 3 * kv + inner
    return length * (per_token * width + 2 * 4 * spec.vocab_size)


def _head_dim(b: Block) -> int:
    assert b.attention.head_dim is not None, "a resolved layer"
    return b.attention.head_dim


def _kv_width(b: Block) -> int:
    assert b.attention.kv_heads is not None, "a resolved layer"
    return b.attention.kv_heads * _head_dim(b)
