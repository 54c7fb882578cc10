"""Precision levels: the portable ones, and MLX's own quantization by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spec.config import Spec
from spec.levels import CODES, GROUPS
from spec.params import params


@dataclass(frozen=True)
class Packing:
    """How MLX stores a quantized matrix: the arguments of `mx.quantize`."""

    bits: int
    group: int
    mode: str = "affine"

    @property
    def stored(self) -> float:
        """Bits per weight: affine keeps a 16-bit scale and bias a group, the float modes an 8-bit scale."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group

    @property
    def entry(self) -> dict[str, int | str]:
        """As mlx-lm's config.json has it."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


FLOATS: Mapping[str, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""Float levels and their dtype in safetensors."""
GRID: Mapping[str, Packing] = {name: Packing(CODES[name], GROUPS[name]) for name in GROUPS}
"""The portable levels: affine with a bias of -2^(bits - 1) scales."""
NATIVE: Mapping[str, Packing] = {
    **{f"mlx-q{bits}": Packing(bits, 64) for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": Packing(4, 32, "mxfp4"),
    "mxfp8": Packing(8, 32, "mxfp8"),
    "nvfp4": Packing(4, 16, "nvfp4"),
}
"""`mx.quantize` in each of its modes, with the groups that `mlx_lm.convert` takes."""
COMPUTE: Mapping[str, tuple[str, ...]] = {"f32": ("f32",), "f16": ("f16", "f32"), "bf16": ("bf16", "f32")}
"""Dtypes of activations that float weights go with: MLX computes a product of two 16-bit kinds in float32."""


def known() -> tuple[str, ...]:
    """Every level."""
    return (*FLOATS, *GRID, *NATIVE)


def computes(level: str) -> tuple[str, ...]:
    """Dtypes of activations that a level goes with, the default first. float16 is the default of affine levels: it has
    eight times bfloat16's precision, and every Apple GPU computes in it. mlx-lm reads embeddings of float modes in
    bfloat16."""
    if level in NATIVE and NATIVE[level].mode != "affine":
        return ("bf16", "f16", "f32")
    return COMPUTE.get(level, ("f16", "bf16", "f32"))


def packing(level: str, width: int) -> Packing | None:
    """How a matrix with rows of `width` is stored at a level; none: in floats. MLX's own affine groups of 64 become 32
    where the width wants it."""
    p = GRID.get(level) or NATIVE.get(level)
    if p is not None and level in NATIVE and p.mode == "affine" and width % p.group:
        p = Packing(p.bits, 32)
    return p if p is not None and width % p.group == 0 else None


def recipe(spec: Spec, level: str) -> dict[str, str]:
    """The level of every tensor at one of MLX's own: vectors stay f32, and what MLX does not pack is f16."""
    out = {}
    for p in params(spec):
        packed = p.name != "positions.weight" and packing(level, p.shape[-1]) is not None
        out[p.name] = "f32" if not p.matrix else level if packed else "f16"
    return out


def unpacked(spec: Spec, level: str) -> tuple[str, ...]:
    """Matrices that stay floats at a quantized level."""
    if level in FLOATS:
        return ()
    return tuple(
        p.name for p in params(spec)
        if p.matrix and (p.name == "positions.weight" or packing(level, p.shape[-1]) is None)
    )  # fmt: skip
