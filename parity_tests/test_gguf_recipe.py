"""Native levels against llama.cpp's own quantizer: the same type for every tensor, and the same bytes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.gguf.container import read_header
from backends.gguf.fit import choose
from backends.gguf.ggml import quantize
from backends.gguf.importance import Lookup, conditioned
from backends.gguf.metadata import FILE_TYPES
from backends.gguf.names import slots
from backends.gguf.pack import dense, pack, unpack
from backends.gguf.recipe import LEVELS, recipe, wanting
from backends.gguf.runtime import load
from backends.gguf.support import support
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
    "shallow": {"depth": 1, "block": {"attention": {"heads": 4, "kv_heads": 2}, "mlp": {"hidden": 256}}},
    "few_experts": {"depth": 2, "block": {"attention": {"heads": 4, "kv_heads": 2}, "mlp": _moe(3)}},
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
QUICK_WEIGHED = {("untied_gqa4", "q4_k_m"), ("tied_gqa2", "q4_0"), ("fused", "iq4_nl"), ("few_experts", "q2_k"),
                 ("narrow_experts", "q4_k_m"), ("shallow", "iq2_s"), ("shallow", "iq4_xs")}  # fmt: skip
OURS_ALONE = {"mxfp4"}
"""llama.cpp offers this type for experts only."""


def _cases(levels: Iterable[str], quick: set[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(name, level, id=f"{name}-{level}", marks=() if (name, level) in quick else pytest.mark.slow)
        for name in SPECS
        for level in levels
        if level not in OURS_ALONE
        if level != "mxfp4_moe" or "experts" in SPECS[name].get("block", {}).get("mlp", {})
    ]


def wide(patch: dict[str, Any]) -> Spec:
    base = BASE | {"width": 256, "depth": 9, "block": {"attention": {"heads": 8}, "mlp": {"hidden": 512}}}
    return parse(merge(base, patch))


BLIND = [level for level in LEVELS if not wanting(recipe(wide(SPECS["shallow"]), level), level)]
"""Levels that llama.cpp makes without an importance matrix."""


@pytest.mark.parametrize(("name", "level"), _cases(BLIND, QUICK))
def test_types_and_bytes_are_llama_cpps(name: str, level: str, tmp_path: Path) -> None:
    spec = wide(SPECS[name])
    assert quantized(spec, level, tmp_path) == 0
    same_tensors(tmp_path)


@pytest.mark.parametrize(("name", "level"), _cases(LEVELS, QUICK_WEIGHED))
def test_types_and_bytes_are_llama_cpps_with_importance(name: str, level: str, tmp_path: Path) -> None:
    spec = wide(SPECS[name])
    assert quantized(spec, level, tmp_path, entries(spec)) == 0
    same_tensors(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["q2_k", "q4_k_m", "q3_k_s", "iq3_m"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_eighty_layers_are_a_model_of_70_billion(level: str, kv_heads: int, tmp_path: Path) -> None:
    """llama.cpp gives the small v of those more, and takes Llama for one only where heads share keys."""
    attention = {"heads": 4, "kv_heads": kv_heads, "head_dim": 32}
    spec = wide({"depth": 80, "block": {"attention": attention, "mlp": {"hidden": 32}}})
    assert quantized(spec, level, tmp_path) == 0
    same_tensors(tmp_path)
    assert ("q5_k" in recipe(spec, level).values()) == (kv_heads == 2)


@pytest.mark.parametrize("level", [level for level in LEVELS if level not in (*BLIND, *OURS_ALONE)])
def test_what_needs_importance_is_what_llama_cpp_refuses_without(level: str, tmp_path: Path) -> None:
    spec = wide(SPECS["shallow"])
    assert support(spec, level).refusals and not support(spec, level, importance=True).refusals
    assert quantized(spec, level, tmp_path, ours=False) != 0


def test_experts_that_no_token_chose_are_rounded_as_llama_cpp_rounds_them(tmp_path: Path) -> None:
    spec = wide(SPECS["few_experts"])
    given = entries(spec)
    for name, values in given.items():
        if "_exps" in name:
            values[1] = 1  # what llama.cpp reads where a count is 0
    lookup = by_canonical(spec, given)

    def unmeasured(name: str) -> Any:
        found = lookup(name)
        if found is None or len(found) == 1:
            return found
        return np.where(np.arange(len(found))[:, None] == 1, np.float32(0), found)

    assert quantized(spec, "q4_k_m", tmp_path, given, unmeasured) == 0
    same_tensors(tmp_path)


def test_blocks_of_columns_that_saw_nothing_keep_their_weights() -> None:
    """ggml alone rounds them to zeros."""
    x = np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)
    seen = np.r_[np.zeros(256, np.float32), np.ones(256, np.float32)]
    for name in ("q4_0", "q2_k", "q4_k", "q6_k", "iq4_xs", "iq3_s", "iq2_xxs"):
        importance = conditioned(seen, x.shape)
        got = dense(unpack(pack(x, name, importance=importance), name))
        even = dense(unpack(pack(x, name, importance=conditioned(np.ones(512, np.float32), x.shape)), name))
        np.testing.assert_array_equal(got, even, err_msg=name)
    assert not dense(unpack(quantize(x, "q4_k", weights=seen), "q4_k"))[:, :256].any()


def test_the_scale_of_importance_changes_nothing() -> None:
    """Where llama.cpp's sums are far from its thresholds, its bytes are those of the importance as it is."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((16, 256)).astype(np.float32), rng.lognormal(0, 2, 256).astype(np.float32)
    for name in ("q4_k", "iq4_xs", "q2_k", "iq2_xxs"):
        want = quantize(x, name, weights=w)
        for exponent in (-100, -40, -6, 0, 4, 50):
            got = pack(x, name, importance=conditioned(np.ldexp(w.astype(np.float64), exponent), x.shape))
            np.testing.assert_array_equal(got, want, err_msg=f"{name} {exponent}")


def entries(spec: Spec) -> dict[str, NDArray[np.float32]]:
    """Random mean squares [matrices, cols] by llama.cpp's names, of what it measures: every matrix of the layers."""
    rng = np.random.default_rng(0)
    return {
        s.name: (rng.lognormal(0, 1.5, (s.shape[0] if len(s.shape) == 3 else 1, s.shape[-1])) * 1e-3).astype(np.float32)
        for s in slots(spec, choose(spec))
        if s.matrix and not s.type and s.name.startswith("blk.") and s.pieces
    }


def by_canonical(spec: Spec, given: dict[str, NDArray[np.float32]]) -> Lookup:
    names = {p.name: s.name for s in slots(spec, choose(spec)) for p in s.pieces}
    return lambda name: given.get(names[name])


def quantized(
    spec: Spec,
    level: str,
    folder: Path,
    given: dict[str, NDArray[np.float32]] | None = None,
    lookup: Lookup | None = None,
    ours: bool = True,
) -> int:
    """Ours and llama.cpp's file of random weights, with the same importance; llama.cpp's exit status."""
    from llama_cpp import llama_cpp as lib

    weights = random_weights(spec)
    if ours:
        found = None if given is None else lookup or by_canonical(spec, given)
        write_file(spec, weights, folder / "ours.gguf", level, importance=found)
    full = write_file(spec, weights, folder / "full.gguf")
    load(full).close()  # starts the library, quietly
    settings = lib.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[level], 2
    if given is not None:
        rows = (lib.llama_model_imatrix_data * (len(given) + 1))()
        for row, (name, values) in zip(rows, given.items(), strict=False):
            row.name, row.size = name.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = ctypes.cast(rows, ctypes.POINTER(lib.llama_model_imatrix_data))
    return lib.llama_model_quantize(os.fsencode(full), os.fsencode(folder / "theirs.gguf"), ctypes.pointer(settings))


def same_tensors(folder: Path) -> None:
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    mine, other = read_header(ours), read_header(theirs)
    assert {n: t.type for n, t in mine.tensors.items()} == {n: t.type for n, t in other.tensors.items()}
    a, b = np.memmap(ours, np.uint8, "r"), np.memmap(theirs, np.uint8, "r")
    for n, t in mine.tensors.items():
        size = t.rows * t.row_bytes
        there = other.tensors[n].offset
        np.testing.assert_array_equal(a[t.offset : t.offset + size], b[there : there + size], err_msg=n)
