"""What llama.cpp carries: pure data, answered without gguf or llama-cpp-python."""

from __future__ import annotations

from backends.base import Support
from backends.carriers import explained
from backends.gguf.carriers import CARRIERS
from backends.gguf.fit import Fit, choose, examine
from backends.gguf.mixtures import floored
from backends.gguf.names import slots
from backends.gguf.recipe import ALIASES, LEVELS, recipe
from backends.gguf.types import PORTABLE, TYPES, fitting
from spec.config import Spec
from spec.errors import nearest

RECENT = frozenset({"granite_swa", "step35", "hy_v3", "mimo2", "mellum", "exaone-moe", "cohere2moe", "minimax-m2"})
"""Carriers that only recent versions of llama.cpp know (llama-cpp-python 0.3.36 does)."""


def levels() -> tuple[str, ...]:
    """Every precision level: the portable ones, then llama.cpp's own by its names."""
    return tuple(dict.fromkeys([*PORTABLE, *LEVELS, *ALIASES]))


def support(spec: Spec, level: str) -> Support:
    """Whether and how llama.cpp carries `spec` at `level`."""
    if level not in levels():
        return Support("gguf", refusals=(f"level: {level} is none of GGUF's ({nearest(level, levels())})",))
    fit = choose(spec)
    refusals = explained(fit, [examine(spec, c) for c in CARRIERS], "llama.cpp")
    if level in TYPES and TYPES[level].importance:
        closest = "iq3_s" if level.startswith("iq3") else "q2_k"
        refusals.append(f"level: {level} needs an importance matrix, which converting does not compute (try {closest})")
    if refusals:
        return Support("gguf", fit.carrier.arch, refusals=tuple(refusals))
    return Support("gguf", fit.carrier.arch, tuple(f.text for f in fit.folds), (), tuple(_notes(spec, fit, level)))


def _notes(spec: Spec, fit: Fit, level: str) -> list[str]:
    out = []
    if fit.carrier.arch in RECENT:
        out.append(f"the {fit.carrier.arch} architecture needs a recent llama.cpp (llama-cpp-python 0.3.36 or later)")
    if fit.rotary.session is not None:
        out.append(f"rotary tables are those of a session of {fit.rotary.session} tokens, at every length")
    if floored(spec):
        out.append("llama.cpp divides weights of experts by at least 2^-14, were their sum smaller")
    if level in PORTABLE:
        wanted = PORTABLE[level]
        found = [s for s in slots(spec, fit) if s.matrix and not s.type]
        narrow = [s for s in found if fitting(wanted, s.shape[-1]) != wanted]
        if narrow:
            widths = sorted({s.shape[-1] for s in narrow})
            out.append(f"{len(narrow)} matrices stay f16: widths {widths} are no multiples of 32")
    else:
        kinds = recipe(spec, level)
        mixed = {t: list(kinds.values()).count(t) for t in dict.fromkeys(kinds.values()) if t != "f32"}
        out.append("types: " + ", ".join(f"{n} x {t}" for t, n in mixed.items()))
    return out


def bits(level: str) -> float:
    """Bits that a weight takes at a level or in one of the types that a recipe names, scales counted."""
    kind = TYPES[PORTABLE.get(level, level)]
    return 8 * kind.size / kind.block
