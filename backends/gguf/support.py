"""What llama.cpp carries: pure data, answered without gguf or llama-cpp-python."""

from __future__ import annotations

from backends.base import Support
from backends.carriers import explained
from backends.gguf.carriers import CARRIERS
from backends.gguf.fit import Fit, choose, examine
from backends.gguf.mixtures import floored
from backends.gguf.names import slots
from backends.gguf.recipe import ALIASES, LEVELS, recipe, wanting
from backends.gguf.types import PORTABLE, TYPES
from spec.config import Spec
from spec.errors import nearest
from spec.levels import GROUPS, fits

CACHES = {
    "f32": "f32", "f16": "f16", "bf16": "bf16", "q8": "q8_0", "q5": "q5_0", "q4": "q4_0",
    **{t: t for t in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")},
}  # fmt: skip
"""What `--cache` may be, and the ggml type that it is: those that llama.cpp writes keys and values in."""

IMPORTANCE = True
"""Native types are rounded by what each input counts: `support`, `build.recipe` and `build.writer` take it."""

RECENT = frozenset({"granite_swa", "step35", "hy_v3", "mimo2", "mellum", "exaone-moe", "cohere2moe", "minimax-m2"})
"""Carriers that only recent versions of llama.cpp know (llama-cpp-python 0.3.36 does)."""


def levels() -> tuple[str, ...]:
    """Every precision level: the portable ones, then llama.cpp's own by its names."""
    return tuple(dict.fromkeys([*PORTABLE, *LEVELS, *ALIASES]))


def support(spec: Spec, level: str, *, importance: bool = False) -> Support:
    """Whether and how llama.cpp carries `spec` at `level`. importance: whether the inputs of its matrices were
    measured."""
    if level not in levels():
        return Support("gguf", refusals=(f"level: {level} is none of GGUF's ({nearest(level, levels())})",))
    fit = choose(spec)
    refusals = explained(fit, [examine(spec, c) for c in CARRIERS], "llama.cpp")
    if not importance and level in LEVELS and not fit.refusals and wanting(recipe(spec, level), level):
        closest = "iq3_s" if level.startswith("iq3") else "q2_k"
        refusals.append(f"level: {level} needs importance: --calibrate stdlib measures it, --imatrix FILE brings it "
                        f"({closest} does without)")  # fmt: skip
    if refusals:
        return Support("gguf", fit.carrier.arch, refusals=tuple(refusals))
    notes = tuple(_notes(spec, fit, level, importance))
    return Support("gguf", fit.carrier.arch, tuple(f.text for f in fit.folds), (), notes)


def _notes(spec: Spec, fit: Fit, level: str, importance: bool) -> list[str]:
    out = []
    if fit.carrier.arch in RECENT:
        out.append(f"the {fit.carrier.arch} architecture needs a recent llama.cpp (llama-cpp-python 0.3.36 or later)")
    if fit.rotary.session is not None:
        out.append(f"rotary tables are those of a session of {fit.rotary.session} tokens, at every length")
    if floored(spec):
        out.append("llama.cpp divides weights of experts by at least 2^-14, were their sum smaller")
    if level in PORTABLE:
        found = [s for s in slots(spec, fit) if s.matrix and not s.type]
        narrow = [s for s in found if not fits(level, s.shape[-1])]
        if narrow:
            widths = sorted({s.shape[-1] for s in narrow})
            out.append(f"{len(narrow)} matrices stay f16: widths {widths} are no multiples of {GROUPS[level]}")
    else:
        kinds = recipe(spec, level, importance=importance)
        mixed = {t: list(kinds.values()).count(t) for t in dict.fromkeys(kinds.values()) if t != "f32"}
        out.append("types: " + ", ".join(f"{n} x {t}" for t, n in mixed.items()))
    return out


def bits(level: str) -> float:
    """Bits that a weight takes at a level or in one of the types that a recipe names, scales counted."""
    kind = TYPES[PORTABLE.get(level, level)]
    return 8 * kind.size / kind.block
