"""Mixtures of experts in ONNX: which operators run them, the fused one against the loop, ties, mutants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir

import backends
from backends.numpy.model import Oracle
from backends.onnx import graph, mixture
from backends.onnx.contrib import OrtOps
from backends.onnx.portable import PortableOps
from backends.onnx.read import Artifact
from convert.verify.artifact import planned
from parity_tests.artifacts import EXACT, check_graph, check_packing, opened, settled_ids, values, write
from parity_tests.cases import BASE, FEATURES, PATCHES, nmse, random_ids, random_weights
from spec import Spec, parse
from spec.config import merge
from spec.errors import UserError

MIXTURES = [name for name in FEATURES if name.startswith("moe")]
PROFILES = ("ort", "portable")


def even(name: str, **mlp: Any) -> Spec:
    """A feature whose experts' widths are whole groups of 32."""
    patch = {"block": {"mlp": {"hidden": 64, **mlp}}}
    return parse(merge(merge(merge(BASE, {"name": name}), PATCHES[name]), patch), name)


def operators(path: Path) -> Counter[str]:
    """How often each stands in the outer graph."""
    return Counter(n.op_type for n in onnx.load(str(path / "model.onnx"), load_external_data=False).graph.node)


def proved(spec: Spec, path: Path, level: str, **options: Any) -> None:
    weights = random_weights(spec)
    write("onnx", spec, weights, path, level, **options)
    check_packing("onnx", path, spec, weights, level)
    check_graph("onnx", path, threads=1)


@pytest.mark.parametrize("level", ["q8", "q4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_fused_operator_computes_quantized_experts(name: str, level: str, tmp_path: Path) -> None:
    spec = even(name)
    proved(spec, tmp_path / "m", level)
    mixed = sum(b.mlp.kind == "moe" for b in spec.layers)
    assert (operators(tmp_path / "m")["QMoE"], operators(tmp_path / "m")["Loop"]) == (mixed, 0)
    assert opened("onnx", tmp_path / "m").arithmetic.unrounded == frozenset()


@pytest.mark.parametrize(
    ("spec", "level", "options"),
    [
        (even("moe"), "f32", {}),
        (even("moe"), "q4", {"profile": "portable"}),
        (even("moe", activation="gelu_tanh"), "q4", {}),
        (even("moe", activation="relu", bias={"up": True}), "q8", {}),
        (even("moe", bias={"gate": True}), "q8", {}),
        (even("moe_ungated", activation="relu2"), "q4", {}),
        (even("moe", hidden=40), "q4", {}),  # down stays f16
        (even("moe"), "q8", {"compute": "f16"}),
        (even("moe"), "q8", {"activations": "float"}),  # at 8 bits the fused one has int8 alone
    ],
)
def test_other_experts_are_looped_over(spec: Spec, level: str, options: dict[str, str], tmp_path: Path) -> None:
    proved(spec, tmp_path / "m", level, **options)
    assert (operators(tmp_path / "m")["QMoE"], operators(tmp_path / "m")["Loop"]) == (0, spec.depth)
    artifact = opened("onnx", tmp_path / "m")
    quantized = {f"layers.{i}.mlp.experts.{part}.weight" for i in range(2) for part in ("gate", "up", "down")}
    if artifact.arithmetic.activations is not None:  # what these products take is not rounded to int8
        assert artifact.arithmetic.unrounded == {n for n in quantized if n in random_weights(spec)}


@pytest.mark.parametrize("level", ["q4", "f16"])
@pytest.mark.parametrize("profile", PROFILES)
def test_graphs_of_16_bits_are_exact_in_float32(profile: str, level: str, tmp_path: Path) -> None:
    for name in ("moe_sigmoid", "moe_shared_gate", "moe_sinks"):
        proved(even(name), tmp_path / name, level, profile=profile, compute="f16")


@pytest.mark.parametrize("name", ["moe", "moe_sinks", "moe_sigmoid", "moe_ungated"])
def test_the_fused_operator_equals_the_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = even(name, **({"activation": "relu"} if name == "moe_ungated" else {}))
    weights = random_weights(spec)
    write("onnx", spec, weights, tmp_path / "ort", "q4")
    write("onnx", spec, weights, tmp_path / "portable", "q4", profile="portable")
    ids, _ = settled_ids(Oracle(spec, values(opened("onnx", tmp_path / "ort"))), 2, 30)
    got = []
    for profile in PROFILES:
        with backends.load(tmp_path / profile, exact=True, threads=1) as runtime:
            got.append(runtime.logits(ids))
    assert nmse(got[0], got[1]) < 1e-12


@pytest.mark.parametrize("loops", [True, False])
def test_all_experts_at_once_equal_the_loop(loops: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorRT gets."""
    if not loops:
        monkeypatch.setattr(PortableOps, "experts", mixture.every)
    for name in MIXTURES:
        write("onnx", FEATURES[name], random_weights(FEATURES[name]), tmp_path / name, "q4", profile="portable")
        check_graph("onnx", tmp_path / name, threads=1)
        assert (operators(tmp_path / name)["Loop"] > 0) is loops


@pytest.mark.parametrize(("level", "profile"), [("f32", "portable"), ("f32", "ort"), ("q4", "ort"), ("q8", "ort")])
def test_equal_scores_choose_the_lower_number(level: str, profile: str, tmp_path: Path) -> None:
    """A router of zeros; and one that sends every token to the same two, so that the other experts see none."""
    spec = even("moe_sinks")
    for bias in (np.zeros(4), np.array([0.0, 9.0, 0.0, 9.0])):
        weights = random_weights(spec)
        for i in range(spec.depth):
            weights[f"layers.{i}.mlp.router.weight"][:] = 0
            weights[f"layers.{i}.mlp.router.bias"][:] = bias
        path = write("onnx", spec, weights, tmp_path / f"m{bias[1]}", level, profile=profile)
        exact = Oracle(spec, values(opened("onnx", path)))
        for ids in (random_ids(spec, 2, 30), random_ids(spec, 1, 1)):
            with backends.load(path, exact=True, threads=1) as runtime:
                assert nmse(runtime.logits(ids), exact.logits(ids)) <= EXACT


@pytest.mark.parametrize("level", ["q8", "q4"])
def test_a_gates_and_ups_rows_lie_in_turn(level: str, tmp_path: Path) -> None:
    """As QMoE takes them; each is read back by itself, and a row that moved is seen."""
    spec = even("moe_sinks")
    weights = random_weights(spec)
    path = write("onnx", spec, weights, tmp_path / "m", level)
    check_packing("onnx", path, spec, weights, level)
    data = path / "model.onnx.data"
    found = onnx.load(str(path / "model.onnx"), load_external_data=False).graph.initializer
    (codes,) = (t for t in found if t.name == f"layers.0.mlp.experts.gate.weight.{level}.pairs")
    assert list(codes.dims) == [4, 2 * 64, 32 * int(level[1:]) // 8]
    offset = next(int(e.value) for e in codes.external_data if e.key == "offset")
    row = codes.dims[2]
    held = bytearray(data.read_bytes())
    held[offset : offset + 2 * row] = held[offset + row : offset + 2 * row] + held[offset : offset + row]
    data.write_bytes(held)
    with pytest.raises(AssertionError, match=r"experts\.gate"):
        check_packing("onnx", path, spec, weights, level)


def test_experts_in_each_others_place_are_seen_by_the_packing(tmp_path: Path) -> None:
    for profile in PROFILES:
        spec = even("moe")
        weights = random_weights(spec)
        wrong = dict(weights)
        name = "layers.1.mlp.experts.down.weight"
        wrong[name] = np.roll(weights[name].reshape(5, -1), 1, axis=0).reshape(weights[name].shape)
        write("onnx", spec, wrong, tmp_path / profile, "q4", profile=profile)
        with pytest.raises(AssertionError, match=r"experts\.down"):
            check_packing("onnx", tmp_path / profile, spec, weights, "q4")


def test_another_tensors_bytes_are_a_problem(tmp_path: Path) -> None:
    """An initializer that points at another place than the layout's."""
    spec = even("moe")
    path = write("onnx", spec, random_weights(spec), tmp_path / "m", "q4")
    made = ir.load(path / "model.onnx")
    first, second = (made.graph.initializers[f"layers.{i}.mlp.experts.gate.weight.q4.pairs"] for i in (0, 1))
    first.const_value, second.const_value = second.const_value, first.const_value
    ir.save(made, path / "model.onnx")
    problems = Artifact(path).problems(planned(backends.get("onnx"), spec, "q4"))
    wrong = {f"layers.{i}.mlp.experts.{part}.weight.q4" for i in (0, 1) for part in ("gate", "up")}
    assert set(problems) == wrong


def _router(**change: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Another field of the router."""

    def seed(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = mixture.route

        def route(ops: Any, x: Any, w: Any, m: Any) -> Any:
            return plain(ops, x, w, m.model_copy(update={"router": m.router.model_copy(update=change)}))

        monkeypatch.setattr(mixture, "route", route)

    return seed


def _without(part: str, field: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A weight that the graph forgets."""

    def seed(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = graph.handles

        def handles(spec: Spec) -> Any:
            w = plain(spec)
            for layer in w.layers:
                if hasattr(layer.mlp, part):
                    setattr(layer.mlp, part, replace(getattr(layer.mlp, part), **{field: None}))
            return w

        monkeypatch.setattr(graph, "handles", handles)

    return seed


def _reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first experts in the place of the last."""
    plain = mixture.route

    def route(ops: Any, x: Any, w: Any, m: Any) -> Any:
        chosen, weights = plain(ops, x, w, m)
        return ops.g("Sub", ops.g.constant(m.experts - 1, "i64"), chosen), weights

    monkeypatch.setattr(mixture, "route", route)


def _one_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mixture._by_token

    def by_token(ops: Any, routes: Any, m: Any) -> Any:
        return tuple(ops.g("Slice", t, ops.g.ints(0), ops.g.ints(m.router.top_k - 1), ops.g.ints(1))
                     for t in plain(ops, routes, m))  # fmt: skip

    monkeypatch.setattr(mixture, "_by_token", by_token)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "experts_swapped": (_reversed, "moe"),
    "renormalise_dropped": (_router(renormalise=False), "moe"),
    "renormalised": (_router(renormalise=True), "moe_plain_scores"),
    "one_fewer": (_one_fewer, "moe_plain_scores"),
    "scale_dropped": (_router(scale=1.0), "moe_sigmoid"),
    "softmax_for_sigmoid": (_router(score="softmax"), "moe_sigmoid"),
    "router_bias_dropped": (_without("router", "bias"), "moe_sinks"),
    "correction_dropped": (_without("router", "correction"), "moe_sigmoid"),
    "shared_gate_dropped": (lambda m: m.setattr(PortableOps, "gate", lambda self, x, y: x), "moe_shared_gate"),
}
"""Graphs that are wrong on purpose, and a feature in which it shows."""


@pytest.mark.parametrize("level", ["f32", "q4"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_mixture_is_seen(mutant: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the loop and in the fused operator."""
    seed, name = MUTANTS[mutant]
    seed(monkeypatch)
    spec = even(name)
    write("onnx", spec, random_weights(spec), tmp_path / "m", level)
    with pytest.raises((AssertionError, UserError), match=r"batch|is missing"):
        check_graph("onnx", tmp_path / "m", threads=1)


@pytest.mark.parametrize(
    ("attribute", "value", "name"),
    [("swiglu_limit", 1.0, "moe_sinks"), ("activation_alpha", 1.71, "moe_sinks"), ("k", 1, "moe"),
     ("activation_beta", 0.99, "moe_sinks"), ("normalize_routing_weights", 1, "moe_sigmoid")],
)  # fmt: skip
@pytest.mark.parametrize("level", ["q8", "q4"])
def test_a_wrong_attribute_of_the_fused_operator_is_seen(
    level: str, attribute: str, value: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = OrtOps.fused

    def fused(self: OrtOps, kind: str, *inputs: Any, **attributes: Any) -> Any:
        changed = {attribute: value} if kind == "QMoE" else {}
        return plain(self, kind, *inputs, **{**attributes, **changed})

    monkeypatch.setattr(OrtOps, "fused", fused)
    spec = even(name)
    write("onnx", spec, random_weights(spec), tmp_path / "m", level)
    with pytest.raises(AssertionError, match="batch"):
        check_graph("onnx", tmp_path / "m", threads=1)
