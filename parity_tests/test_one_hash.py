"""Quantize once: the same codes and scales in every container, read back from the files themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import backends
from backends.base import QuantizedTensor, content_hash
from convert.levels import CODES, GROUPS, LEVELS, fits
from convert.pipeline import Result, convert_all
from convert.recipe import Recipe
from parity_tests.artifacts import opened
from parity_tests.cases import BASE, random_weights
from parity_tests.checkpoints import VOCAB, write_checkpoint
from parity_tests.tensorrt_graphs import write_graph
from spec import Spec, parse
from spec.config import merge
from spec.params import params

FIVE = ("gguf", "mlx", "onnx", "coreml", "hf")
WIDE = merge(BASE, {
    "depth": 1, "width": 128, "vocab_size": 131,
    "block": {"attention": {"heads": 4, "kv_heads": 2}, "mlp": {"hidden": 256}},
})  # fmt: skip
MOE = {"kind": "moe", "experts": 3, "hidden": 128, "router": {"top_k": 2}}
SPECS: dict[str, Spec] = {n: parse(merge(WIDE, p)) for n, p in {
    "llama": {"depth": 2},  # its q and k have interleaved rows in GGUF
    "tied": {"head": {"tied": True}},
    "narrow": {"width": 40, "block": {"attention": {"heads": 5, "kv_heads": 5, "head_dim": 8}}},
    "odd_heads": {"width": 96, "block": {"attention": {"heads": 6, "kv_heads": 3, "head_dim": 16}}},
    "bias": {"block": {"attention": {"bias": True}, "mlp": {"bias": True}}},  # interleaved as well
    "halves": {"block": {"attention": {"bias": {"q": True, "k": True, "v": True}}}},  # qwen2's rows are not
    "gpt2": {
        "embedding": {"positions": {}}, "head": {"tied": True}, "final_norm": {"kind": "layernorm", "bias": True},
        "block": {
            "attention": {"kv_heads": 4, "bias": True, "position": {"kind": "none"}},
            "mlp": {"gated": False, "activation": "gelu_tanh", "bias": True},
            "norm": {"kind": "layernorm", "bias": True},
        },
    },
    "moe": {"block": {"mlp": MOE}},
    "moe_narrow": {"width": 96, "block": {"attention": {"heads": 6, "kv_heads": 3, "head_dim": 16}, "mlp": MOE}},
    "moe_shared": {"block": {"mlp": {**MOE, "shared": {"hidden": 32}}}},
}.items()}  # fmt: skip
"""`narrow`: a width that is no multiple of 32; `odd_heads`: one that is, but none of 128. `gpt2`: q, k and v in one
matrix, transposed in Hugging Face's files. Experts lie stacked in GGUF."""


def mixed(spec: Spec) -> Recipe:
    """Bits and groups of every kind, also in what files and servers join: no two neighbours have the same."""
    chosen = []
    for i, p in enumerate(p for p in params(spec) if p.matrix and p.name != "positions.weight"):
        holding = [level for level in GROUPS if fits(level, p.shape[-1])]
        if holding:
            chosen.append((p.name, holding[i % len(holding)]))
    return Recipe("q4-g128", tuple(chosen))


def hashes(backend: str, path: Path, spec: Spec, levels: Mapping[str, str]) -> dict[str, str]:
    """Content hash of every tensor, decoded from the artifact: a scale for as many weights as the level says."""
    artifact, out = opened(backend, path), {}
    for p in params(spec):
        found = artifact.rows(p.name, 0, p.shape[0])
        if levels[p.name] in GROUPS:
            assert isinstance(found, QuantizedTensor), f"{backend}: {p.name} is no codes"
            assert np.abs(found.codes.astype(int) + 0.5).max() < 1 << (CODES[levels[p.name]] - 1), p.name
            found = found.grouped(GROUPS[levels[p.name]])
        out[p.name] = content_hash([found])
    return out


def converted(checkpoint: Path, level: Recipe | str, folder: Path, **options: str) -> dict[str, Result]:
    """Every container of a checkpoint, by a name of its own; computing in float32 none rounds a vector."""
    results = convert_all(checkpoint, FIVE, level, folder / "all", options={"compute": "f32"}, verify=False)
    found = {r.backend: r for r in results}
    portable = {"compute": "f32", "profile": "portable"}
    (found["onnx-portable"],) = convert_all(
        checkpoint, ["onnx"], level, folder / "portable", options=portable, verify=False
    )
    return found


LEVEL = {"narrow": "q4", "bias": "q4", "moe": "q8", "gpt2": "mixed", "halves": "mixed", "moe_shared": "mixed"}
"""Those of the quick tests, by default q4-g128; a Llama has all of them."""
CASES = [
    pytest.param(n, level, marks=() if n == "llama" or level == LEVEL.get(n, "q4-g128") else pytest.mark.slow)
    for n in SPECS
    for level in (*GROUPS, "mixed")
]


@pytest.mark.parametrize(("name", "level"), CASES)
def test_one_hash_for_all_containers(name: str, level: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    checkpoint = write_checkpoint(tmp_path / "source", spec, tokenizer=False)
    found = converted(checkpoint, mixed(spec) if level == "mixed" else level, tmp_path)
    said = found["gguf"].receipt["tensors"]
    levels = {n: entry[0] for n, entry in said.items()}
    for label, r in found.items():
        assert r.receipt["tensors"] == said, label
        got = hashes(r.backend, r.out, spec, levels)
        assert got == {n: entry[1] for n, entry in said.items()}, label
    assert set(levels.values()) & set(GROUPS), "nothing is quantized"
    for p in params(spec):  # whatever is no whole number of groups is f16 everywhere
        if p.matrix and not fits(level if level in GROUPS else "q4", p.shape[-1]):
            assert levels[p.name] == "f16", p.name


@pytest.mark.parametrize("name", SPECS)
def test_tensorrt_has_the_same_hash(name: str, tmp_path: Path) -> None:
    """Its portable graph, from which the engine is built, in the arithmetic that it ships with."""
    spec = SPECS[name]
    weights = random_weights(spec)
    checkpoint = write_checkpoint(tmp_path / "source", spec, weights, tokenizer=False)
    (gguf,) = convert_all(checkpoint, ["gguf"], "q4-g128", tmp_path / "m.gguf", verify=False)
    said = gguf.receipt["tensors"]
    graph = write_graph(spec, weights, tmp_path / "engine", "q4-g128", "f16")
    levels = {n: entry[0] for n, entry in said.items()}
    assert hashes("tensorrt", graph, spec, levels) == {n: entry[1] for n, entry in said.items()}


@pytest.mark.parametrize("stale", [False, True], ids=["receipt", "no-receipt"])
def test_groups_of_128_go_on_from_a_gguf_file(stale: bool, tmp_path: Path) -> None:
    """Its receipt says how many equal scales are one; without it they are groups of 32, and what is rounded to groups
    of 128 again is what it was."""
    checkpoint = write_checkpoint(tmp_path / "source", SPECS["llama"], tokenizer=False)
    (first,) = convert_all(checkpoint, ["gguf"], "q4-g128", tmp_path / "m.gguf", verify=False)
    if stale:
        backends.part(backends.get("gguf"), "build").stamp(first.out, {"level": "q4-g128"})
    again = convert_all(first.out, FIVE, "q4-g128", tmp_path / "again", options={"compute": "f32"}, verify=False)
    for r in again:
        levels = {n: entry[0] for n, entry in r.receipt["tensors"].items()}
        assert stale or r.receipt["tensors"] == first.receipt["tensors"]
        assert hashes(r.backend, r.out, SPECS["llama"], levels) == {n: e[1] for n, e in r.receipt["tensors"].items()}
    (finer,) = convert_all(first.out, ["onnx"], "q4", tmp_path / "finer", verify=False)
    got = opened("onnx", finer.out).rows("layers.0.attn.q.weight", 0, 128)
    was = opened("gguf", first.out).rows("layers.0.attn.q.weight", 0, 128)
    assert isinstance(got, QuantizedTensor) and isinstance(was, QuantizedTensor)
    assert content_hash([got]) == content_hash([was.grouped(32)])


@pytest.mark.parametrize("level", [name for name in LEVELS if name not in GROUPS])
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_floats_have_one_hash_too(name: str, level: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    checkpoint = write_checkpoint(tmp_path / "source", spec, tokenizer=False)
    said = None
    matrices = [p.name for p in params(spec) if p.matrix]
    for backend in FIVE:
        if (backend, level) == ("coreml", "bf16"):
            continue
        suffix = backends.get(backend).suffix
        (r,) = convert_all(checkpoint, [backend], level, tmp_path / f"m-{backend}{suffix}", verify=False)
        said = said or r.receipt["tensors"]
        assert r.receipt["tensors"] == said
        got = hashes(backend, r.out, spec, {n: entry[0] for n, entry in said.items()})
        assert {n: got[n] for n in matrices} == {n: said[n][1] for n in matrices}, backend


def test_one_pass_writes_them_all(tmp_path: Path) -> None:
    """Five targets at once give the files that five conversions give."""
    spec = parse(merge(BASE, {"vocab_size": VOCAB, "head": {"tied": True}}))
    checkpoint = write_checkpoint(tmp_path / "tiny", spec)
    names = ["gguf", "mlx", "onnx", "coreml", "hf"]
    results = convert_all(checkpoint, names, "q4", tmp_path / "shipped")
    assert [r.backend for r in results] == names and all(r.report and r.report.ok for r in results)
    assert sorted(p.name for p in (tmp_path / "shipped").iterdir()) == [
        "tiny.q4-hf", "tiny.q4-mlx", "tiny.q4-onnx", "tiny.q4.gguf", "tiny.q4.gguf.md", "tiny.q4.gguf.receipt.json",
        "tiny.q4.mlpackage", "tiny.q4.mlpackage.md", "tiny.q4.mlpackage.receipt.json",
    ]  # fmt: skip
    assert len({r.receipt["weights_hash"] for r in results}) == 1
    for r in results:
        alone = convert_all(checkpoint, [r.backend], "q4", tmp_path / f"alone{r.out.suffix}", verify=False)[0]
        levels = {n: entry[0] for n, entry in r.receipt["tensors"].items()}
        assert hashes(r.backend, alone.out, spec, levels) == hashes(r.backend, r.out, spec, levels)
        if alone.out.is_dir() and not backends.get(r.backend).suffix:
            mark = json.loads((r.out / "allotrope.json").read_text())
            assert mark["report"]["ok"] and (r.out / "README.md").is_file()
        with backends.load(r.out) as runtime:
            ids = runtime.encode("def f(x):")
            assert runtime.decode(ids).decode().strip() == "def f(x):"
            assert runtime.logits(np.array([ids])).shape == (1, len(ids), VOCAB)
