"""`q4-g128` where its groups are whole: what other tests have at q4, in every runtime and in people's own clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
from backends.onnx.kernels import grouped_experts
from convert.pipeline import convert, convert_all
from convert.recipe import Recipe
from convert.verify import numeric
from convert.verify.artifact import Door, planned
from convert.verify.emulate import Typed
from parity_tests.artifacts import check_graph, check_packing, write
from parity_tests.cases import BASE, nmse, random_ids, random_weights
from parity_tests.checkpoints import llama, write_checkpoint
from spec import Spec, parse
from spec.config import MoE, merge

LEVEL = "q4-g128"
PATCHES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"head": {"tied": True}},
    "moe": {"block": {"mlp": {"kind": "moe", "experts": 4, "hidden": 128, "router": {"top_k": 2}}}},
    "relu2": {"block": {"mlp": {"gated": False, "activation": "relu2"}}},
}
SPECS: dict[str, Spec] = {
    n: parse(merge(merge(BASE, {"width": 256, "block": {"mlp": {"hidden": 384}}}), p)) for n, p in PATCHES.items()
}
RUNTIMES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlx": ("mlx", {"compute": "f32"}),
    "onnx": ("onnx", {}),
    "onnx-portable": ("onnx", {"profile": "portable"}),
    "coreml": ("coreml", {"compute": "f32"}),
    "hf": ("hf", {}),
}
LONG = {("coreml", n) for n in SPECS if n != "llama"} | {(r, "relu2") for r in RUNTIMES}


@pytest.mark.parametrize(
    ("runtime", "name"),
    [pytest.param(r, n, marks=pytest.mark.slow if (r, n) in LONG else ()) for r in RUNTIMES for n in SPECS],
)
def test_every_runtime_computes_with_its_codes(runtime: str, name: str, tmp_path: Path) -> None:
    (backend, options), spec = RUNTIMES[runtime], SPECS[name]
    weights = random_weights(spec)
    path = write(backend, spec, weights, tmp_path / f"m{backends.get(backend).suffix}", LEVEL, **options)
    check_packing(backend, path, spec, weights, LEVEL)
    check_graph(backend, path, 30, batches=(1,))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "moe"])
def test_every_target_passes_verification(name: str, tmp_path: Path) -> None:
    """As users convert, llama.cpp among them."""
    checkpoint = write_checkpoint(tmp_path / "source", llama(**PATCHES[name]))
    for r in convert_all(checkpoint, ["gguf", "mlx", "onnx", "coreml", "hf"], LEVEL, tmp_path / "out"):
        assert r.report is not None and r.levels[LEVEL] >= 4
        assert {str(c.status) for c in r.report.checks} <= {"PASS", "EMULATED"}, r.backend


def test_onnx_runtime_rounds_activations_in_blocks_as_long_as_the_groups(tmp_path: Path) -> None:
    """int8 in blocks of 128 beside weights in groups of 128, else of 32: that explains the whole error."""
    spec, ids = SPECS["llama"], random_ids(SPECS["llama"], 1, 4)
    made = Door(backends.get("onnx")).open_artifact(
        write("onnx", spec, random_weights(spec), tmp_path / "m", LEVEL), spec, LEVEL, 1
    )
    kinds = {w.activation for n in ("layers.0.attn.q.weight", "head.weight") if isinstance(w := made.weights(n), Typed)}
    assert kinds == {"int8", "int8-g128"}
    with made.load(48) as runtime:
        got = runtime.logits(ids)

    def in_blocks_of_32(name: str) -> Any:
        w = made.weights(name)
        return Typed(w.weight, "int8") if isinstance(w, Typed) else w

    ours = made.emulate(ids, 48)
    theirs = numeric.emulate_dtype(spec, in_blocks_of_32, ids, 48, made.artifact.arithmetic)
    assert nmse(got, ours.tiled) <= 1e-12 < 1e-5 < nmse(got, theirs.tiled)


def test_experts_of_two_groups_are_no_case_for_the_fused_operator() -> None:
    mlp = SPECS["moe"].layers[0].mlp
    assert isinstance(mlp, MoE)

    def fused(up: str, down: str, activations: str = "int8") -> bool:
        return grouped_experts(mlp, "ort", "f32", {"gate": up, "up": up, "down": down}, activations)

    assert fused(LEVEL, LEVEL) and fused("q4", "q8") and fused(LEVEL, LEVEL, "float")
    assert not fused(LEVEL, "q8") and not fused(LEVEL, "q4") and not fused("q4", "q8", "float")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["gguf", "mlx", "onnx", "hf"])
def test_experts_of_two_groups_pass_verification(backend: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "source", llama(**PATCHES["moe"]))
    recipe = Recipe(LEVEL, (("layers.*.mlp.experts.down", "q8"), ("layers.0.mlp.experts.up", "q4")))
    result = convert(checkpoint, backend, recipe, tmp_path / f"m{backends.get(backend).suffix}")
    assert result.report is not None and {str(c.status) for c in result.report.checks} == {"PASS"}


def greedy(path: Path, backend: str, prompt: list[int], new: list[int]) -> None:
    """Every new token is our runtime's choice too, or a tie within float32."""
    ids = np.array([prompt + new])
    with backends.load(path, backend) as runtime:
        chosen = runtime.logits(ids)[0, len(prompt) - 1 : -1]
    assert (chosen.max(-1) - chosen[np.arange(len(new)), new] <= 1e-4 * chosen.std()).all()


@pytest.mark.parametrize("name", ["llama", pytest.param("moe", marks=pytest.mark.slow)])
def test_mlx_lm_loads_and_continues(name: str, tmp_path: Path) -> None:
    mlx_lm, mx = pytest.importorskip("mlx_lm"), pytest.importorskip("mlx.core")
    from mlx_lm.generate import generate_step

    checkpoint = write_checkpoint(tmp_path / "source", llama(**PATCHES[name]))
    path = convert(checkpoint, "mlx", LEVEL, tmp_path / "m", options={"compute": "f32"}, verify=False).out
    model, tokenizer = mlx_lm.load(str(path))[:2]
    found = {(m.bits, m.group_size) for _, m in model.named_modules() if hasattr(m, "group_size")}
    assert found == {(4, 128), (8, 32)}
    prompt = tokenizer.encode("def main(argv):\n    ")
    greedy(path, "mlx", prompt, [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=12)])


def test_servers_read_both_groups_from_config_json(tmp_path: Path) -> None:
    """What they compute together has one scheme: q and k have that of v, which is int8."""
    spec = SPECS["llama"]
    path = write("hf", spec, random_weights(spec), tmp_path / "m", LEVEL)
    groups = json.loads((path / "config.json").read_text())["quantization_config"]["config_groups"].values()
    found = {(g["weights"]["num_bits"], g["weights"]["group_size"]): g["targets"] for g in groups}
    assert set(found) == {(4, 128), (8, 32)}
    assert any("up_proj" in t for t in found[4, 128])
    levels = {p.name: p.level for p in planned(backends.get("hf"), spec, LEVEL)}
    for i in range(spec.depth):
        parts = [f"layers.{i}.attn.{x}.weight" for x in "qkv"]
        where = {k for k, ts in found.items() for t in ts if f"layers.{i}.self_attn" in t and "o_proj" not in t}
        assert where == ({(8, 32)} if any(levels[n] == "q8" for n in parts) else {(4, 128)})
