"""Core ML against the oracle: the saved package, interpreted, for every feature, level and option."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("coremltools")

import backends
from backends.base import QuantizedTensor
from backends.coreml.mil.machine import Machine
from backends.coreml.mil.program import functions
from backends.coreml.package import WEIGHTS, read_model
from backends.coreml.program import build, write
from backends.coreml.support import levels, support
from backends.numpy.model import Oracle
from convert.gates import RATIO
from convert.recipe import plan
from convert.stream import rounded
from convert.verify import numeric
from parity_tests import artifacts
from parity_tests.cases import FEATURES, nmse, random_ids, random_specs, random_weights
from spec import Spec


@pytest.fixture(scope="module", autouse=True)
def small_collections() -> Iterator[None]:
    """coremltools collects garbage in every conversion; what was imported before need not be searched each time."""
    gc.freeze()
    yield
    gc.unfreeze()


emulated = pytest.mark.skipif(sys.platform == "darwin", reason="Apple's kernels have other roundings")


@pytest.mark.parametrize("name", FEATURES)
def test_features_match_the_oracle_in_float32(name: str, tmp_path: Path) -> None:
    """On the artifact's own weights, and on the source's: then nothing that was written is compared with itself."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = artifacts.write("coreml", spec, weights, tmp_path / "m.mlpackage")
    artifacts.check_packing("coreml", path, spec, weights, "f32")
    artifacts.check_graph("coreml", path)
    assert artifacts.opened("coreml", path).spec == spec
    ids = random_ids(spec, 1, min(47, spec.context - 1))
    with backends.load(path, "coreml", exact=True) as runtime:
        assert nmse(runtime.logits(ids), Oracle(spec, weights).logits(ids)) <= artifacts.EXACT


def test_every_feature_is_carried() -> None:
    refused = {(n, level): support(s, level).refusals for n, s in FEATURES.items() for level in levels()}
    assert {key: r for key, r in refused.items() if r} == {}


def shipped(spec: Spec, level: str, path: Path, length: int = 47, **options: Any) -> None:
    """The artifact as it ships: bits, the exact graph, and roundings within the gate of the control."""
    weights = random_weights(spec)
    artifacts.write("coreml", spec, weights, path, level, **options)
    artifacts.check_packing("coreml", path, spec, weights, level)
    artifacts.check_graph("coreml", path, length, batches=(1,))
    artifact = artifacts.opened("coreml", path)
    ids = random_ids(spec, 1, min(length, spec.context - 1))
    with backends.load(path, "coreml") as runtime:
        whole = runtime.logits(ids)
        pieces, at = numeric.stepwise(runtime, ids)
    control = numeric.emulate_dtype(spec, artifacts.values(artifact), ids, artifact.session, artifact.arithmetic)
    controls = [control]
    if control.certain and any(b.mlp.kind == "moe" for b in spec.layers):  # the median token too
        controls.append(replace(control, certain=False))
    for c in controls:
        assert c.measure(whole, c.exact) <= RATIO["arithmetic"] * c.control(ids.shape[1])
        assert c.measure(pieces, c.exact[:, at]) <= RATIO["arithmetic"] * c.control(1, at)


QUICK = {(name, level) for name in ("gpt2", "gemma2", "sinks") for level in ("f16", "q4", "lut4")}
QUICK |= {
    ("moe_sinks", "q4"),
    ("moe_sigmoid", "lut4"),
    ("gemma2", "q8"),
    ("gpt2", "lut6"),
    ("clamped_swiglu", "q4"),
    ("uneven_width", "lut4"),
}
ALL = [
    pytest.param(name, level, marks=() if (name, level) in QUICK else pytest.mark.slow)
    for level in levels()
    for name in FEATURES
]


@emulated
@pytest.mark.parametrize(("name", "level"), ALL)
def test_levels_hold_their_bits_and_round_like_the_control(name: str, level: str, tmp_path: Path) -> None:
    shipped(FEATURES[name], level, tmp_path / "m.mlpackage")


@emulated
@pytest.mark.parametrize("level", ["q4", *(pytest.param(n, marks=pytest.mark.slow) for n in ("f32", "q8", "lut6"))])
def test_a_call_of_one_token_runs_its_own_experts_alone(level: str, tmp_path: Path) -> None:
    """In the function for single tokens; the other runs all of them."""
    spec, path = FEATURES["moe_sinks"], tmp_path / "m.mlpackage"
    shipped(spec, level, path, functions="two")
    bodies = {name: f.body for name, f in functions(read_model(path), path / WEIGHTS).items()}
    experts = {name: {o.outputs[0].shape[0] for o in body if o.type == "matmul" and len(o.outputs[0].shape) == 3}
               for name, body in bodies.items()}  # fmt: skip
    assert experts == {"prefill": {4}, "decode": {2}}


@emulated
@pytest.mark.parametrize(("name", "level"), [("tied", "q4"), ("local_theta", "f16")])
def test_a_batch_is_its_rows(name: str, level: str, tmp_path: Path) -> None:
    """With float16 steps and states, which no row may leave to the next; and within the gate on the source's weights
    as they are rounded."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = artifacts.write("coreml", spec, weights, tmp_path / "m.mlpackage", level)
    artifacts.check_graph("coreml", path, batches=(3,))
    artifact = artifacts.opened("coreml", path)
    ids = random_ids(spec, 3, 40)
    with backends.load(path, "coreml") as runtime:
        whole = runtime.logits(ids)
        assert whole.shape == (3, 40, spec.vocab_size)
        for row in (2, 0, 1):
            assert np.array_equal(runtime.logits(ids[row : row + 1])[0], whole[row])
    source = _rounded(spec, weights, level)
    for row in range(3):
        control = numeric.emulate_dtype(spec, source, ids[row : row + 1], artifact.session, artifact.arithmetic)
        assert nmse(whole[row], control.exact[0]) <= RATIO["arithmetic"] * control.control(40)


def _rounded(spec: Spec, weights: dict[str, Any], level: str) -> dict[str, Any]:
    """The source's weights as the plan rounds them, whatever an artifact holds."""
    found = {p.name: rounded(p.name, p.level, 0, weights[p.name]) for p in plan(spec, level)}
    return {name: x.dequantize() if isinstance(x, QuantizedTensor) else x for name, x in found.items()}


@emulated
@pytest.mark.parametrize("level", ["q8", "lut6", *(pytest.param(n, marks=pytest.mark.slow) for n in ("f16", "q4"))])
def test_quantized_weights_in_float32_compute(level: str, tmp_path: Path) -> None:
    shipped(FEATURES["qkv_bias"], level, tmp_path / "m.mlpackage", compute="f32")


@emulated
@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_specs(), st.sampled_from(levels()), st.booleans())
def test_any_combination_holds(tmp_path_factory: pytest.TempPathFactory, spec: Spec, level: str, two: bool) -> None:
    path = tmp_path_factory.mktemp("any") / "m.mlpackage"
    shipped(spec, level, path, length=31, functions="two" if two else "one")


@pytest.mark.parametrize(
    "name", ["odd_heads", "attn_scale", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mqa", "window_pattern"))]
)
def test_the_fused_attention_equals_its_composition(name: str, tmp_path: Path) -> None:
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    ids, found, kinds = random_ids(spec, 1, 40).astype(np.int32), [], []
    for fused in (True, False):
        path = tmp_path / f"{fused}.mlpackage"
        write(build(spec, weights, "f32", None, fused), spec.context, path)
        program = functions(read_model(path), path / WEIGHTS)
        machine = Machine(program, "f64")
        found.append(machine.run("main", {"inputIds": ids}, machine.new_states("main"))["logits"])
        kinds.append({i.type for i in program["main"].body})
    assert kinds[0] - kinds[1] >= {"scaled_dot_product_attention"} and "softmax" in kinds[1] - kinds[0]
    assert nmse(*found) < 1e-14  # the attention scale is a float32 number in one of them


def test_codes_are_the_same_in_every_container(tmp_path: Path) -> None:
    """One content hash: GGUF's decoder and ours give the same codes and scales."""
    pytest.importorskip("gguf")
    from backends.base import content_hash
    from backends.gguf.read import Artifact

    spec, weights = FEATURES["head_dim_free"], random_weights(FEATURES["head_dim_free"])
    core = artifacts.opened("coreml", artifacts.write("coreml", spec, weights, tmp_path / "m.mlpackage", "q8"))
    gguf = Artifact(artifacts.write("gguf", spec, weights, tmp_path / "m.gguf", "q8"))
    for name in ("embed.weight", "layers.1.attn.k.weight", "layers.0.mlp.down.weight", "head.weight"):
        here, there = core.rows(name, 0, len(weights[name])), gguf.tensor(name)
        assert isinstance(here, QuantizedTensor) and isinstance(there, QuantizedTensor), name
        assert content_hash([here]) == content_hash([there]), name


def test_the_longest_feature_stands_up_to_512_tokens(tmp_path: Path) -> None:
    from parity_tests.cases import BASE
    from spec import parse
    from spec.config import merge

    spec = parse(merge(BASE, {"name": "long", "context": 520, "pattern": [{"attention": {"window": 100}}, {}]}))
    path = artifacts.write("coreml", spec, random_weights(spec), tmp_path / "m.mlpackage")
    artifacts.check_graph("coreml", path, length=512, batches=(1,))
