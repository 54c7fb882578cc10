"""What TensorRT carries, answered without TensorRT: what its parser and builder were measured to take.

`parity_tests/test_tensorrt.py` parses and builds every feature at every level with TensorRT-RTX, which needs no GPU.
"""

from __future__ import annotations

from collections import Counter

from backends import experts, narrow
from backends.base import Option, Support
from backends.tensorrt import graph
from backends.tensorrt.engine import limits
from backends.tensorrt.graph import session, written_out
from spec.config import Spec
from spec.errors import nearest
from spec.levels import GROUPS, LEVELS, fits
from spec.params import params

COMPUTE = {"f32": "f32", "bf16": "bf16", "f16": "f16", **dict.fromkeys((*GROUPS, *narrow.LEVELS), "f16")}
"""The type of activations and caches where none is asked for: what holds the level's weights."""

OPTIONS = (Option("compute", ("f16", "bf16", "f32"), "", "type of activations and caches; f16 for quantized weights"),)

HOLDS = {
    kind: (*held, *(narrow.LEVELS if kind != "bf16" else ()))  # embeddings and heads are f16 there
    for kind, held in graph.HOLDS.items()
}
"""Levels whose weights a compute type holds without rounding them again."""

REFUSED = dict.fromkeys(
    ("mxfp8", "mxfp4"),
    "TensorRT's ONNX parser takes no scales in E8M0 (TensorRT-RTX 1.7.1 fails to import them; try fp8 or nvfp4)",
)
"""Levels that one might expect here, and why they are none."""


def levels() -> tuple[str, ...]:
    """Every precision level."""
    return (*LEVELS, *narrow.LEVELS)


def bits(level: str) -> float:
    """Bits that a weight takes at a level, scales counted."""
    return narrow.LEVELS[level] if level in narrow.LEVELS else LEVELS[level].stored


def recipe(spec: Spec, level: str) -> dict[str, str]:
    """What one of TensorRT's own levels makes of every tensor: the matrices of layers, but for routers, get it, as in
    NVIDIA's own recipes; what has no whole blocks, embeddings and head are f16, vectors f32."""
    out = {}
    for p in params(spec):
        narrowed = p.name.startswith("layers.") and narrow.fits(level, p.shape[-1])
        out[p.name] = "f32" if not p.matrix else level if narrowed else "f16"
    return out


def computed_in(level: str, compute: str) -> str:
    """The compute type that a choice, or none, stands for."""
    return compute or COMPUTE[level]


def support(spec: Spec, level: str, *, compute: str = "") -> Support:
    """Whether and how TensorRT carries `spec` at `level`."""
    refusals = experts.too_many(spec, "TensorRT")
    known = level in LEVELS or level in narrow.LEVELS
    if level in REFUSED:
        refusals.append(f"level: {level}: {REFUSED[level]}")
    elif not known:
        refusals.append(f"level: {level} is none of TensorRT's ({nearest(level, levels())})")
    if compute not in ("", *HOLDS):
        refusals.append(f"compute: {compute} is no choice ({nearest(compute, HOLDS)})")
    if known and compute in ("", *HOLDS) and level not in HOLDS[computed_in(level, compute)]:
        refusals.append(
            f"compute: {compute} would round the weights of level {level} again "
            f"(try --compute {COMPUTE[level]}, or --quant {compute})"
        )
    if refusals:
        return Support("tensorrt", refusals=tuple(refusals))
    kind = computed_in(level, compute)
    return Support("tensorrt", f"strongly typed, {kind}", (), (), tuple(_notes(spec, level, kind)))


def _notes(spec: Spec, level: str, compute: str) -> list[str]:
    out = [
        "TensorRT-RTX parses and builds graphs of every feature; the engine is built on the GPU that it is for, by "
        "tensorrt 10.15 or later, which then holds about 3 to 4 times the weights in memory"
    ]
    bounds = limits(spec, compute)
    slot = sum(2 * (b.attention.kv_heads or 0) * (b.attention.head_dim or 0) for b in spec.layers)
    cache = slot * spec.context * (4 if compute == "f32" else 2)
    out.append(
        f"a sequence's cache of {spec.context:,} tokens takes {cache / 1e6:,.1f} MB; "
        f"prompts go in pieces of {bounds.chunk} tokens"
    )
    if (fixed := session(spec)) is not None:
        out.append(f"rotary tables are those of a session of {fixed} tokens, at every length")
    if level in GROUPS:
        odd = [p for p in params(spec) if p.matrix and not fits(level, p.shape[-1]) and p.name != "positions.weight"]
        if odd:
            widths = sorted({p.shape[-1] for p in odd})
            out.append(f"{len(odd)} matrices stay f16: widths {widths} are no multiples of {GROUPS[level]}")
    if level == "q4":
        out.append("int4 in groups of 32: TensorRT-RTX's builder takes them, TensorRT's documents name 64 and 128 "
                   "(q4-g128 has those)")  # fmt: skip
    if level in GROUPS:
        hint = "" if level == "q8" else " (--override '*=q4-g128' leaves int8 out)"
        out.append(f"int8 in groups of 32: TensorRT-RTX's builder takes them, TensorRT's documents name none{hint}")
    if level in narrow.LEVELS:
        kept = Counter(recipe(spec, level).values())["f16"]
        out.append(
            f"{level} is how weights are stored: products take them as {compute}; {kept} matrices stay f16 "
            f"(embeddings, head, position tables, and at nvfp4 widths that are no multiples of {narrow.BLOCK})"
        )
    slow = sum(written_out(b.attention, compute) for b in spec.layers)
    if slow:
        why = "float32" if compute == "f32" else "softcap, sinks, ALiBi, or a head_dim that is no multiple of 8"
        out.append(f"attention is not one fused kernel in {slow} of {spec.depth} layers: {why}")
    return out + experts.notes(spec, "TensorRT")
