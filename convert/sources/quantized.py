"""Weights that came quantized, as floats: 8-bit codes with scales, compressed-tensors' packed integers, MXFP4.

    float8, int8     code * scale, one scale for the tensor, for each row, or for each block (DeepSeek's
                     `weight_scale_inv` is a factor in spite of its name)
    packed integers  code * scale, 4 or 8 bits in words, one scale for each group of columns

Products are rounded to float32 once; with scales of 16 bits they are exact. Rows are decoded where they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import QuantizedTensor
from backends.hf.store import unpack
from convert.sources import mxfp4
from convert.sources.files import harmless
from convert.sources.store import Entry, Store, widen
from spec.errors import UserError

CODES = ("F8_E4M3", "F8_E5M2", "I8")
SCALES = ("_scale_inv", "_scale")
ACTIVATIONS = re.compile(
    r".*\.(input_scale|activation_scale|output_scale|input_scale_ub|[qkv]_scale|weight_scale_ub)|"
    r".*\.(q|k|v)_proj\.output_scale"
)
"""Scales of activations and of caches: a kernel's choice, no part of the weights."""

_COMMON = "quant_method modules_to_not_convert ignored_layers ignore exclude_modules kv_cache_scheme"
METHODS: Mapping[str, frozenset[str]] = {
    name: frozenset(f"{_COMMON} {keys}".split())
    for name, keys in {
        "fp8": "fmt activation_scheme weight_block_size dequantize scale_fmt modules_to_convert",
        "fbgemm_fp8": "activation_scale_ub",
        "compressed-tensors": "format config_groups quantization_status global_compression_ratio version",
        "modelopt": "quant_algo producer config_groups kv_cache_quant_algo",
        "mxfp4": "dequantize",
    }.items()
}
"""Keys of quantization_config that are known, by quant_method. Which tensors are quantized and how is read from the
tensors; the keys only have to agree."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "sparsity_config": (None, {}), "transform_config": (None, {}), "moe_sparsity_config": (None,),
    "expert_dtype": ("fp8",),
}  # fmt: skip
LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
"""Keys that list modules which are not quantized."""
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense", "mixed-precision")


@dataclass(frozen=True)
class Scaled:
    """Codes times scales: `block` is the rows and columns (0: all) that share one."""

    codes: str
    scale: str
    shape: tuple[int, ...]
    block: tuple[int, int]

    def rows(self, store: Store, start: int, stop: int) -> NDArray[np.float32]:
        dtype = store.entries[self.codes].dtype
        raw = store.raw(self.codes, start, stop)
        values = raw.astype(np.float32) if dtype == "I8" else widen(raw, dtype)
        tall, wide = self.block
        if not tall:
            return values * store.fetch(self.scale, 0, 1).reshape(-1)[0]
        height = self.shape[-2]
        stacked, row = np.divmod(np.arange(start, stop), height)
        at = stacked * -(-height // tall) + row // tall
        first = int(at[0])
        scales = store.fetch(self.scale, first, int(at[-1]) + 1).reshape(int(at[-1]) + 1 - first, -1)[at - first]
        return values * (np.repeat(scales, wide, axis=1)[:, : self.shape[-1]] if wide else scales)


@dataclass(frozen=True)
class Packed:
    """Codes of `bits` bits, low bits first in 32-bit words, offset by half their range."""

    codes: str
    scale: str
    shape: tuple[int, ...]
    bits: int

    def rows(self, store: Store, start: int, stop: int) -> NDArray[np.float32]:
        words = np.ascontiguousarray(store.raw(self.codes, start, stop)).view(np.uint32)
        codes = unpack(words, self.bits)[:, : self.shape[1]]
        scales = store.fetch(self.scale, start, stop)
        return QuantizedTensor(codes, scales, self.bits, self.shape[1] // scales.shape[1]).dequantize()


Part = Scaled | Packed | mxfp4.Blocks


class Decoded:
    """A store whose quantized tensors read as floats; their scales are no tensors of their own."""

    def __init__(self, store: Store, parts: Mapping[str, Part], hidden: Iterable[str]) -> None:
        self._store, self._parts = store, parts
        gone = set(hidden)
        self.entries: dict[str, Entry] = {n: e for n, e in store.entries.items() if n not in gone}
        for name, part in parts.items():
            self.entries[name] = Entry(_dtype(store, part), part.shape)

    @property
    def nbytes(self) -> int:
        return self._store.nbytes

    def fetch(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        part = self._parts.get(name)
        return self._store.fetch(name, start, stop) if part is None else part.rows(self._store, start, stop)

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._store.raw(name, start, stop)

    def close(self) -> None:
        self._store.close()


def _dtype(store: Store, part: Part) -> str:
    """What a tensor's codes are."""
    if isinstance(part, Scaled):
        return store.entries[part.codes].dtype
    return part.dtype if isinstance(part, mxfp4.Blocks) else f"I{part.bits}"


def decoded(store: Store, config: object, source: str) -> tuple[Store, list[str]]:
    """The store with what `quantization_config` describes decoded, and what a user should know of it.

    Raises `UserError` with every key that is not known and every tensor that lacks its scale, or has one that fits
    nothing.
    """
    if config is None:
        return store, []
    problems: list[str] = []
    method, block = _method(config, problems)
    if problems:
        raise UserError("\n".join(f"{source}: quantization_config: {p}" for p in problems))
    assert isinstance(config, dict)
    parts: dict[str, Part] = {}
    hidden: set[str] = set()
    kept = [p for key in LISTS for p in config.get(key) or []]
    for name, entry in store.entries.items():
        if name.endswith("_packed"):
            found: Part | str = _packed(store, name.removesuffix("_packed"))
            name = name.removesuffix("_packed")
            hidden |= {f"{name}{end}" for end in ("_packed", "_scale", "_shape")}
        elif method == "mxfp4" and name.endswith(mxfp4.BLOCKS):
            found = mxfp4.blocks(store, name)
            hidden |= {name.removesuffix(mxfp4.BLOCKS) + mxfp4.SCALES}
        elif entry.dtype in CODES:
            scale = next((name + end for end in SCALES if name + end in store.entries), None)
            found = "no scale beside it" if scale is None else _scaled(store, name, scale, block)
            hidden |= set() if scale is None else {scale}
        else:
            continue
        if isinstance(found, str):
            problems.append(f"{name}: {found}")
        elif any(_names(pattern, name.removesuffix(".weight")) for pattern in kept):
            problems.append(f"{name}: quantized, and quantization_config says that its module is not")
        else:
            parts[name] = found
    dropped = [n for n in store.entries if ACTIVATIONS.fullmatch(n)]
    if problems:
        raise UserError("\n".join(f"{source}: {p}" for p in problems))
    kinds = sorted({f"int{p.bits}" if isinstance(p, Packed) else _dtype(store, p) for p in parts.values()})
    notes = [f"{len(parts)} tensors came quantized ({method}: {', '.join(kinds).lower()}): what that cost is in them"]
    if dropped:
        notes.append(f"{len(dropped)} scales of activations or caches are not carried: a runtime rounds in its own way")
    return Decoded(store, parts, {*hidden, *dropped}), notes


def _method(config: object, problems: list[str]) -> tuple[str, tuple[int, int] | None]:
    """quant_method, and the size of a scale's block where there is one."""
    if not isinstance(config, dict) or not isinstance(config.get("quant_method"), str):
        problems.append("names no quant_method")
        return "", None
    method = config["quant_method"]
    if method not in METHODS:
        problems.append(f"quant_method {method[:40]!r} is not read ({', '.join(METHODS)} are): convert from the "
                        "original, unquantized folder")  # fmt: skip
        return method, None
    for key, value in config.items():
        if key in NEUTRAL and value not in NEUTRAL[key]:
            problems.append(f"{key}: {str(value)[:80]} changes the weights and is not read")
        elif key not in METHODS[method] and key not in NEUTRAL:
            problems.append(f"{key[:80]} is an unknown key of {method}")
    for key in LISTS:
        if not isinstance(config.get(key) or [], list):
            problems.append(f"{key}: {str(config[key])[:40]!r} is no list of modules")
    for key, allowed in (("format", FORMATS), ("quant_algo", ("FP8",))):
        if config.get(key, allowed[0]) not in allowed:
            problems.append(f"{key}: {str(config[key])[:40]!r} is not read ({', '.join(allowed)} are)")
    groups = config.get("config_groups") or {}
    blocks = [config.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        given = group.get("format") if isinstance(group, dict) else None
        if given not in (None, *FORMATS):
            problems.append(f"config_groups: format {str(given)[:40]!r} is not read ({', '.join(FORMATS)} are)")
        if isinstance(weights, dict):
            blocks.append(weights.get("block_structure"))
            if weights.get("symmetric") is False:
                problems.append("config_groups: asymmetric weights are not read")
    given = [b for b in blocks if b is not None]
    if not all(_pair(b) and b == given[0] for b in given):
        problems.append(f"blocks of {' and '.join(str(b)[:40] for b in given)}: one pair of sizes is read")
        return method, None
    return method, (given[0][0], given[0][1]) if given else None


def _pair(block: object) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)


def _scaled(store: Store, name: str, scale: str, block: tuple[int, int] | None) -> Scaled | str:
    shape, given = store.entries[name].shape, store.entries[scale].shape
    if store.entries[scale].dtype not in ("F32", "F16", "BF16", "F8_E8M0"):
        return f"{scale} is {store.entries[scale].dtype}, no float"
    if len(shape) < 2:
        return "a vector is never quantized"
    if prod(given) == 1:
        return Scaled(name, scale, shape, (0, 0))
    if given in ((*shape[:-1], 1), shape[:-1]):
        return Scaled(name, scale, shape, (1, 0))
    if block is not None and given == (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])):
        return Scaled(name, scale, shape, block)
    sizes = "one, one for each row" + ("" if block is None else f" or one for each block of {block[0]} x {block[1]}")
    return f"{scale} has shape {list(given)} for weights {list(shape)}: {sizes} is read"


def _packed(store: Store, name: str) -> Packed | str:
    have = store.entries
    for end, what in (("_zero_point", "zero points"), ("_g_idx", "an activation order")):
        if name + end in have:
            return f"packed with {what}, which is not read (convert from the original folder)"
    words, scale, shape = (have.get(name + end) for end in ("_packed", "_scale", "_shape"))
    if words is None or scale is None or shape is None or shape.dtype != "I64" or shape.shape != (2,):
        return "packed, and its _scale or _shape is missing"
    rows, cols = (int(n) for n in store.raw(f"{name}_shape", 0, 2))
    if len(words.shape) != 2 or len(scale.shape) != 2 or not rows == words.shape[0] == scale.shape[0] or cols < 1:
        return f"packed as {list(words.shape)} with scales {list(scale.shape)} for weights [{rows}, {cols}]"
    bits = next((b for b in (4, 8) if -(-cols * b // 32) == words.shape[1]), None)
    if words.dtype != "I32" or bits is None or not scale.shape[1] or cols % scale.shape[1]:
        return f"packed as {words.dtype} {list(words.shape)} for weights [{rows}, {cols}]: 4 and 8 bits are read"
    return Packed(f"{name}_packed", f"{name}_scale", (rows, cols), bits)


def _names(pattern: object, module: str) -> bool:
    """Whether an entry of a list of modules that are left alone means this one: its name, its end, or `re:` a regex."""
    text = str(pattern)
    if text.startswith("re:"):
        found = harmless(text[3:])
        return found is not None and found.match(module) is not None
    return module == text or module.endswith(f".{text}") or module.startswith(f"{text}.")
