"""What a Core ML package carries: pure data, answered without coremltools."""

from __future__ import annotations

from collections.abc import Iterable

from backends import experts
from backends.base import Option, Planned, Support
from backends.coreml.palettes import BITS as PALETTES
from spec.config import DynamicScaling, LongRopeScaling, Rope, Spec
from spec.errors import nearest
from spec.levels import LEVELS
from spec.params import params

PORTABLE = {level.name: level.stored for level in LEVELS.values() if level.name != "bf16"}
"""Portable levels that MIL has constants for, with the bits of a weight."""
COUNTER = 1024
"""Beyond 2048 tokens float16 holds no single count: the position is kept as tokens % COUNTER and tokens // COUNTER."""
LONGEST = COUNTER * 2048
"""Tokens that the two counters hold exactly."""
OPTIONS = (
    Option("compute", ("f16", "f32"), "", "dtype of activations; by default f32 at level f32, else f16"),
    Option("functions", ("one", "two"), "one", "`two`: prefill, and decode with a fixed length of 1, sharing weights"),
)


def levels() -> tuple[str, ...]:
    """Every precision level: the portable ones that MIL has, then palettes."""
    return (*PORTABLE, *PALETTES)


def bits(level: str) -> float:
    """Bits that a weight takes, scales counted; a palette's own table (for 32 rows or more) is not."""
    return PORTABLE[level] if level in PORTABLE else float(PALETTES[level])


def compute_of(chosen: str, matrices: Iterable[str]) -> str:
    """The compute dtype: the option, or what the levels of the matrices ask for."""
    return chosen or ("f32" if "f32" in matrices else "f16")


def compute_dtype(chosen: str, planned: Iterable[Planned]) -> str:
    """`compute_of` for planned tensors."""
    return compute_of(chosen, [p.level for p in planned if len(p.shape) > 1])


def counters(spec: Spec) -> int:
    """Numbers in the `position` state: one where float16 counts far enough."""
    return 1 if spec.context <= 2 * COUNTER else 2


def cache_shape(spec: Spec) -> tuple[int, int, int, int, int]:
    """[layers, 1, G, context, K] of the key and of the value state; layers with fewer or narrower heads use a part."""
    heads = [(b.attention.kv_heads or 1, b.attention.head_dim or 1) for b in spec.layers]
    return spec.depth, 1, max(g for g, _ in heads), spec.context, max(k for _, k in heads)


def support(spec: Spec, level: str, compute: str = "", functions: str = "one") -> Support:
    """Whether and how a package carries `spec` at `level`."""
    refusals = experts.too_many(spec, "Core ML")
    if level == "bf16":
        refusals.append("level: bf16 is no Core ML type, and float16 does not hold its range (use f16; f32 is exact)")
    elif level not in levels():
        refusals.append(f"level: {level} is none of Core ML's ({nearest(level, levels())})")
    elif level == "f32" and compute == "f16":
        refusals.append("compute: f16 cannot use float32 weights (use level f16, or compute f32)")
    if spec.context < 3:
        refusals.append(f"context: {spec.context} is no range of lengths that the stateful client accepts (at least 3)")
    if spec.context > LONGEST:
        refusals.append(f"context: {spec.context} is more than two float16 counters hold (at most {LONGEST})")
    if refusals:
        return Support("coreml", refusals=tuple(refusals))
    dtype = compute_of(compute, [level])
    mixed = experts.notes(spec, "Core ML", *(["every token of a prompt"] if functions == "two" else []))
    if mixed and functions == "one":
        mixed.append("with --functions two a step of one token runs its own experts alone")
    return Support("coreml", f"mlprogram {dtype}", notes=(*_notes(spec, dtype), *mixed))


def _notes(spec: Spec, compute: str) -> list[str]:
    d, _, g, s, k = cache_shape(spec)
    out = [f"the key and value states take {2 * 2 * d * g * s * k / 1e6:,.1f} MB of float16 in every session, "
           f"windows included: {s} tokens for each layer",
           f"converting holds all {sum(p.size for p in params(spec)):,} weights in memory: a byte for each code, two "
           "or four for each float"]  # fmt: skip
    if compute == "f32":
        out.append("float32 compute stays off the Neural Engine, and states are float16 all the same")
    ropes = [b.attention.position for b in spec.layers]
    if any(isinstance(r, Rope) and isinstance(r.scaling, DynamicScaling | LongRopeScaling) for r in ropes):
        out.append(f"rotary tables are those of a session of {spec.context} tokens, at every length")
    return out
