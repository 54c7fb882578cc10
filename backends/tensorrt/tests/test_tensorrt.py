"""Bounds, options, folders, and what is said where TensorRT or a GPU is missing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import backends
from backends.folder import read_mark
from backends.tensorrt import device as devices
from backends.tensorrt.build import ENGINE, size, writer
from backends.tensorrt.engine import BATCH, CHUNK, limits, shape
from backends.tensorrt.read import open_artifact
from backends.tensorrt.session import Sequences
from backends.tensorrt.support import support
from convert.pipeline import convert
from convert.recipe import plan
from parity_tests.cases import BASE, FEATURES, random_weights
from parity_tests.checkpoints import write_checkpoint
from parity_tests.tensorrt_graphs import OrtExecutor, write_graph
from spec import Spec, parse
from spec.config import merge
from spec.errors import MissingDependency, UserError

ROOT = Path(__file__).parents[3]
LLAMA = FEATURES["llama"]
pytest.importorskip("onnx_ir")


def usable() -> bool:
    """Whether engines can be built here."""
    try:
        devices.device("here")
    except UserError:
        return False
    return True


without = pytest.mark.skipif(usable(), reason="NOT_RUN: TensorRT and a GPU are here")


def large(context: int, heads: int = 32, **attention: object) -> Spec:
    """A model of the size that people use."""
    return Spec.model_validate({
        "vocab_size": 128256, "width": 2048, "depth": 16, "context": context,
        "block": {"attention": {"heads": heads, "kv_heads": 8, **attention}, "mlp": {"hidden": 8192}},
    })  # fmt: skip


def test_profiles_hold_every_step_that_fits() -> None:
    bounds = limits(LLAMA, "f16")
    decode, prefill = bounds.profiles()
    assert decode["tokens"] == (1, 1, 1)
    assert prefill["tokens"] == (1, LLAMA.context, LLAMA.context)  # never longer than the caches
    assert decode["total"][0] == prefill["total"][0] == 1
    assert decode["total"][2] == prefill["total"][2] == LLAMA.context
    for profile in (decode, prefill):
        assert all(low <= likely <= high for low, likely, high in profile.values())


@pytest.mark.parametrize(
    ("spec", "compute", "chunk"),
    [
        (large(4096), "f16", CHUNK),
        (large(131072), "f16", CHUNK),  # only a mask grows with the context
        (large(4096), "f32", 256),
        (large(131072), "f32", 8),  # scores are written out
        (large(131072, softcap=50.0), "f16", 8),
        (large(131072, head_dim=100), "f16", 8),
        (large(2), "f16", 2),
    ],
)
def test_pieces_of_a_prompt_shrink_where_scores_grow(spec: Spec, compute: str, chunk: int) -> None:
    bounds = limits(spec, compute)
    assert (bounds.chunk, bounds.batch, bounds.context) == (min(chunk, spec.context), BATCH, spec.context)
    assert all(low <= likely <= high for profile in bounds.profiles() for low, likely, high in profile.values())


def test_pieces_of_a_prompt_shrink_where_every_expert_runs() -> None:
    mixture = {"kind": "moe", "experts": 64, "hidden": 1024, "router": {"top_k": 8}}
    dense = large(4096)
    mixed = parse(merge(dense.model_dump(mode="json", exclude_unset=True), {"block": {"mlp": mixture}}))
    assert (limits(dense, "f16").chunk, limits(mixed, "f16").chunk) == (CHUNK, CHUNK // 4)


def test_too_many_experts_for_their_choice_are_refused() -> None:
    """All of them run: at most eight times the arithmetic of the chosen."""

    def mixed(experts: int, top_k: int) -> Spec:
        mixture = {"kind": "moe", "experts": experts, "hidden": 32, "router": {"top_k": top_k}}
        dense = {"kind": "dense", "hidden": 64}
        return parse(merge(BASE, {"block": {"mlp": mixture}, "overrides": {"0": {"mlp": dense}}}))

    found = support(mixed(8, 2), "q4")
    assert found.ok and "runs every expert for every token: 4 times the experts' arithmetic" in found.notes[-1]
    assert support(mixed(64, 8), "q4").ok and not any("expert" in n for n in support(mixed(2, 2), "q4").notes)
    (refusal,) = support(mixed(128, 8), "q4").refusals
    assert refusal.startswith("layers[1].mlp.experts: 128 with router.top_k=8: TensorRT would run all of them")
    assert "16 times the arithmetic (at most 8 times; gguf, mlx and onnx" in refusal


def test_shapes_fill_in_what_is_dynamic() -> None:
    sizes = {"batch": 3, "tokens": 5, "total": 9}
    assert shape("input_ids", (-1, -1), sizes) == (3, 5)
    assert shape("attention_mask", (-1, -1), sizes) == (3, 9)
    assert shape("write_indices", (-1,), sizes) == (3,)
    assert shape("past_key_values.7.value", (-1, 2, 48, 16), sizes) == (3, 2, 48, 16)


def test_compute_follows_the_level_and_never_rounds_weights_again() -> None:
    assert {level: support(LLAMA, level).carrier for level in ("f32", "bf16", "f16", "q8", "q4")} == {
        "f32": "strongly typed, f32", "bf16": "strongly typed, bf16", "f16": "strongly typed, f16",
        "q8": "strongly typed, f16", "q4": "strongly typed, f16",
    }  # fmt: skip
    for level, compute, hint in (("f32", "f16", "f32"), ("f32", "bf16", "f32"), ("bf16", "f16", "bf16")):
        (refusal,) = support(LLAMA, level, compute=compute).refusals
        assert refusal.startswith(f"compute: {compute} would round") and f"--compute {hint}" in refusal
    (refusal,) = support(LLAMA, "iq4_xs").refusals
    assert refusal.startswith("level: iq4_xs is none of TensorRT's")
    (refusal,) = support(LLAMA, "q4", compute="fp8").refusals
    assert refusal.startswith("compute: fp8 is no choice")


def test_notes_say_what_a_user_should_know() -> None:
    notes = " ".join(support(FEATURES["uneven_width"], "q4").notes)
    for told in (
        "parses and builds graphs of every feature",
        "MB; prompts go in pieces",
        "stay f16",
        "groups of 32",
        "no multiple of 8",
    ):
        assert told in notes
    assert any("session of 48 tokens" in n for n in support(FEATURES["rope_dynamic"], "f16").notes)


@without
def test_a_check_answers_without_tensorrt_and_a_conversion_says_what_to_install(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", LLAMA, tokenizer=False)
    expected = convert(tmp_path / "model", "tensorrt", "q4", tmp_path / "out", check=True)
    assert expected.options == {} and expected.size > 1_000_000
    assert any("parses and builds graphs of every feature" in n for n in expected.notes)
    with pytest.raises(UserError, match=r"^--to tensorrt: ") as told:
        convert(tmp_path / "model", "tensorrt", "q4", tmp_path / "out")
    assert len(str(told.value).splitlines()) == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model"]


@without
def test_nothing_is_written_before_tensorrt_is_found(tmp_path: Path) -> None:
    planned = plan(LLAMA, "q8")
    with pytest.raises(UserError, match=r"^--to tensorrt: "):
        writer(LLAMA, planned, None, tmp_path / "out", level="q8", metadata={}, threads=1)
    assert not (tmp_path / "out").exists()
    assert size(LLAMA, planned, None) > 2 * sum(np.prod(p.shape) for p in planned)


def test_the_package_does_not_stand_in_for_tensorrt() -> None:
    found = importlib.util.find_spec("tensorrt")
    assert found is None or "backends" not in str(found.origin)
    if found is None:
        with pytest.raises(MissingDependency, match=r"x: needs tensorrt: pip install 'allotrope\[tensorrt\]'"):
            devices.device("x")


OLD = """
import sys, types
for name in ("tensorrt", "torch"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch"].cuda = types.SimpleNamespace(is_available=lambda: {gpu}, get_device_name=lambda: "a GPU")
sys.modules["tensorrt"].__version__ = "10.3.0"
from backends.tensorrt.device import device
from spec.errors import UserError
try:
    device("x")
except UserError as e:
    print(e)
"""


@pytest.mark.parametrize(("gpu", "says"), [(False, "torch sees no NVIDIA GPU"), (True, "TensorRT 10.3.0 is too old")])
def test_a_machine_that_cannot_run_engines_is_told_in_one_line(gpu: bool, says: str) -> None:
    code = OLD.replace("{gpu}", str(gpu))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"x: {says}")


@without
def test_an_engine_is_not_opened_without_tensorrt(tmp_path: Path) -> None:
    write_graph(LLAMA, random_weights(LLAMA), tmp_path, "q4", "f16")
    assert backends.part(backends.get("tensorrt"), "read").open_artifact(tmp_path).compute == "f16"
    with pytest.raises(UserError) as told:
        backends.load(tmp_path)
    assert len(str(told.value).splitlines()) == 1


def test_a_folder_says_what_it_is_and_what_is_lost(tmp_path: Path) -> None:
    write_graph(LLAMA, random_weights(LLAMA), tmp_path, "q8", "bf16")
    artifact = open_artifact(tmp_path)
    found = backends.recognise(tmp_path, backends.REGISTRY)
    assert found is not None and found.name == "tensorrt"
    assert (artifact.level, artifact.compute, artifact.session) == ("q8", "bf16", None)
    assert artifact.arithmetic.compute == artifact.arithmetic.cache == "bf16"
    assert artifact.problems(plan(LLAMA, "q8")) == {ENGINE: "missing"}
    (tmp_path / ENGINE).touch()
    assert artifact.problems(plan(LLAMA, "q8")) == {}
    assert artifact.problems(plan(LLAMA, "q4"))["embed.weight.q4"] == "missing"
    with pytest.raises(UserError, match="no such folder"):
        open_artifact(tmp_path / "other")
    (tmp_path / "allotrope.json").write_text(json.dumps({"backend": "tensorrt"}))
    assert read_mark(tmp_path) == {"backend": "tensorrt"}
    with pytest.raises(UserError, match=r"has no allotrope\.json with a spec"):
        open_artifact(tmp_path)


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Sequences:
    """Sequences over the graph in ONNX Runtime, in sessions of 20 tokens."""
    pytest.importorskip("onnxruntime")
    path = write_graph(LLAMA, random_weights(LLAMA), tmp_path_factory.mktemp("graph"), "f32", "f32")
    return Sequences(OrtExecutor(path, LLAMA, "f32"), limits(LLAMA, "f32"), LLAMA.vocab_size, 20)


def test_wrong_ids_cost_one_line(runtime: Sequences) -> None:
    ids = np.arange(20)
    with pytest.raises(UserError, match="there is no sequence to continue"):
        runtime.step(ids[:1])
    for wrong, what in ((ids[:0], r"shape \[0\], and \[T\]"), (ids[None], r"shape \[1, 20\], and \[T\]")):
        with pytest.raises(UserError, match=what):
            runtime.prefill(wrong)
    for bad in (-1, LLAMA.vocab_size):
        with pytest.raises(UserError, match="beyond the vocabulary of 97"):
            runtime.logits(np.array([[0, bad]]))
    with pytest.raises(UserError, match=r"\[B, T\] is needed"):
        runtime.logits(ids)


def test_nothing_is_written_beyond_the_context(runtime: Sequences) -> None:
    ids = np.arange(21) % 97
    for call, given in ((runtime.prefill, ids), (runtime.logits, ids[None])):
        with pytest.raises(UserError, match="21 tokens exceed the session's context of 20"):
            call(given)
    whole = runtime.logits(ids[None, :20])[0]
    runtime.prefill(ids[:18])
    with pytest.raises(UserError, match="21 tokens exceed"):
        runtime.step(ids[:3])
    assert np.allclose(runtime.step(ids[18:20]), whole[18:], atol=1e-5)  # the refusal changed nothing
