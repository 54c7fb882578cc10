"""Native mixtures (q4_k_m, ...): which ggml type llama.cpp gives each tensor, without an importance matrix.

The rules are those of llama.cpp's quantizer; here they are tables from a tensor's part and layer to a type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from backends.gguf.fit import choose
from backends.gguf.mixtures import mixtures
from backends.gguf.names import Slot, slots
from backends.gguf.types import TYPES, fitting
from spec.config import Spec

Rule = Callable[[int, int], bool]
"""Whether layer i of n is treated specially."""


def more_bits(i: int, n: int) -> bool:
    """The first and last eighth of the layers, and every third in between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def early(share: int) -> Rule:
    return lambda i, n: i < n // share


def first(count: int) -> Rule:
    return lambda i, n: i < count


def always(i: int, n: int) -> bool:
    return True


@dataclass(frozen=True)
class Mixture:
    """`base` for everything; `parts` name exceptions: (rule, type) pairs, the first that holds wins."""

    base: str
    parts: dict[str, tuple[tuple[Rule, str], ...]] = field(default_factory=dict)
    wide_v: str | None = None
    """Type of v where four or more query heads share a kv-head."""
    embedding: str | None = None
    """Type of an untied embedding."""
    experts: str | None = None
    """Type of the experts of a mixture."""


MIXTURES = {
    "q2_k": Mixture("q2_k", {"v": ((always, "q3_k"),), "down": ((always, "q3_k"),), "o": ((always, "q3_k"),)}, "q4_k"),
    "q3_k_s": Mixture("q3_k"),
    "q3_k_m": Mixture("q3_k", {
        "v": ((first(2), "q5_k"), (always, "q4_k")), "down": ((early(16), "q5_k"), (always, "q4_k")),
        "o": ((always, "q4_k"),),
    }),
    "q3_k_l": Mixture("q3_k", {"v": ((always, "q5_k"),), "down": ((always, "q5_k"),), "o": ((always, "q5_k"),)}),
    "q4_k_s": Mixture("q4_k", {"v": ((first(4), "q5_k"),), "down": ((early(8), "q5_k"),)}),
    "q4_k_m": Mixture("q4_k", {"v": ((more_bits, "q6_k"),), "down": ((more_bits, "q6_k"),)}),
    "q5_k_s": Mixture("q5_k"),
    "q5_k_m": Mixture("q5_k", {"v": ((more_bits, "q6_k"),), "down": ((more_bits, "q6_k"),)}),
    "iq3_s": Mixture("iq3_s", {}, "q4_k"),
    "iq3_m": Mixture("iq3_s", {"v": ((always, "q4_k"),), "down": ((early(8), "q4_k"),), "o": ((always, "q4_k"),)}),
    "iq4_nl": Mixture("iq4_nl", {"down": ((early(8), "q5_k"),)}, "q5_k"),
    "iq4_xs": Mixture("iq4_xs", {"down": ((early(8), "q5_k"),)}, "q5_k"),
    "tq1_0": Mixture("tq1_0", {}, None, "q4_k"),
    "tq2_0": Mixture("tq2_0", {}, None, "q4_k"),
    "mxfp4_moe": Mixture("q8_0", experts="mxfp4"),
}  # fmt: skip
"""llama.cpp's file types whose tensors differ in type. Every other level gives all matrices its own type."""

ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
"""Types whose name alone stands for a mixture, as in llama.cpp."""

LEVELS = tuple(dict.fromkeys([*(t for t in TYPES if t not in ("f32", "f16", "bf16", *ALIASES)), *MIXTURES]))
"""Native levels by llama.cpp's names."""

MIXTRAL = 8
"""Experts at which llama.cpp spends more on attention: v and k as q8_0, o as q5_k."""

MIXTRAL_O = frozenset({"q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_xs"})

_PARTS = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_qkv": "v", "attn_output": "o", "ffn_gate": "gate",
    "ffn_up": "up", "ffn_down": "down", "ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down",
    "ffn_gate_shexp": "gate", "ffn_up_shexp": "up", "ffn_down_shexp": "down",
}  # fmt: skip
"""A fused qkv is treated as v, the most sensitive of the three."""


def mixture(level: str) -> Mixture:
    """The rules of a native level."""
    name = ALIASES.get(level, level)
    return MIXTURES.get(name) or Mixture(name)


def recipe(spec: Spec, level: str) -> dict[str, str]:
    """Canonical tensor name to ggml type, for a native level; vectors and learned positions stay f32."""
    fit = choose(spec)
    out: dict[str, str] = {}
    for s in slots(spec, fit):
        kind = s.type or (_type(spec, s, level) if s.matrix else "f32")
        for p in s.pieces:
            out[p.name] = kind  # an embedding that is stored as the head too takes the head's type, which comes last
    return out


def _type(spec: Spec, s: Slot, level: str) -> str:
    mix = mixture(level)
    stem, width = s.name.removesuffix(".weight"), s.shape[-1]
    if stem == "position_embd":
        return "f32"
    if stem == "output" or (stem == "token_embd" and spec.head.tied):
        return fitting(_head(mix.base, width), width)
    if stem == "token_embd":
        return fitting(mix.embedding or mix.base, width)
    _, layer, tail = stem.split(".", 2)
    return fitting(_layer_type(spec, level, _PARTS[tail], int(layer), tail.endswith("_exps")), width)


def _head(base: str, width: int) -> str:
    if base == "q8_0" or width % TYPES[base].block:
        return "q8_0"
    return "q6_k"


def _layer_type(spec: Spec, level: str, part: str, layer: int, experts: bool) -> str:
    mix, a = mixture(level), spec.layers[0].attention
    if mix.experts:
        return mix.experts if experts else mix.base
    if any(m.experts == MIXTRAL for m in mixtures(spec)):
        name = ALIASES.get(level, level)
        if part in ("v", "k"):
            return "q8_0"
        if part == "o":
            return "q5_k" if name in MIXTRAL_O else mix.base
        if part == "down" and name == "iq3_m" and more_bits(layer, spec.depth):
            return "q4_k"
    if part == "v" and mix.wide_v and a.heads // (a.kv_heads or a.heads) >= 4:
        return mix.wide_v
    return next((t for holds, t in mix.parts.get(part, ()) if holds(layer, spec.depth)), mix.base)
