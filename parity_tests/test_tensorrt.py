"""The graph that TensorRT gets: parsed and built by NVIDIA's own code where there is no GPU, and computed right."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import backends
from backends.tensorrt.build import ENGINE
from backends.tensorrt.support import HOLDS, computed_in, levels, recipe, support
from parity_tests import tensorrt_rtx as rtx
from parity_tests.cases import FEATURES, random_specs, random_weights
from parity_tests.tensorrt_graphs import write_graph
from spec import Spec
from spec.params import params

pytest.importorskip("onnx_ir")

ROOT = Path(__file__).parents[1]
MIXED = ("llama", "tied", "uneven_width", "gemma2", "gpt2", "sinks")
"""Every kind of weight and of attention."""
LEVELS = levels()
CHOICES = [(level, compute) for level in LEVELS for compute in ("f16", "bf16", "f32") if level in HOLDS[compute]]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[rtx.Workshop]:
    """TensorRT-RTX's parser and builder."""
    if why := rtx.absent():
        pytest.skip(why)
    with rtx.Workshop(tmp_path_factory.mktemp("rtx")) as made:
        yield made


def builds(shop: rtx.Workshop, spec: Spec, level: str, compute: str, path: Path, **how: Any) -> rtx.Built:
    """The engine of a spec's graph with random weights."""
    write_graph(spec, random_weights(spec), path, level, compute)
    made = shop.build(path, spec, compute, **how)
    assert made.error == ""
    assert made.size > 0
    return made


def test_no_feature_is_refused() -> None:
    refused = {n: support(s, level).refusals for n, s in FEATURES.items() for level in LEVELS}
    assert {n: r for n, r in refused.items() if r} == {}


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_builds(name: str, shop: rtx.Workshop, tmp_path: Path) -> None:
    builds(shop, FEATURES[name], "q4", computed_in("q4", ""), tmp_path)


@pytest.mark.parametrize(("level", "compute"), CHOICES)
@pytest.mark.parametrize("name", [MIXED[0], *(pytest.param(n, marks=pytest.mark.slow) for n in MIXED[1:])])
def test_every_level_builds(name: str, level: str, compute: str, shop: rtx.Workshop, tmp_path: Path) -> None:
    builds(shop, FEATURES[name], level, compute, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in LEVELS if level != "q4"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_builds_at_every_level(name: str, level: str, shop: rtx.Workshop, tmp_path: Path) -> None:
    builds(shop, FEATURES[name], level, computed_in(level, ""), tmp_path)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(spec=random_specs(), choice=st.sampled_from(CHOICES))
def test_any_combination_builds(
    shop: rtx.Workshop, spec: Spec, choice: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    builds(shop, spec, *choice, tmp_path_factory.mktemp("any"))


@pytest.mark.parametrize(
    ("level", "compute"), [("f16", "f16"), ("q8", "bf16"), ("q4", "f16"), ("fp8", "f16"), ("nvfp4", "f16")]
)
def test_the_float32_twin_builds(level: str, compute: str, shop: rtx.Workshop, tmp_path: Path) -> None:
    builds(shop, FEATURES["tied"], level, compute, tmp_path, exact=True)


@pytest.mark.parametrize(
    ("name", "fused"), [("llama", 2), ("tied", 2), ("window_pattern", 4), ("gemma2", 0), ("alibi", 0)]
)
def test_caches_are_written_in_place(name: str, fused: int, shop: rtx.Workshop, tmp_path: Path) -> None:
    """Every cache is TensorRT's own kind of update, and attention is one operation where nothing forbids it."""
    spec = FEATURES[name]
    write_graph(spec, random_weights(spec), tmp_path, "q4", "f16")
    layers = shop.layers(tmp_path)
    assert layers["KV_CACHE_UPDATE"] == 2 * spec.depth
    assert layers.get("ATTENTION_INPUT", 0) == fused
    assert layers["DEQUANTIZE"] >= 7 * spec.depth


def test_the_engine_is_written_whole(shop: rtx.Workshop, tmp_path: Path) -> None:
    made = builds(shop, FEATURES["llama"], "q8", "f16", tmp_path, keep=tmp_path / ENGINE)
    assert (tmp_path / ENGINE).stat().st_size == made.size


def test_measured_kernels_are_kept_between_builds(shop: rtx.Workshop, tmp_path: Path) -> None:
    timing = tmp_path / "cache" / "gpu.timing"
    builds(shop, FEATURES["llama"], "f16", "f16", tmp_path, timing=timing)
    written = timing.read_bytes()
    assert written and [f.name for f in timing.parent.iterdir()] == [timing.name]
    for found in (written, b"no timing cache at all"):
        timing.write_bytes(found)
        assert shop.build(tmp_path, FEATURES["llama"], "f16", timing=timing).error == ""


@pytest.mark.parametrize("head_dim", [10, 100, 128])
def test_head_dims_build_in_sixteen_bits(head_dim: int, shop: rtx.Workshop, tmp_path: Path) -> None:
    """Also those that no fused kernel has."""
    spec = Spec.model_validate({
        "vocab_size": 64, "width": 64, "depth": 1, "context": 16,
        "block": {"attention": {"heads": 3, "kv_heads": 3, "head_dim": head_dim}, "mlp": {"hidden": 64}},
    })  # fmt: skip
    builds(shop, spec, "f16", "f16", tmp_path)


def test_a_graph_that_tensorrt_does_not_take_is_refused(shop: rtx.Workshop, tmp_path: Path) -> None:
    """The proof can fail: codes with a zero point that is not zero, and a type mismatch."""
    import onnx
    from onnx import TensorProto, helper

    def model(zero: int, kind: int) -> Path:
        codes = helper.make_tensor("codes", TensorProto.INT8, (32, 32), np.ones(1024, np.int8).tobytes(), raw=True)
        scale = helper.make_tensor("scale", TensorProto.FLOAT16, (), [0.5])
        point = helper.make_tensor("point", TensorProto.INT8, (), [zero])
        made = helper.make_graph(
            [helper.make_node("DequantizeLinear", ["codes", "scale", "point"], ["w"]),
             helper.make_node("MatMul", ["x", "w"], ["y"])],
            "g", [helper.make_tensor_value_info("x", kind, (1, 32))],
            [helper.make_tensor_value_info("y", kind, (1, 32))], [codes, scale, point],
        )  # fmt: skip
        file = tmp_path / f"{zero}-{kind}.onnx"
        onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), file)
        return file

    assert shop.plain(model(0, TensorProto.FLOAT16)).error == ""
    assert "parser refuses it" in shop.plain(model(1, TensorProto.FLOAT16)).error
    assert shop.plain(model(0, TensorProto.FLOAT)).error != ""


OWNERS = {
    "self._engine": "ICudaEngine", "self._runtime": "Runtime", "context": "IExecutionContext", "builder": "Builder",
    "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig", "tensor": "ITensor",
    "profile": "IOptimizationProfile", "kept": "ITimingCache", "layer": "IAttentionInputLayer", "trt": "",
}  # fmt: skip
"""What the variables of engine.py and runtime.py hold that come from NVIDIA, by class."""
TORCH = {"tensor": {"data_ptr"}}
"""Attributes of torch's objects under the same names."""


def calls(source: str) -> Iterator[tuple[str, str, int | None]]:
    """Every use of NVIDIA's classes: owner, attribute, and how many arguments it is called with (none: not called)."""
    tree = ast.parse(source)
    called = {id(n.func): len(n.args) + len(n.keywords) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = OWNERS.get(ast.unparse(node.value))
            if owner and node.attr not in TORCH.get(ast.unparse(node.value), ()) and not node.attr.startswith("__"):
                yield owner, node.attr, called.get(id(node))
            inner = node.value
            if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "trt":
                yield inner.attr, node.attr, None


def takes(documented: str, name: str, count: int) -> bool:
    """Whether one of the documented signatures of a method takes so many arguments."""
    for found in re.findall(rf"{name}\(self[^,)]*((?:, \w+: [^,)]+)*)\)", documented):
        given = [a for a in found.split(", ") if a]
        if sum("=" not in a for a in given) <= count <= len(given):
            return True
    return False


def test_the_api_is_nvidias(shop: rtx.Workshop) -> None:
    """Attributes, methods and argument counts that running an engine uses exist in NVIDIA's Python API."""
    folder = ROOT / "backends" / "tensorrt"
    used = {c for file in ("engine.py", "runtime.py") for c in calls((folder / file).read_text(encoding="utf-8"))}
    assert {owner for owner, *_ in used} > {"ICudaEngine", "IExecutionContext", "DataType", "TensorIOMode", "LayerType"}
    wanted: dict[str, list[str]] = {}
    for owner, name, _ in used:
        wanted.setdefault(owner, []).append(name)
    known = shop.ask("signatures", wanted=wanted)
    assert {f"{o}.{n}" for o, n, _ in used if known[o][n] is None} == set()
    counted = [(o, n, count) for o, n, count in used if count is not None]
    assert [c for c in counted if not takes(known[c[0]][c[1]], c[1], c[2])] == []
    assert not takes(known["IExecutionContext"]["set_tensor_address"], "set_tensor_address", 1)


def test_support_needs_no_package_and_names_what_to_do() -> None:
    (refusal,) = backends.support("tensorrt", FEATURES["llama"], "f32", compute="f16").refusals
    assert refusal.startswith("compute: f16 would round the weights of level f32 again")
    (refusal,) = backends.support("tensorrt", FEATURES["llama"], "q4_k_m").refusals
    assert refusal.startswith("level: q4_k_m")
    (refusal,) = backends.support("tensorrt", FEATURES["llama"], "fp8", compute="bf16").refusals
    assert refusal.startswith("compute: bf16 would round the weights of level fp8 again (try --compute f16")
    (refusal,) = backends.support("tensorrt", FEATURES["llama"], "mxfp8").refusals
    assert "E8M0" in refusal and refusal.endswith("try fp8 or nvfp4)")


@pytest.mark.parametrize("level", ["fp8", "nvfp4"])
def test_narrow_floats_keep_embeddings_heads_and_routers(level: str) -> None:
    """As NVIDIA's own recipes do; and widths that are no whole blocks."""
    for name in ("moe", "uneven_width", "learned"):
        chosen = recipe(FEATURES[name], level)
        assert {k for n, k in chosen.items() if n.startswith(("embed.w", "head.w", "positions."))} == {"f16"}
        assert {chosen[p.name] for p in params(FEATURES[name]) if not p.matrix} == {"f32"}
        odd = {p.name for p in params(FEATURES[name]) if p.matrix and p.shape[-1] % 16 and p.name.startswith("layers.")}
        assert {chosen[n] for n in odd} <= {"f16" if level == "nvfp4" else "fp8"}
        assert level in chosen.values()


def test_scales_in_e8m0_are_still_refused_by_the_parser(shop: rtx.Workshop, tmp_path: Path) -> None:
    """When this fails, TensorRT has learnt to read them: then mxfp8 can be offered."""
    import ml_dtypes
    import onnx
    from onnx import TensorProto, helper

    codes = np.ones((32, 32), ml_dtypes.float8_e4m3fn).tobytes()
    held = [helper.make_tensor("codes", TensorProto.FLOAT8E4M3FN, (32, 32), codes, raw=True),
            helper.make_tensor("scales", TensorProto.FLOAT8E8M0, (32, 1), bytes(32 * [127]), raw=True)]  # fmt: skip
    nodes = [helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1, block_size=32,
                              output_dtype=TensorProto.FLOAT),
             helper.make_node("MatMul", ["x", "w"], ["y"])]  # fmt: skip
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 32)) for n in "xy")
    made = helper.make_graph(nodes, "g", [x], [y], held)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 25)], ir_version=12), tmp_path / "m.onnx")
    assert "Failed to import initializer" in shop.plain(tmp_path / "m.onnx").error
