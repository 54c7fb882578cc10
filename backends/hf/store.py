"""What a folder's weight files hold: every tensor's dtype and place, packed codes, and config.json's word on them.

Quantized products are stored as compressed-tensors' `pack-quantized`: codes + 2^(bits-1), low bits first in 32-bit
words, and float16 scales. transformers loads neither embeddings nor the products of some architectures packed; those
hold code * scale in the narrowest float that is exact (float16 for 4 bits, float32 for 8 and for a source's own
scales), and their scales lie beside them in a file that no client opens, so that both are read back bit for bit.
Experts that lie apart are packed where all have one width, with float32 scales; others are stored like embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats, Planned, QuantizedTensor, Values
from backends.hf.fit import Fit
from backends.hf.names import FUSED_BY_SERVERS, RENAMED
from backends.safetensors import Tensor, placed
from spec.layout import Bound, Layout
from spec.levels import CODES, GROUPS, joined
from spec.params import Role, params

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EXPERTS = r"re:.*\.experts\.\d+\..*"
"""What config.json calls the products of experts: there may be many thousands."""
SHARD = 5_000_000_000
"""Bytes of a shard at most (a larger tensor has one of its own)."""


@dataclass(frozen=True)
class Slot:
    """One external tensor: `name` ends in `.weight` or `.bias`, or is whole (sinks)."""

    name: str
    shape: tuple[int, ...]
    bound: Bound
    dtype: str
    """Of floats; of a packed one, that of its scales."""
    packed: str | None = None
    """The level of packed codes; none for floats."""

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def role(self) -> Role:
        return self.bound.canonical[0].role

    @property
    def matrix(self) -> bool:
        return len(self.shape) > 1

    def tensors(self) -> list[Tensor]:
        """What is stored of it."""
        if self.packed is None:
            return [Tensor(self.name, self.dtype, self.shape)]
        rows, cols = self.shape
        return [
            Tensor(f"{self.name}_packed", "I32", (rows, cols * CODES[self.packed] // 32)),
            Tensor(f"{self.name}_scale", self.dtype, (rows, cols // GROUPS[self.packed])),
            Tensor(f"{self.name}_shape", "I64", (2,)),
        ]


class Store:
    """Every tensor of a folder, for a fit and the levels of the source's tensors."""

    def __init__(self, fit: Fit, planned: Sequence[Planned]) -> None:
        self.fit = fit
        self.levels = {p.name: p.level for p in planned}
        self._wide = {p.name for p in planned if p.wide}
        self.packs_experts = self._packs_experts()
        stacked = fit.carrier.apart and not self.packs_experts and any(v in GROUPS for v in self.levels.values())
        self.layout = Layout(fit.carrier.also[-1] if stacked else fit.carrier.rules, fit.spec)
        quantized = any(level in GROUPS for level in self.levels.values())
        matrices = {self.levels[p.name] for p in params(fit.source) if p.matrix}
        self.dtype = "F32" if quantized or len(matrices) > 1 else DTYPES[next(iter(matrices))]
        """Of vectors, and what config.json asks to load as."""
        self.slots = {s.name: s for b in self.layout.rules for s in self._slots(b)}

    def level(self, shipped: str) -> str | None:
        """The level of a tensor of the shipped spec; none where the source lacks it."""
        origin = self.fit.origins[shipped].name
        return None if origin is None else self.levels[origin]

    def _packs_experts(self) -> bool:
        """Whether experts are stored packed: transformers reads them so where each lies apart, all by one scheme. It
        reads no others apart where anything is packed, but stacked."""
        levels = {self.levels[p.name] for p in params(self.fit.source) if p.role == "experts"}
        return self.fit.carrier.apart and len(levels) == 1 and levels <= set(GROUPS)

    def _slots(self, bound: Bound) -> list[Slot]:
        parts = [p.name for p in bound.canonical]
        levels = [self.level(p) for p in parts]
        coded = [level for level in levels if level is not None and level in GROUPS]
        dtype = self.dtype
        packed: str | None = None
        experts = self.fit.carrier.mixture
        if experts is not None and parts[0].endswith(experts.wide):
            dtype = "F32"
        if bound.canonical[0].matrix:
            role = bound.canonical[0].role
            if coded and role == "experts" and self.packs_experts:
                packed, dtype = coded[0], "F32"  # transformers computes code * scale, and with it, in this dtype
            elif coded and self.fit.carrier.packs and role == "linear":
                packed, dtype = joined(level for n in parts for level in self._beside(n)), "F16"
            elif coded:
                wide = any(self.fit.origins[n].name in self._wide for n in parts)
                dtype = "F16" if max(CODES[level] for level in coded) == 4 and not wide else "F32"
            else:
                dtype = DTYPES[str(levels[0])]
        return [Slot(name, shape, bound, dtype, packed) for name, shape in bound.shapes().items()]

    def _beside(self, name: str) -> set[str]:
        """The levels of the products that servers compute together with this one, as far as they have codes."""
        peers = {name}
        for group in FUSED_BY_SERVERS:
            for stem in group:
                if f".{stem}." in name:
                    peers |= {name.replace(f".{stem}.", f".{peer}.") for peer in group}
        return {level for p in peers if p in self.layout.of and (level := str(self.level(p))) in GROUPS}

    @cached_property
    def dense(self) -> dict[str, tuple[int, int]]:
        """Quantized tensors of the source that are stored as floats, and their shapes: their scales go beside."""
        out = {}
        for s in self.slots.values():
            for p in s.bound.canonical:
                origin = self.fit.origins[p.name].name
                if s.packed is None and origin is not None and self.levels[origin] in GROUPS:
                    out[origin] = (p.shape[0], p.shape[1])
        return out

    def shards(self) -> dict[str, list[Tensor]]:
        """Weight files by name. A module's tensors stay together."""
        return placed((s.tensors() for s in self.slots.values()), SHARD)

    def scales(self) -> list[Tensor]:
        """Scales of what is stored as floats."""
        return [Tensor(n, "F16", (rows, cols // GROUPS[self.levels[n]])) for n, (rows, cols) in self.dense.items()]

    def quantization(self) -> dict[str, Any]:
        """config.json's `quantization_config`; empty without packed tensors. Modules are named one by one: a class
        would also match what servers fuse."""
        packed = [s for s in self.slots.values() if s.packed is not None]
        if not packed:
            return {}
        groups = {}
        for level in sorted({s.packed for s in packed if s.packed is not None}, key=lambda n: (CODES[n], GROUPS[n])):
            weights = {"num_bits": CODES[level], "type": "int", "symmetric": True, "strategy": "group",
                       "group_size": GROUPS[level], "dynamic": False}  # fmt: skip
            mine = [s for s in packed if s.packed == level]
            targets = [_module(s) for s in mine if s.role != "experts"]
            targets += [EXPERTS] * any(s.role == "experts" for s in mine)
            groups[f"group_{len(groups)}"] = {
                "targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
                "format": "pack-quantized",
            }  # fmt: skip
        linear = (s for s in self.slots.values() if s.packed is None and s.role in ("linear", "router") and s.matrix)
        ignored = [_module(s) for s in linear]
        if self.fit.spec.head.tied:
            ignored.append("lm_head")
        return {
            "quantization_config": {
                "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
                "config_groups": groups, "ignore": ignored, "kv_cache_scheme": None, "global_compression_ratio": None,
            }
        }  # fmt: skip


def _module(s: Slot) -> str:
    return RENAMED.get(s.module, s.module)


def pack(codes: NDArray[np.int8], bits: int) -> NDArray[np.uint32]:
    """Codes [r, c] to words [r, c * bits / 32]; c is a multiple of 32 / bits."""
    if bits == 8:
        data = np.ascontiguousarray(codes).view(np.uint8) ^ np.uint8(0x80)
    else:
        nibbles = (codes + np.int8(8)).view(np.uint8)
        data = nibbles[:, 0::2] | (nibbles[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(data).view("<u4")


def unpack(words: NDArray[np.uint32], bits: int) -> NDArray[np.int8]:
    """The inverse of `pack`."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return (data ^ np.uint8(0x80)).view(np.int8)
    out = np.empty((data.shape[0], 2 * data.shape[1]), np.int8)
    out[:, 0::2] = (data & np.uint8(15)).view(np.int8) - np.int8(8)
    out[:, 1::2] = (data >> np.uint8(4)).view(np.int8) - np.int8(8)
    return out


def codes_of(values: Floats, scales: Floats, level: str) -> Values:
    """Codes from code * scale, whose quotient is a whole number; the values themselves where they are none."""
    (rows, cols), group = values.shape, GROUPS[level]
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients = values.reshape(rows, cols // group, group) / np.where(scales == 0, 1, scales)[..., None]
        codes = np.rint(quotients).astype(np.int8).reshape(rows, cols)
    found = QuantizedTensor(codes, scales, CODES[level], group)
    return found if np.array_equal(found.dequantize(), values) else values


def describe(levels: Mapping[str, str]) -> str:
    """The levels of all tensors, for a file's metadata: their names by level."""
    return json.dumps({level: [n for n, v in levels.items() if v == level] for level in sorted(set(levels.values()))})
