"""What ONNX Runtime carries: everything in the language, by one operator or another. Answered without ONNX."""

from __future__ import annotations

from collections import Counter

from backends.base import Option, Support
from backends.onnx.kernels import activations_of, grouped_experts, kernel
from spec.config import DynamicScaling, LongRopeScaling, MoE, Rope, Spec
from spec.errors import nearest
from spec.levels import GROUPS, LEVELS, fits
from spec.params import params
from spec.rope import rope_tables

OPTIONS = (
    Option("profile", ("ort", "portable"), "ort", "ort: ONNX Runtime's fused operators; portable: standard ones only"),
    Option("compute", ("f32", "f16", "bf16"), "f32", "type of activations and caches: f32 for CPUs, 16 bits for CUDA"),
    Option(
        "activations", ("int8", "float"), "",
        "inputs of products with q8 or q4 weights: int8 (fast on CPUs, and what f32 compute has by default) or float",
    ),
)  # fmt: skip

HOLDS = {"f32": tuple(LEVELS), "f16": ("f16", *GROUPS), "bf16": ("bf16", *GROUPS)}
"""Levels whose weights a compute type holds without rounding them again."""

LOOP = "Loop over experts"
LARGE = 32 << 20
"""Bytes of rotary tables that are worth a note."""


def levels() -> tuple[str, ...]:
    """Every precision level."""
    return tuple(LEVELS)


def bits(level: str) -> float:
    """Bits that a weight takes at a level, scales counted."""
    return LEVELS[level].stored


def session(spec: Spec) -> int | None:
    """Tokens of the session whose rotary tables are fixed in the graph; none where they do not depend on it."""
    positions = [b.attention.position for b in spec.layers]
    fixed = any(isinstance(p, Rope) and isinstance(p.scaling, DynamicScaling | LongRopeScaling) for p in positions)
    return spec.context if fixed else None


def support(spec: Spec, level: str, *, profile: str = "ort", compute: str = "f32", activations: str = "") -> Support:
    """Whether and how ONNX Runtime carries `spec` at `level`."""
    refusals = []
    if level not in LEVELS:
        refusals.append(f"level: {level} is none of ONNX's ({nearest(level, LEVELS)})")
    for option, value in zip(OPTIONS, (profile, compute, activations), strict=True):
        if value not in (*option.choices, option.default):
            refusals.append(f"{option.name}: {value} is no choice ({nearest(value, option.choices)})")
    if not refusals and level not in HOLDS[compute]:
        others = [c for c in HOLDS if level in HOLDS[c]]
        refusals.append(
            f"compute: {compute} would round the weights of level {level} again "
            f"(try --compute {others[-1]}, or --quant {HOLDS[compute][0]})"
        )
    if not refusals and activations == "int8":
        refusals += _not_int8(level, profile, compute)
    if refusals:
        return Support("onnx", refusals=tuple(refusals))
    activations = activations_of(profile, compute, activations)
    kinds = Counter(kernel(b.attention, profile, compute) for b in spec.layers)
    mixed = _experts(spec, level, profile, compute, activations)
    counted = [*((n, k.value) for k, n in kinds.items()), *((n, name) for name, n in mixed.items())]
    notes = _notes(spec, level, compute)
    if level in GROUPS and profile == "ort" and mixed[LOOP]:
        notes.append(f"experts of {mixed[LOOP]} layers are no case for QMoE: dequantized one by one as they are called")
    return Support("onnx", f"{profile}: " + ", ".join(f"{n} x {name}" for n, name in counted), (), (), tuple(notes))


def _not_int8(level: str, profile: str, compute: str) -> list[str]:
    """Why the inputs of products can't be int8; nothing where they can."""
    if level not in GROUPS:
        return [f"activations: int8 is for products with q8 or q4 weights, and {level} has none (leave it out)"]
    if profile != "ort":
        return [f"activations: int8 is in ONNX Runtime's own operators alone, and {profile} has none (--profile ort)"]
    if compute != "f32":
        return [f"activations: int8 is computed on CPUs alone, and {compute} is for CUDA (--compute f32)"]
    return []


def _experts(spec: Spec, level: str, profile: str, compute: str, activations: str) -> Counter[str]:
    """How many layers' experts are run by which operator."""

    def stored(width: int) -> str:
        return level if fits(level, width) else "f16"

    found: Counter[str] = Counter()
    for m in (b.mlp for b in spec.layers if isinstance(b.mlp, MoE)):
        levels = {"gate": stored(spec.width), "up": stored(spec.width), "down": stored(m.hidden)}
        found["QMoE" if grouped_experts(m, profile, compute, levels, activations) else LOOP] += 1
    return found


def _notes(spec: Spec, level: str, compute: str) -> list[str]:
    out = []
    if (fixed := session(spec)) is not None:
        out.append(f"rotary tables are those of a session of {fixed} tokens, at every length")
    tables = sum(8 * len(t.inv_freq) * spec.context for t in rope_tables(spec))
    if tables >= LARGE:
        out.append(f"rotary tables for {spec.context} tokens take {tables / 1e6:,.0f} MB")
    if level in GROUPS:
        narrow = [p for p in params(spec) if p.matrix and not fits(level, p.shape[-1]) and p.name != "positions.weight"]
        if narrow:
            widths = sorted({p.shape[-1] for p in narrow})
            out.append(f"{len(narrow)} matrices stay f16: widths {widths} are no multiples of {GROUPS[level]}")
    if compute != "f32":
        out.append(f"computes in {compute}: for CUDA")
    return out
