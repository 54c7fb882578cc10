"""Native mixtures (q4_k_m, ...): which ggml type llama.cpp gives each tensor, without an importance matrix.

The rules are those of llama.cpp's quantizer; here they are tables from a tensor's part and layer to a type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from backends.gguf.fit import choose
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
}  # fmt: skip
"""llama.cpp's file types whose tensors differ in type. Every other level gives all matrices its own type."""

ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
"""Types whose name alone stands for a mixture, as in llama.cpp."""

LEVELS = tuple(dict.fromkeys([*(t for t in TYPES if t not in ("f32", "f16", "bf16", *ALIASES)), *MIXTURES]))
"""Native levels by llama.cpp's names."""

_PARTS = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_qkv": "v", "attn_output": "o", "ffn_gate": "gate",
    "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
"""A fused qkv is treated as v, the most sensitive of the three."""


def mixture(level: str) -> Mixture:
    """The rules of a native level."""
    name = ALIASES.get(level, level)
    return MIXTURES.get(name) or Mixture(name)


def recipe(spec: Spec, level: str) -> dict[str, str]:
    """Canonical tensor name to ggml type, for a native level; vectors and learned positions stay f32."""
    fit = choose(spec)
    mix = mixture(level)
    out: dict[str, str] = {}
    for s in slots(spec, fit):
        kind = _type(spec, s, mix) if s.matrix else "f32"
        for p in s.pieces:
            out[p.name] = kind  # an embedding that is stored as the head too takes the head's type, which comes last
    return out


def _type(spec: Spec, s: Slot, mix: Mixture) -> str:
    stem, width = s.name.removesuffix(".weight"), s.shape[-1]
    if stem == "position_embd":
        return "f32"
    if stem == "output" or (stem == "token_embd" and spec.head.tied):
        return fitting(_head(mix.base, width), width)
    if stem == "token_embd":
        return fitting(mix.embedding or mix.base, width)
    _, layer, tail = stem.split(".", 2)
    return fitting(_layer_type(spec, mix, _PARTS[tail], int(layer)), width)


def _head(base: str, width: int) -> str:
    if base == "q8_0" or width % TYPES[base].block:
        return "q8_0"
    return "q6_k"


def _layer_type(spec: Spec, mix: Mixture, part: str, layer: int) -> str:
    a = spec.layers[0].attention
    if part == "v" and mix.wide_v and a.heads // (a.kv_heads or a.heads) >= 4:
        return mix.wide_v
    return next((t for holds, t in mix.parts.get(part, ()) if holds(layer, spec.depth)), mix.base)
