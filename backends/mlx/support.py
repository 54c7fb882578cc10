"""What MLX carries: every spec, as an architecture of mlx-lm's own where that computes it right, else with model.py."""

from __future__ import annotations

from backends.base import Option, Support
from backends.mlx import levels as kinds
from backends.mlx.choose import choose
from backends.mlx.choose import nearest as closest
from backends.mlx.layout import BUNDLED, fixed
from spec.config import Spec
from spec.errors import nearest

OPTIONS = (
    Option(
        "compute", ("f32", "f16", "bf16"), "",
        "dtype of activations, norms, scales and cache (by default the level's own; f16 where weights are quantized)",
    ),
)  # fmt: skip

CACHES = ("f32", "f16", "bf16", *(f"q{b}{g}" for b in (8, 6, 5, 4, 3, 2) for g in ("", "-g32", "-g64", "-g128")))
"""What `--cache` may be: the dtype that the artifact computes in, or `mx.quantize`'s bits and group; by default groups
of 64 as in mlx-lm, or of 32 where heads want it."""


def levels() -> tuple[str, ...]:
    """Every precision level: the portable ones, then MLX's own."""
    return kinds.known()


def support(spec: Spec, level: str, *, compute: str = "") -> Support:
    """How MLX carries `spec` at `level`, computing in `compute`."""
    if level not in levels():
        return Support("mlx", refusals=(f"level: {level} is none of MLX's ({nearest(level, levels())})",))
    allowed = kinds.computes(level)
    if compute and compute not in allowed:
        why = f"compute: {compute} on {level} weights would make MLX compute in float32"
        return Support("mlx", refusals=(f"{why} (choose {' or '.join(allowed)}, or another level)",))
    compute = compute or allowed[0]
    fit = choose(spec, level, compute)
    flags = "--trust-remote-code" if fit.carrier == BUNDLED else ""
    return Support("mlx", fit.carrier, fit.folds, (), tuple(_notes(spec, level, compute, fit.carrier)), flags)


def _notes(spec: Spec, level: str, compute: str, carrier: str) -> list[str]:
    out = []
    if carrier == BUNDLED:
        arch, lacks = closest(spec, level, compute)
        out.append(
            f"no architecture of mlx-lm computes this (nearest: {arch}, which lacks {', '.join(lacks)}), so the folder "
            "brings its model.py, which mlx-lm runs only when told to trust it: mlx_lm.generate --trust-remote-code, "
            "mlx_lm.server --trust-remote-code, mlx_lm.load(path, trust_remote_code=True)"
        )
    stays = kinds.unpacked(spec, level)
    if stays:
        out.append(f"{len(stays)} matrices stay f16: position tables, or widths that are no multiple of the group")
    if compute != "f32":
        wider = "bf16" if "bf16" in kinds.computes(level) else "f32"
        limit = f"; a model whose activations exceed 65504 needs --compute {wider}" if compute == "f16" else ""
        out.append(f"computes in {compute}, and stores norms, biases and scales in it{limit}")
    if fixed(spec):
        out.append(f"rotary tables are those of a session of {spec.context} tokens, at every length")
    return out


def bits(level: str) -> float:
    """Bits that a weight takes at a level, scales counted (16-bit ones)."""
    packed = kinds.GRID.get(level) or kinds.NATIVE.get(level)
    return packed.stored if packed is not None else {"f32": 32.0, "f16": 16.0, "bf16": 16.0}[level]
