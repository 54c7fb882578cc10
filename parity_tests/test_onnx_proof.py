"""Artifacts as they ship: their arithmetic is what we say it is, and what is damaged is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import backends
from backends.onnx.layout import Stored
from backends.onnx.read import Artifact, GraphReader
from convert.pipeline import convert
from convert.sources import open_source
from convert.verify import numeric, verify
from convert.verify.artifact import Door, Shipped, planned
from convert.verify.report import Check, Status
from convert.verify.run import Session
from parity_tests.artifacts import opened, write
from parity_tests.cases import FEATURES, nmse, random_ids, random_weights
from parity_tests.checkpoints import llama, write_checkpoint
from spec import Spec
from spec.errors import UserError

ONNX = backends.get("onnx")


def shipped(spec: Spec, folder: Path, level: str, seed: int = 0, **options: Any) -> Shipped:
    write("onnx", spec, random_weights(spec, seed), folder, level, None, **options)
    return Shipped(ONNX, folder, opened("onnx", folder), spec, level, 1)


TURNED = 3
"""Codes of activations that float32 noise turns in a run of 40 tokens of these specs, at the most. The noise is 3e-7 of
a value (a float32 NMSE of 1e-13), so 1e-5 of a step where the largest of a block is 3 sigma and 127 steps; a code turns
where a tie is nearer than that, one in 40,000. A run has 13,000: a third of one is expected, more than 3 come once in
3,000 runs. A turned code costs at most what two independent roundings of its token differ by, twice the control."""


@pytest.mark.parametrize("level", ["q8", "q4"])
@pytest.mark.parametrize("name", ["llama", "all_bias", "tied", "gpt2"])
def test_int8_activations_explain_the_whole_error(name: str, level: str, tmp_path: Path) -> None:
    """Accuracy level 4 is blocks of 32 with a float32 scale: what is left is float32 noise, and the few codes that it
    turns."""
    spec = FEATURES[name]
    made = shipped(spec, tmp_path / "m", level)
    assert made.precision == "int8"
    for tokens in (1, 4, 40):
        ids = random_ids(spec, 1, tokens)
        with made.load(48) as runtime:
            got = runtime.logits(ids)
        emulation = made.emulate(ids, 48)
        rounding = emulation.control(tokens)
        assert rounding > 1e-5
        assert nmse(got, emulation.tiled) <= (1e-12 if tokens < 5 else TURNED / tokens * 2 * rounding)
        assert nmse(got, emulation.exact) <= 2 * rounding


SIXTEEN = [
    "mha", "rope_longrope", "gemma2", "clamped_swiglu",
    *(pytest.param(n, marks=pytest.mark.slow) for n in FEATURES),
]  # fmt: skip
"""The first two have the largest share of their controls (2.0 and 1.4 times), the others numbers that 16 bits lack."""


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("level", ["f16", "q8", "q4"])
@pytest.mark.parametrize("name", SIXTEEN)
def test_float16_stays_within_its_control(name: str, level: str, profile: str, tmp_path: Path) -> None:
    """On a CPU, which casts where it has no float16 kernel."""
    spec, ids = FEATURES[name], random_ids(FEATURES[name], 1, 47)
    made = shipped(spec, tmp_path / "m", level, profile=profile, compute="f16")
    with made.load(48) as runtime:
        got, (stepped, tokens) = runtime.logits(ids), numeric.stepwise(runtime, ids)
    emulation = made.emulate(ids, 48)
    assert numeric.check_arithmetic(got, emulation, spec.depth, made.precision, "").status is Status.PASS
    assert numeric.check_cached(stepped, tokens, emulation, spec.depth, made.precision).status is Status.PASS


CASES = [
    ("q4", {}), ("q8", {}), ("f32", {}), ("bf16", {}), ("q4", {"profile": "portable"}),
    ("q4", {"activations": "float"}), ("q8", {"activations": "int8"}),
    ("q4", {"compute": "f16"}), ("f16", {"compute": "f16", "profile": "portable"}),
]  # fmt: skip


@pytest.mark.parametrize(("level", "options"), CASES, ids=str)
def test_a_conversion_passes_every_check(level: str, options: dict[str, str], tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", llama(head={"tied": True}))
    out = convert(checkpoint, "onnx", level, tmp_path / "out", options=options, verify=False)
    folder = sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    assert abs(folder - out.size) < 0.1 * out.size
    session = Session(open_source(checkpoint), Door(ONNX).open_artifact(tmp_path / "out", out.spec, level, 1), level)
    checks = [getattr(session, c)() for c in ("packing", "runtime", "graph", "arithmetic", "invariants", "tokenizer")]
    assert [c.status for c in checks] == [Status.PASS] * len(checks), checks


def test_a_bfloat16_graph_ships_with_its_graph_proved_and_its_run_not(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", FEATURES["llama"], tokenizer=False)
    result = convert(checkpoint, "onnx", "q4", tmp_path / "out", options={"compute": "bf16"}, threads=1)
    assert result.report is not None and not result.failed
    statuses = {c.name: c.status for c in result.report.checks}
    assert statuses["packing"] is statuses["graph"] is Status.PASS
    assert statuses["runtime"] is statuses["arithmetic"] is statuses["invariants"] is Status.NOT_RUN
    assert json.loads((tmp_path / "out/allotrope.json").read_text())["report"]


@pytest.mark.parametrize("level", ["q8", "q4"])
def test_float_activations_leave_float32s_rounding_alone(level: str, tmp_path: Path) -> None:
    """The stock run is then as near to the oracle as float32 is; with int8 that of its blocks of 32 is left, and the
    proof says which of the two an artifact has."""
    spec, ids = FEATURES["llama"], random_ids(FEATURES["llama"], 1, 40)
    errors = {}
    for kind in ("int8", "float"):
        made = shipped(spec, tmp_path / kind, level, activations=kind)
        assert (made.precision, made.artifact.arithmetic.activations) == (
            ("int8", "int8") if kind == "int8" else ("f32", None)
        )
        with made.load(48) as runtime:
            got, emulation = runtime.logits(ids), made.emulate(ids, 48)
        assert numeric.check_arithmetic(got, emulation, spec.depth, made.precision, "").status is Status.PASS
        errors[kind] = nmse(got, emulation.exact)
    assert errors["float"] < 1e-11 < 1e-6 < errors["int8"]
    mark = tmp_path / "int8" / "allotrope.json"  # an artifact that says it does not round is held to that
    mark.write_text(mark.read_text().replace('"activations": "int8"', '"activations": "float"'))
    lying = Door(ONNX).open_artifact(tmp_path / "int8", spec, level, 1)
    with lying.load(48) as runtime:
        got, emulation = runtime.logits(ids), lying.emulate(ids, 48)
    assert numeric.check_arithmetic(got, emulation, spec.depth, lying.precision, "").status is Status.FAIL


def test_a_folder_of_an_earlier_version_has_the_activations_that_were_usual(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    portable: Any = {"profile": "portable"}
    for level, options, kind in (("q4", {}, "int8"), ("q4", portable, None), ("f32", {}, None)):
        path = write("onnx", spec, random_weights(spec), tmp_path / f"{level}{kind}", level, **options)
        mark = json.loads((path / "allotrope.json").read_text())
        del mark["options"]["activations"]
        (path / "allotrope.json").write_text(json.dumps(mark))
        assert opened("onnx", path).arithmetic.activations == kind
        assert damaged(path, spec, level) == {}


def initializers(folder: Path) -> dict[str, Stored]:
    artifact = Artifact(folder)
    return GraphReader(folder, artifact.spec, artifact.profile).initializers


def damaged(folder: Path, spec: Spec, level: str) -> dict[str, str]:
    return opened("onnx", folder).problems(planned(ONNX, spec, level))


def test_a_changed_constant_is_a_problem(tmp_path: Path) -> None:
    spec = FEATURES["alibi"]
    for name, spec, tensor in (
        ("a", FEATURES["alibi"], "layers.1.attn.slopes"),
        ("r", FEATURES["llama"], "rope.0.cos"),
    ):
        write("onnx", spec, random_weights(spec), tmp_path / name)
        found = initializers(tmp_path / name)[tensor]
        assert damaged(tmp_path / name, spec, "f32") == {}
        with (tmp_path / name / "model.onnx.data").open("r+b") as f:
            f.seek(found.offset + 8)
            f.write(np.float32(0.123).tobytes())
        assert list(damaged(tmp_path / name, spec, "f32")) == [tensor]


def test_another_level_or_profile_is_a_problem(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    write("onnx", spec, random_weights(spec), tmp_path / "m", "q4")
    assert "layers.0.attn.q.weight.q8" in damaged(tmp_path / "m", spec, "q8")
    mark = json.loads((tmp_path / "m/allotrope.json").read_text())
    mark["options"]["profile"] = "portable"
    (tmp_path / "m/allotrope.json").write_text(json.dumps(mark))
    assert damaged(tmp_path / "m", spec, "q4")


GENAI: dict[str, Any] = {
    "model.type": lambda m: m["model"].update(type="llama"),
    "model.eos_token_id": lambda m: m["model"].update(eos_token_id=5),
    "model.bos_token_id": lambda m: m["model"].pop("bos_token_id"),
    "model.context_length": lambda m: m["model"].update(context_length=4096),
    "model.decoder.head_size": lambda m: m["model"]["decoder"].update(head_size=32),
    "model.decoder.num_key_value_heads": lambda m: m["model"]["decoder"].update(num_key_value_heads=4),
    "model.decoder.inputs.past_key_names": lambda m: m["model"]["decoder"]["inputs"].update(past_key_names="past.%d"),
    "model.decoder.sliding_window.window_size": lambda m: m["model"]["decoder"].update(sliding_window={
        "window_size": 4,
    }),
    "search.past_present_share_buffer": lambda m: m["search"].update(past_present_share_buffer=False),
    "search.temperature": lambda m: m["search"].update(temperature=2.0),
}  # fmt: skip


def test_what_onnxruntime_genai_reads_is_checked_whole(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", llama(depth=1))
    out = convert(checkpoint, "onnx", "q4", tmp_path / "out", verify=False)
    source = open_source(checkpoint)

    def packing() -> Check:
        return Session(source, Door(ONNX).open_artifact(out.out, out.spec, "q4", 1), "q4").packing()

    assert packing().status is Status.PASS
    file = out.out / "genai_config.json"
    right = file.read_text()
    for key, change in GENAI.items():
        data = json.loads(right)
        change(data)
        file.write_text(json.dumps(data))
        check = packing()
        assert check.status is Status.FAIL and f"genai_config.json {key}: " in check.reason, key
    file.unlink()
    with pytest.raises(UserError, match=r"genai_config\.json"):
        packing()
    file.write_text(right)
    generation = out.out / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": 5}))
    assert packing().status is Status.FAIL
    assert verify(out.out, "onnx", checkpoint, "q4").checks[0].status is Status.FAIL


MARKS: dict[str, Any] = {
    "backend": "onnxx", "level": "q5", "spec": 3, "receipt": [],
    "options": [
        None, [], {}, {"compute": "f64", "profile": "ort"}, {"compute": "f32", "profile": "ortx"}, {"compute": "f32"},
        {"compute": "f32", "profile": "ort", "more": "x"}, {"compute": 3, "profile": "ort"},
    ],
}  # fmt: skip


def test_a_mark_that_is_not_ours_is_one_line(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    path = write("onnx", spec, random_weights(spec), tmp_path / "m", "q4")
    right = json.loads((path / "allotrope.json").read_text())
    for key, wrong in MARKS.items():
        for value in wrong if key == "options" else [wrong]:
            (path / "allotrope.json").write_text(json.dumps(right | {key: value}))
            for attempt in (lambda: opened("onnx", path), lambda: backends.load(path, "onnx")):
                with pytest.raises(UserError) as e:
                    attempt()
                assert "allotrope.json" in str(e.value) or "spec" in str(e.value), (key, value)
                assert "\n" not in str(e.value)
    del right["options"]
    (path / "allotrope.json").write_text(json.dumps(right))
    with pytest.raises(UserError, match="options"):
        opened("onnx", path)


def test_damaged_files_are_one_line_errors(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    path = write("onnx", spec, random_weights(spec), tmp_path / "m")
    whole = (path / "model.onnx.data").read_bytes()
    (path / "model.onnx.data").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off"):
        opened("onnx", path).rows("head.weight", 0, spec.vocab_size)
    with pytest.raises(UserError, match="ONNX Runtime cannot load"):
        backends.load(path)
    (path / "model.onnx.data").write_bytes(whole)
    (path / "model.onnx").write_bytes(b"\x08\x0bnothing")
    for attempt in (lambda: opened("onnx", path).rows("head.weight", 0, 1), lambda: backends.load(path)):
        with pytest.raises(UserError) as e:
            attempt()
        assert "\n" not in str(e.value)
    (path / "allotrope.json").unlink()
    with pytest.raises(UserError, match="not converted by this program"):
        backends.load(path, "onnx")


def test_a_swapped_weight_fails_the_packing_check(tmp_path: Path) -> None:
    spec: Any = FEATURES["llama"]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", spec, tokenizer=False)
    convert(checkpoint, "onnx", "q4", tmp_path / "out", verify=False)
    found = initializers(tmp_path / "out")["layers.0.mlp.up.weight.q4"]
    with (tmp_path / "out/model.onnx.data").open("r+b") as f:
        f.seek(found.offset + 5)
        byte = f.read(1)[0]
        f.seek(found.offset + 5)
        f.write(bytes([byte ^ 0x10]))
    session = Session(open_source(checkpoint), Door(ONNX).open_artifact(tmp_path / "out", spec, "q4", 1), "q4")
    check = session.packing()
    assert check.status is Status.FAIL and "layers.0.mlp.up.weight" in check.reason
