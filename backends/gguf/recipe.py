"""Native mixtures (q4_k_m, ...): which ggml type llama.cpp gives each tensor, with an importance matrix and without.

The rules are those of llama.cpp's quantizer; here they are tables from a tensor's part and place to a type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backends.gguf.fit import Fit, choose
from backends.gguf.mixtures import mixtures
from backends.gguf.names import Slot, slots
from backends.gguf.types import TYPES, fitting
from spec.config import Spec


@dataclass(frozen=True)
class Place:
    """What the rules look at."""

    layer: int
    depth: int
    sharing: int
    """Query heads of a kv-head."""
    experts: int
    """Of each mixture; 0 without one."""
    importance: bool
    """Whether there is an importance matrix."""
    down: int = 0
    """How many `ffn_down` (of experts, of a shared expert) are stored before it."""


Rule = Callable[[Place], bool]
"""Whether a tensor is treated specially."""
Rules = tuple[tuple[Rule, str], ...]
"""(rule, type) pairs: the first that holds wins."""


def always(p: Place) -> bool:
    return True


def more_bits(p: Place) -> bool:
    """The first and last eighth of the layers, and every third in between."""
    i, n = p.layer, p.depth
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def middle(p: Place) -> bool:
    return p.depth // 8 <= p.layer < 7 * p.depth // 8


def early(share: int) -> Rule:
    return lambda p: p.layer < p.depth // share


def first(count: int) -> Rule:
    return lambda p: p.layer < count


def shared(p: Place) -> bool:
    """Whether v is small: four or more query heads share a kv-head."""
    return p.sharing >= 4


def mixtral(p: Place) -> bool:
    return p.experts == MIXTRAL


def early_blind(p: Place) -> bool:
    return not p.importance and early(8)(p)


def early_seen(p: Place) -> bool:
    return p.importance and early(8)(p)


@dataclass(frozen=True)
class Mixture:
    """`base` for everything; `parts` name exceptions."""

    base: str
    parts: Mapping[str, Rules] = field(default_factory=dict)
    embedding: str | None = None
    """Type of an untied embedding."""
    experts: str | None = None
    """Type of the experts of a mixture."""
    head: str = "q6_k"
    """Type of the head, and of a tied embedding."""


MIXTRAL = 8
"""Experts at which llama.cpp spends more on attention: v and k as q8_0, o as q5_k."""


def _low(base: str, better: str, o: Rules = (), embedding: str = "q2_k") -> Mixture:
    """The types of one and two bits; `better` is for v and for the first eighth of `down`, counted as they are stored.
    Mixtures of eight experts have rules of their own here."""
    return Mixture(base, {
        "v": ((lambda p: shared(p) or p.experts >= 4, "q4_k"), (always, better)),
        "k": ((mixtral, "q4_k"),),
        "down": ((lambda p: p.down < p.depth // 8, better),),
        "o": ((mixtral, "q5_k"), *o),
    }, embedding, head="q5_k")  # fmt: skip


LOW = {
    "iq1_s": _low("iq1_s", "q2_k", ((always, "iq2_xxs"),)),
    "iq1_m": _low("iq1_m", "q2_k", ((always, "iq2_xxs"),)),
    "iq2_xxs": _low("iq2_xxs", "q2_k"),
    "iq2_xs": _low("iq2_xs", "q2_k"),
    "iq2_s": _low("iq2_xs", "iq3_s", ((always, "iq3_s"),), "iq3_s"),
    "iq2_m": _low("iq2_s", "iq3_s", ((always, "iq3_s"),), "iq3_s"),
}
"""llama.cpp's file types of one and two bits (its `iq2_s` is mostly of type iq2_xs, its `iq2_m` of type iq2_s)."""

MIXTURES = LOW | {
    "q2_k_s": Mixture("q2_k", {"v": ((shared, "q4_k"),), "down": ((early(8), "q4_k"),)}),
    "q2_k": Mixture("q2_k", {
        "v": ((shared, "q4_k"), (always, "q3_k")), "down": ((always, "q3_k"),), "o": ((always, "q3_k"),),
    }),
    "q3_k_s": Mixture("q3_k"),
    "q3_k_m": Mixture("q3_k", {
        "v": ((first(2), "q5_k"), (always, "q4_k")), "down": ((early(16), "q5_k"), (always, "q4_k")),
        "o": ((always, "q4_k"),),
    }),
    "q3_k_l": Mixture("q3_k", {"v": ((always, "q5_k"),), "down": ((always, "q5_k"),), "o": ((always, "q5_k"),)}),
    "q4_0": Mixture("q4_0", {"down": ((early_seen, "q4_1"),)}),
    "q4_k_s": Mixture("q4_k", {"v": ((first(4), "q5_k"),), "down": ((early(8), "q5_k"),)}),
    "q4_k_m": Mixture("q4_k", {"v": ((more_bits, "q6_k"),), "down": ((more_bits, "q6_k"),)}),
    "q5_0": Mixture("q5_0", {"down": ((early_seen, "q5_1"),)}),
    "q5_k_s": Mixture("q5_k"),
    "q5_k_m": Mixture("q5_k", {"v": ((more_bits, "q6_k"),), "down": ((more_bits, "q6_k"),)}),
    "iq3_xxs": Mixture("iq3_xxs", {
        "v": ((shared, "q4_k"),), "q": ((always, "iq2_s"),), "k": ((always, "iq2_s"),), "o": ((always, "iq3_s"),),
    }, "iq3_s", head="q5_k"),
    "iq3_xs": Mixture("iq3_s", {
        "v": ((shared, "q4_k"),), "q": ((always, "iq3_xxs"),), "k": ((always, "iq3_xxs"),),
        "gate": ((middle, "iq3_xxs"),), "up": ((middle, "iq3_xxs"),),
    }),
    "iq3_s": Mixture("iq3_s", {"v": ((shared, "q4_k"),)}),
    "iq3_m": Mixture("iq3_s", {
        "v": ((always, "q4_k"),), "o": ((always, "q4_k"),),
        "down": ((lambda p: early(8)(p) or (mixtral(p) and more_bits(p)), "q4_k"),),
    }),
    "iq4_nl": Mixture("iq4_nl", {"v": ((shared, "q5_k"),), "down": ((early_blind, "q5_k"),)}),
    "iq4_xs": Mixture("iq4_xs", {"v": ((shared, "q5_k"),), "down": ((early_blind, "q5_k"),)}),
    "tq1_0": Mixture("tq1_0", embedding="q4_k"),
    "tq2_0": Mixture("tq2_0", embedding="q4_k"),
    "mxfp4_moe": Mixture("q8_0", experts="mxfp4"),
}  # fmt: skip
"""llama.cpp's file types whose tensors differ in type. Every other level gives all matrices its own type."""

ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
"""Types whose name alone stands for a mixture, as in llama.cpp."""

LEVELS = tuple(dict.fromkeys([*(t for t in TYPES if t not in ("f32", "f16", "bf16", *ALIASES)), *MIXTURES]))
"""Native levels by llama.cpp's names."""

MIXTRAL_O = frozenset({"q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m",
                       "iq4_xs"})  # fmt: skip

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


def recipe(spec: Spec, level: str, *, importance: bool = False) -> dict[str, str]:
    """Canonical tensor name to ggml type, for a native level; vectors and learned positions stay f32.

    importance: whether there is an importance matrix, with which llama.cpp mixes some levels otherwise.
    """
    fit = choose(spec)
    found = slots(spec, fit)
    places, out = _places(spec, found, importance), {}
    for s in found:
        kind = s.type or (_type(spec, fit, s, level, places.get(s.name)) if s.matrix else "f32")
        for p in s.pieces:
            out[p.name] = kind  # an embedding that is stored as the head too takes the head's type, which comes last
    return out


def wanting(levels: Mapping[str, str], level: str = "") -> list[str]:
    """Canonical names among `levels` (name to type) whose type ggml or llama.cpp refuses without importance. Embedding
    and head are exempt: llama.cpp measures none for them."""
    strict = {n for n, t in TYPES.items() if t.importance} | ({"q2_k"} if level == "q2_k_s" else set())
    return [n for n, kind in levels.items() if kind in strict and n.startswith("layers.")]


def _places(spec: Spec, found: list[Slot], importance: bool) -> dict[str, Place]:
    """Where every tensor of a layer stands, by its name in the file."""
    a, experts = spec.layers[0].attention, max((m.experts for m in mixtures(spec)), default=0)
    out, downs = {}, 0
    layers = [(int(s.name.split(".")[1]), s.name) for s in found if s.name.startswith("blk.")]
    for layer, name in sorted(layers):  # as llama.cpp orders them
        sharing = a.heads // (a.kv_heads or a.heads)
        out[name] = Place(layer, spec.depth, sharing, experts, importance, downs)
        downs += ".ffn_down" in name and name.endswith(".weight")
    return out


def _type(spec: Spec, fit: Fit, s: Slot, level: str, place: Place | None) -> str:
    mix = mixture(level)
    stem, width = s.name.removesuffix(".weight"), s.shape[-1]
    if stem == "position_embd":
        return "f32"
    if stem == "output" or (stem == "token_embd" and spec.head.tied):
        return fitting(_head(mix, width), width)
    if stem == "token_embd":
        return fitting(mix.embedding or mix.base, width)
    assert place is not None, f"{s.name} lies in a layer"
    tail = stem.split(".", 2)[2]
    if mix.experts:
        return fitting(mix.experts if tail.endswith("_exps") else mix.base, width)
    kind = _layer_type(ALIASES.get(level, level), _PARTS[tail], place)
    if _PARTS[tail] == "v" and kind in ("q3_k", "q4_k") and level not in LOW and seventy(fit.carrier.arch, place):
        kind = "q5_k"
    return fitting(kind, width)


def _head(mix: Mixture, width: int) -> str:
    if mix.base == "q8_0" or width % TYPES[mix.base].block:
        return "q8_0"
    return mix.head


def seventy(arch: str, p: Place) -> bool:
    """Whether llama.cpp takes it for a model of 70 billion, whose v is small: 80 layers, and in Llama shared heads."""
    return p.depth == 80 and (arch == "qwen2" or (arch == "llama" and p.sharing > 1 and not mixtral(p)))


def _layer_type(level: str, part: str, p: Place) -> str:
    mix = mixture(level)
    if mixtral(p) and level not in LOW:
        if part in ("v", "k"):
            return "q8_0"
        if part == "o":
            return "q5_k" if level in MIXTRAL_O else mix.base
    return next((kind for holds, kind in mix.parts.get(part, ()) if holds(p)), mix.base)
