"""Core ML through the whole verification, and changes to a saved program that the proof must see."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("coremltools")

import backends
from backends.coreml.mil.program import functions
from backends.coreml.package import WEIGHTS, read_model, write_model
from backends.coreml.runtime import load
from backends.numpy.model import Oracle
from convert.pipeline import convert
from convert.sources import open_source
from convert.verify import Status
from convert.verify.artifact import Packed, planned
from convert.verify.packing import check_packing
from convert.verify.report import Check
from parity_tests import artifacts
from parity_tests.cases import BASE, FEATURES, nmse, random_ids, random_weights
from spec import Spec, dump, parse
from spec.config import merge
from spec.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the interpreter is the runtime only elsewhere")


def checkpoint(folder: Path, spec: Spec) -> Path:
    """Weights and a tokenizer of our own: byte-level BPE over 256 bytes and two special tokens."""
    from backends.text import _byte_alphabet

    folder.mkdir()
    (folder / "spec.yaml").write_text(dump(spec))
    save_file(random_weights(spec), folder / "model.safetensors")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": 256 + i, "content": t, **special} for i, t in enumerate(("<s>", "</s>"))]
    model = {"type": "BPE", "vocab": _byte_alphabet(), "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": level, "post_processor": None,
        "decoder": level, "model": model,
    }))  # fmt: skip
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("level", "functions"), [("q4", "two"), pytest.param("lut6", "one", marks=pytest.mark.slow)])
def test_a_conversion_verifies_itself_as_emulated(level: str, functions: str, tmp_path: Path) -> None:
    spec = parse(merge(BASE, {"name": "small", "vocab_size": 260, "width": 64, "context": 128,
                              "pattern": [{"attention": {"window": 20}}, {}]}))  # fmt: skip
    source = checkpoint(tmp_path / "source", spec)
    out = tmp_path / "small.mlpackage"
    result = convert(source, "coreml", level, out, options={"functions": functions}, threads=1)
    assert result.report is not None
    found = {c.name: c.status for c in result.report.checks}
    emulated = dict.fromkeys(("runtime", "graph", "arithmetic", "invariants", "quality"), Status.EMULATED)
    assert found == {"packing": Status.PASS, **emulated, "tokenizer": Status.PASS}
    assert artifacts.opened("coreml", out).receipt["parity"]["checks"]["graph"]["status"] == "EMULATED"
    assert (tmp_path / "small.mlpackage.md").is_file() and not list(tmp_path.glob("*.partial"))
    with backends.load(out) as runtime:
        assert bytes(runtime.decode(runtime.encode("naïve"))) == "naïve".encode()


def test_a_greedy_continuation_is_the_oracle_s(tmp_path: Path) -> None:
    """On the artifact's own weights; a tie within the roundings may go either way."""
    spec = FEATURES["gemma2"]
    path = artifacts.write("coreml", spec, random_weights(spec), tmp_path / "m.mlpackage", "q8", functions="two")
    oracle = Oracle(spec, artifacts.values(artifacts.opened("coreml", path)))
    ids = random_ids(spec, 1, 8)[0].tolist()
    with load(path) as runtime:
        logits = runtime.prefill(np.array(ids))
        for _ in range(30):
            exact = oracle.logits(np.array([ids]))[0, -1]
            chosen = int(logits.argmax())
            assert exact.max() - exact[chosen] <= 4 * np.abs(logits - exact).max()
            ids.append(chosen)
            logits = runtime.step(np.array([chosen]))[-1]


@pytest.mark.parametrize(("hidden", "budget"), [(40, 1000), (8224, 1 << 30)])
def test_a_table_of_zeros_does_not_pass_for_the_source_s(hidden: int, budget: int, tmp_path: Path) -> None:
    """Blocks of the packing check have whole groups of rows, in matrices so wide that one is larger than a block too,
    and where a sample of blocks is compared."""
    spec = parse(merge(BASE, {"name": "wide", "vocab_size": 260, "depth": 1, "block": {"mlp": {"hidden": hidden}}}))
    source = open_source(checkpoint(tmp_path / "source", spec))
    path = artifacts.write("coreml", spec, random_weights(spec), tmp_path / "m.mlpackage", "lut4")

    def packing() -> Check:
        artifact = artifacts.opened("coreml", path)
        return check_packing(Packed(artifact, planned(backends.get("coreml"), spec, "lut4")), source, budget)

    assert packing().status == Status.PASS
    body = functions(read_model(path), path / WEIGHTS)["main"].body
    table = next(i for i in body if i.outputs and i.outputs[0].name == "layers_0_mlp_down_weight").args["lut"]
    start, size = table._place
    with table.file.open("r+b") as f:
        f.seek(start)
        f.write(bytes(size))
    found = packing()
    assert found.status == Status.FAIL and "layers.0.mlp.down.weight" in found.reason, found


Change = Callable[[Any], None]


def _swap(kind: str, a: str, b: str) -> Change:
    """The first operation of a kind with two arguments exchanged."""

    def change(operations: Any) -> None:
        op = next(o for o in operations if o.type == kind)
        first, second = op.inputs[a].arguments[0].name, op.inputs[b].arguments[0].name
        op.inputs[a].arguments[0].name, op.inputs[b].arguments[0].name = second, first

    return change


def _retype(kind: str, to: str, nth: int = 0) -> Change:
    def change(operations: Any) -> None:
        [o for o in operations if o.type == kind][nth].type = to

    return change


def _named(operations: Any, name: str) -> Any:
    return next(o for o in operations if o.outputs and o.outputs[0].name == name)


def _epsilon(operations: Any) -> None:
    op = next(o for o in operations if o.type == "rsqrt")
    name = op.inputs["epsilon"].arguments[0].name
    _named(operations, name).attributes["val"].immediateValue.tensor.floats.values[0] = 1e-6


def _window(operations: Any) -> None:
    """One token more in the window."""
    op = next(o for o in operations if o.type == "less")
    name = op.inputs["y"].arguments[0].name
    _named(operations, name).attributes["val"].immediateValue.tensor.ints.values[0] += 1


def _gate(operations: Any) -> None:
    _named(operations, "L1_attn_o").inputs["x"].arguments[0].name = "L0_attn_mix"


def _stale(operations: Any) -> None:
    """Keys are read from another layer's place in the states."""
    op = next(o for o in operations if o.type == "slice_by_index" and o.outputs[0].type.tensorType.rank == 4)
    held = _named(operations, op.inputs["begin"].arguments[0].name).attributes["val"].immediateValue.tensor
    held.ints.values[0] = 1 - held.ints.values[0]


MUTANTS: dict[str, Change] = {
    "rotation turned the other way": _swap("sub", "x", "y"),
    "mask excludes the token itself": _retype("greater_equal", "greater"),
    "silu became relu": _retype("silu", "relu"),
    "rms epsilon": _epsilon,
    "window of one more": _window,
    "another layer's heads": _gate,
    "another layer's keys": _stale,
}


def _bypass(kind: str, after: str) -> Change:
    """The first operation of a kind that takes what one of kind `after` gives: its x goes on in place of its result."""

    def change(operations: Any) -> None:
        makers = {v.name: o.type for o in operations for v in o.outputs}

        def takes(o: Any) -> bool:
            return any(makers.get(a.name) == after for arg in o.inputs.values() for a in arg.arguments)

        op = next(o for o in operations if o.type == kind and takes(o))
        held, made = op.inputs["x"].arguments[0].name, op.outputs[0].name
        for argument in (a for o in operations for arg in o.inputs.values() for a in arg.arguments):
            if argument.name == made:
                argument.name = held

    return change


def _experts_swapped(operations: Any) -> None:
    op = next(o for o in operations if o.outputs and o.outputs[0].name.startswith("experts_"))
    numbers = op.attributes["val"].immediateValue.tensor.ints.values
    numbers[0], numbers[1] = 1, 0


def _router_bias(operations: Any) -> None:
    """The first layer's router without its bias."""
    scores = next(o for o in operations if o.outputs and o.outputs[0].name.endswith("mlp_scores"))
    del _named(operations, scores.inputs["x"].arguments[0].name).inputs["bias"]


MIXTURES: dict[str, tuple[Change, str]] = {
    "experts in each other's place": (_experts_swapped, "moe_plain_scores"),
    "weights are not divided by their sum": (_bypass("real_div", "topk"), "moe"),
    "weights are not scaled": (_bypass("mul", "real_div"), "moe_sigmoid"),
    "the router's bias is dropped": (_router_bias, "moe_sinks"),
    "the correction is dropped": (_bypass("add", "sigmoid"), "moe_sigmoid"),
    "the shared expert's gate is dropped": (_bypass("mul", "sigmoid"), "moe_shared_gate"),
}
"""Changes of mixtures of experts, and a feature in which each shows."""


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that passes before anything is changed."""
    spec = FEATURES["window"]
    path = tmp_path_factory.mktemp("proven") / "m.mlpackage"
    artifacts.write("coreml", spec, random_weights(spec), path, "q8")
    artifacts.check_graph("coreml", path, batches=(1,))
    return path


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_program_does_not_pass(name: str, proven: Path, tmp_path: Path) -> None:
    check_change(FEATURES["window"], MUTANTS[name], shutil.copytree(proven, tmp_path / "m.mlpackage"))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_changed_mixture_does_not_pass(name: str, tmp_path: Path) -> None:
    change, feature = MIXTURES[name]
    spec = FEATURES[feature]
    path = artifacts.write("coreml", spec, random_weights(spec), tmp_path / "m.mlpackage", "q8")
    artifacts.check_graph("coreml", path, batches=(1,))
    check_change(spec, change, path)


def check_change(spec: Spec, change: Change, path: Path) -> None:
    """The graph check sees a changed program on the same weights."""
    before = (path / WEIGHTS / "weight.bin").read_bytes()
    model = read_model(path)
    change(_operations(model))
    write_model(path, model)
    assert (path / WEIGHTS / "weight.bin").read_bytes() == before
    oracle = Oracle(spec, artifacts.values(artifacts.opened("coreml", path)))
    ids = random_ids(spec, 1, 40)
    exact = oracle.logits(ids)
    with load(path, exact=True) as runtime:
        assert nmse(runtime.logits(ids), exact) > 50 * artifacts.EXACT
    with pytest.raises(AssertionError):
        artifacts.check_graph("coreml", path, batches=(1,))


def _operations(model: Any, function: str = "main") -> Any:
    return model.mlProgram.functions[function].block_specializations["CoreML8"].operations


def _shape(model: Any) -> None:
    op = next(o for o in _operations(model) if o.type == "linear")
    op.outputs[0].type.tensorType.dimensions[-1].constant.size += 7


def _mixed(model: Any) -> None:
    """Half of a head is no longer made float32 before it is multiplied by the float32 rotary table."""
    operations = _operations(model)
    halves = {v.name for o in operations if o.type == "split" for v in o.outputs}
    n = next(n for n, o in enumerate(operations) if o.type == "cast" and o.inputs["x"].arguments[0].name in halves)
    held, made = operations[n].inputs["x"].arguments[0].name, operations[n].outputs[0].name
    del operations[n]
    for argument in (a for o in operations for arg in o.inputs.values() for a in arg.arguments):
        if argument.name == made:
            argument.name = held


def _short(model: Any) -> None:
    model.description.input[0].type.multiArrayType.shapeRange.sizeRanges[1].upperBound = 2


def _elsewhere(model: Any) -> None:
    """Decode's matrix of one layer is another layer's."""
    first, second = (_named(_operations(model, "decode"), f"layers_{i}_mlp_up_weight") for i in (0, 1))
    first.inputs["data"].CopyFrom(second.inputs["data"])


FORBIDDEN: dict[str, tuple[Callable[[Any], None], str, str, str]] = {
    "a declared shape is wrong by 7": (_shape, "main", "Mismatch between var types", "is declared"),
    "float16 and float32 operands mix": (_mixed, "main", "coremltools does not load it", "which MIL does not mix"),
    "calls of two tokens at most": (_short, "main, description of inputs", r"\(1, 2\)\)\)\], not", ""),
    "decode's weight is another": (_elsewhere, "layers.0.mlp.up.weight", "is another in the function decode", ""),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_package_that_a_client_could_not_run_does_not_pass(name: str, tmp_path: Path) -> None:
    spec, (change, key, problem, refusal) = FEATURES["gemma2"], FORBIDDEN[name]
    count = "two" if change is _elsewhere else "one"
    path = artifacts.write("coreml", spec, random_weights(spec), tmp_path / "m.mlpackage", "q8", functions=count)
    plan = planned(backends.get("coreml"), spec, "q8")
    model = read_model(path)
    change(model)
    write_model(path, model)
    found = artifacts.opened("coreml", path).problems(plan)
    assert list(found) == [key] and re.search(problem, found[key]), found
    if refusal:
        with pytest.raises(UserError, match=refusal):
            artifacts.check_graph("coreml", path)
