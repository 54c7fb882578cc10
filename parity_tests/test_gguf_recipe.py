"""Native levels against llama.cpp's own quantizer: the same type for every tensor, and the same bytes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.gguf.container import read_header
from backends.gguf.metadata import FILE_TYPES
from backends.gguf.recipe import LEVELS
from backends.gguf.runtime import load
from backends.gguf.types import TYPES
from parity_tests.cases import BASE, random_weights
from parity_tests.gguf_specs import write_file
from spec import Spec, parse
from spec.config import merge


def _moe(experts: int, **router: Any) -> dict[str, Any]:
    return {"kind": "moe", "experts": experts, "hidden": 256, "router": {"top_k": 2, **router}}


LAYERNORM = {"kind": "layernorm", "bias": True}
SPECS: dict[str, dict[str, Any]] = {
    "untied_gqa4": {"block": {"attention": {"heads": 8, "kv_heads": 2, "head_dim": 32}}},
    "tied_gqa2": {"head": {"tied": True}, "block": {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 64}}},
    "fused": {
        "embedding": {"positions": {}},
        "head": {"tied": True},
        "final_norm": LAYERNORM,
        "block": {
            "attention": {"heads": 4, "kv_heads": 4, "bias": True, "position": {"kind": "none"}},
            "mlp": {"gated": False, "activation": "gelu_tanh", "bias": True},
            "norm": LAYERNORM,
        },
    },
    "narrow": {
        "width": 96,
        "block": {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 32}, "mlp": {"hidden": 160}},
    },
    "mixtral": {
        "block": {"attention": {"heads": 4, "kv_heads": 2}, "mlp": _moe(8)},
    },
    "shared": {
        "depth": 8,
        "block": {
            "attention": {"heads": 8, "kv_heads": 2, "head_dim": 32},
            "mlp": _moe(3, score="sigmoid", correction=True) | {"shared": {"hidden": 512}},
        },
        "overrides": {"0": {"mlp": {"kind": "dense", "hidden": 512}}},
    },
    "narrow_experts": {
        "width": 96,
        "depth": 8,
        "block": {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 32}, "mlp": _moe(4) | {"hidden": 160}},
    },
}  # fmt: skip
QUICK = {("untied_gqa4", "q4_k_m"), ("tied_gqa2", "q5_k_m"), ("fused", "q4_k_m"), ("narrow", "q4_k_m"),
         ("untied_gqa4", "q2_k"), ("narrow", "q4_0"), ("mixtral", "q4_k_m"), ("shared", "q3_k_m"),
         ("narrow_experts", "q4_k_m"), ("mixtral", "mxfp4_moe")}  # fmt: skip
OURS_ALONE = {"mxfp4"}
"""llama.cpp offers this type for experts only."""

CASES = [
    pytest.param(name, level, id=f"{name}-{level}", marks=() if (name, level) in QUICK else pytest.mark.slow)
    for name in SPECS
    for level in LEVELS
    if level not in OURS_ALONE and not (level in TYPES and TYPES[level].importance)
    if level != "mxfp4_moe" or ("mlp" in SPECS[name].get("block", {}) and "experts" in SPECS[name]["block"]["mlp"])
]


def wide(patch: dict[str, Any]) -> Spec:
    base = BASE | {"width": 256, "depth": 9, "block": {"attention": {"heads": 8}, "mlp": {"hidden": 512}}}
    return parse(merge(base, patch))


@pytest.mark.parametrize(("name", "level"), CASES)
def test_types_and_bytes_are_llama_cpps(name: str, level: str, tmp_path: Path) -> None:
    from llama_cpp import llama_cpp as lib

    spec = wide(SPECS[name])
    weights = random_weights(spec)
    full, ours, theirs = (tmp_path / f"{n}.gguf" for n in ("full", "ours", "theirs"))
    write_file(spec, weights, full)
    write_file(spec, weights, ours, level)
    load(full).close()  # starts the library, quietly
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[level], 2
    assert lib.llama_model_quantize(os.fsencode(full), os.fsencode(theirs), ctypes.pointer(params)) == 0
    mine, other = read_header(ours), read_header(theirs)
    assert {n: t.type for n, t in mine.tensors.items()} == {n: t.type for n, t in other.tensors.items()}
    a, b = np.memmap(ours, np.uint8, "r"), np.memmap(theirs, np.uint8, "r")
    for n, t in mine.tensors.items():
        size = t.rows * t.row_bytes
        there = other.tensors[n].offset
        np.testing.assert_array_equal(a[t.offset : t.offset + size], b[there : there + size], err_msg=n)
