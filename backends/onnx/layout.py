"""What the data file holds and where: every weight's containers and the constants, known before the first row arrives.

Shapes: N rows, K columns of a matrix, P positions, V vocab.

A quantized matrix is codes and scales. The standard operators want signed codes (`int4`, two to a byte, or `int8`),
the contributed ones unsigned codes about 2^(bits-1); the bytes differ by flipping each code's highest bit. Where a
matrix is read in two ways (a tied embedding: rows for the look-up, the whole for the head) the graph has two
initializers of different type or shape over the same bytes of the file. Experts lie one below the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from backends import narrow
from backends.base import Planned, QuantizedTensor
from backends.onnx.kernels import activations_of, grouped_experts
from spec.config import Alibi, MoE, Spec
from spec.levels import CODES, GROUPS
from spec.rope import alibi_slopes, rope_tables

Profile: TypeAlias = Literal["ort", "portable"]

DATA = "model.onnx.data"
MODEL = "model.onnx"
ALIGNMENT = 4096
"""Of tensors of at least a page, so that they can be mapped from the file."""

BITS = {"f32": 32, "f16": 16, "bf16": 16, "i64": 64, "i8": 8, "u8": 8, "i4": 4, "e4m3": 8, "e2m1": 4}
"""Bits of an element by our names of types."""
CODED = frozenset((*CODES, *narrow.LEVELS))
"""Levels that store codes and scales."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the data file."""

    name: str
    dtype: str
    """A key of `BITS`."""
    shape: tuple[int, ...]
    offset: int
    step: int = 1
    """2 where its rows alternate with another tensor's: an expert's gate and up, as QMoE wants them."""

    @property
    def nbytes(self) -> int:
        """Without what lies between its rows."""
        return prod(self.shape) * BITS[self.dtype] // 8

    @property
    def end(self) -> int:
        """Where the last row ends."""
        return self.offset + self.step * self.nbytes - (self.step - 1) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of one element of a vector."""
        return prod(self.shape[1:]) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Layout:
    """The data file."""

    tensors: dict[str, Stored]
    levels: dict[str, str]
    """Canonical name to the level that it is stored at."""
    profile: Profile
    compute: str
    activations: str
    """`int8` or `float`: see `kernels.activations_of`."""

    @property
    def nbytes(self) -> int:
        return max((t.end for t in self.tensors.values()), default=0)

    def shape(self, name: str) -> tuple[int, ...]:
        """A canonical tensor's own shape."""
        if self.levels[name] not in CODES:
            return self.parts(name)[0].shape
        n, groups = self.parts(name)[-1].shape
        return n, groups * GROUPS[self.levels[name]]

    def parts(self, name: str) -> tuple[Stored, ...]:
        """Where a canonical tensor lies: itself, or its codes and scales, and of nvfp4 the scale of the whole."""
        level = self.levels[name]
        if level not in CODED:
            return (self.tensors[name],)
        names = (*part_names(name, level), *((f"{name}.whole",) if level == "nvfp4" else ()))
        return tuple(self.tensors[n] for n in names)


def part_names(name: str, level: str) -> tuple[str, str]:
    """Names of a quantized matrix's codes and scales."""
    return f"{name}.{level}", f"{name}.scales"


def layout(spec: Spec, planned: Sequence[Planned], profile: Profile, compute: str, activations: str = "") -> Layout:
    """Places of every tensor in canonical order, then of the constants."""
    activations = activations_of(profile, compute, activations)
    tensors: dict[str, Stored] = {}
    levels = {p.name: p.level for p in planned}
    mates = dict(_mates(spec, levels, profile, compute, activations))
    at = 0
    for name, dtype, shape in _wanted(spec, planned, profile, compute):
        if name in mates:
            first = tensors[mates[name]]
            tensors[name] = replace(first, name=name, offset=first.offset + first.row_bytes)
            continue
        t = Stored(name, dtype, shape, at, 2 if name in mates.values() else 1)
        align = ALIGNMENT if t.nbytes >= ALIGNMENT else 64
        tensors[name] = t = replace(t, offset=-(-at // align) * align)
        at = t.offset + t.step * t.nbytes
    return Layout(tensors, levels, profile, compute, activations)


def expert_levels(names: Mapping[str, str], at: str) -> dict[str, str]:
    """Levels of a layer's gate, up and down experts; `at` is what leads their names."""
    parts = ("gate", "up", "down")
    return {part: names[n] for part in parts if (n := f"{at}.{part}.weight") in names}


def _mates(
    spec: Spec, levels: Mapping[str, str], profile: Profile, compute: str, activations: str
) -> Iterator[tuple[str, str]]:
    """Stored tensors of experts' up, and those of their gate between whose rows theirs lie."""
    for i, b in enumerate(spec.layers):
        at = f"layers.{i}.mlp.experts"
        if not isinstance(b.mlp, MoE) or not b.mlp.gated:
            continue
        found = expert_levels(levels, at)
        if grouped_experts(b.mlp, profile, compute, found, activations):
            up, gate = (part_names(f"{at}.{part}.weight", found[part]) for part in ("up", "gate"))
            yield from zip(up, gate, strict=True)


def _wanted(
    spec: Spec, planned: Sequence[Planned], profile: Profile, compute: str
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for p in planned:
        if p.level in CODES:
            codes, scales = part_names(p.name, p.level)
            (n, k), group = p.shape, GROUPS[p.level]
            if profile == "portable":
                yield codes, f"i{CODES[p.level]}", (n, k)
            else:
                yield codes, "u8", (n, k // group, group * CODES[p.level] // 8)
            yield scales, compute, (n, k // group)
        elif p.level in narrow.LEVELS:
            codes, scales = part_names(p.name, p.level)
            n, k = p.shape
            yield codes, "e4m3" if p.level == "fp8" else "e2m1", (n, k)
            if p.level == "fp8":
                yield scales, compute, (n,)
            else:
                yield scales, "e4m3", (n, k // narrow.BLOCK)
                yield f"{p.name}.whole", "f32", ()
        else:
            yield p.name, p.level, p.shape
    for k, table in enumerate(rope_tables(spec)):
        for part in ("cos", "sin"):
            yield f"rope.{k}.{part}", "f32", (spec.context, len(table.inv_freq))
    for i, b in enumerate(spec.layers):
        if isinstance(b.attention.position, Alibi):
            yield f"layers.{i}.attn.slopes", "f32", (b.attention.heads,)


def constants(spec: Spec, rows: int = 4096) -> Iterator[tuple[str, int, NDArray[np.float32]]]:
    """Values of the constants in blocks of positions: name, first row, float32 rows.

    Cosines and sines of float64 angles of the shared float32 frequencies, times the attention factor, rounded once.
    """
    for k, table in enumerate(rope_tables(spec)):
        frequencies = table.inv_freq.astype(np.float64)
        for start in range(0, spec.context, rows):
            positions = np.arange(start, min(spec.context, start + rows), dtype=np.float64)
            angles = positions[:, None] * frequencies
            yield f"rope.{k}.cos", start, (np.cos(angles) * table.factor).astype(np.float32)
            yield f"rope.{k}.sin", start, (np.sin(angles) * table.factor).astype(np.float32)
    for i, b in enumerate(spec.layers):
        if isinstance(b.attention.position, Alibi):
            yield f"layers.{i}.attn.slopes", 0, alibi_slopes(b.attention.position, b.attention.heads)


def encode(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    """Float32 as the bytes of a float type, rounded to nearest even."""
    x = np.ascontiguousarray(values, "<f4")
    if dtype == "f16":
        return x.astype("<f2").reshape(-1).view(np.uint8)
    if dtype == "bf16":
        bits = x.view("<u4")
        x = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return x.reshape(-1).view(np.uint8)


def decode(data: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Bytes of a float type as float32."""
    if dtype == "bf16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    return data.view({"f32": "<f4", "f16": "<f2"}[dtype]).astype(np.float32)


def pack(q: QuantizedTensor, profile: Profile) -> NDArray[np.uint8]:
    """Codes as bytes: signed int8, or int4 pairs with the low nibble first; unsigned for the contributed operators."""
    codes = np.ascontiguousarray(q.codes).view(np.uint8).reshape(-1)
    if q.bits == 4:
        codes = (codes[::2] & np.uint8(15)) | (codes[1::2] << np.uint8(4))
    return codes if profile == "portable" else codes ^ _FLIP[q.bits]


def unpack(data: NDArray[np.uint8], bits: int, profile: Profile) -> NDArray[np.int8]:
    """The codes of `pack`, in one row."""
    data = data if profile == "portable" else data ^ _FLIP[bits]
    if bits == 8:
        return data.view(np.int8)
    both = np.stack([data & np.uint8(15), data >> np.uint8(4)], -1).reshape(-1)
    return ((both ^ np.uint8(8)).view(np.int8) - np.int8(8)).astype(np.int8)


_FLIP = {8: np.uint8(0x80), 4: np.uint8(0x88)}
