"""Calibrated conversions: the same codes in every container, a receipt that tells, and an interruption that loses
nothing."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import backends
from backends.base import content_hash
from backends.trained import SCALES, described
from convert import calibrated, cli
from convert.calibrate import Settings
from convert.calibrate.store import KEY, RESULT
from convert.levels import CODES, GROUPS
from convert.pipeline import convert_all
from convert.quantize import quantize
from convert.recipe import Recipe, plan
from convert.sources import open_source
from convert.tests.conftest import weights, write_checkpoint
from convert.verify.artifact import Door, Packed, planned
from convert.verify.packing import check_packing
from convert.verify.report import Check, Status
from spec import Spec
from spec.errors import UserError

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred tokens are enough to move codes."""
    monkeypatch.setattr(calibrated, "Settings", partial(Settings, tokens=128))


def packing(artifact: Path, checkpoint: Path, backend: str = "gguf", rounding: Path | None = None) -> Check:
    """The packing check of an artifact, as the verifying child makes it."""
    with open_source(checkpoint, (), rounding) as source:
        shipped = Door(backends.get(backend)).open_artifact(artifact, source.spec, "q4", 1)
        return check_packing(shipped.stored(), source)


def convert(
    checkpoint: Path, out: Path, targets: str = "gguf", level: Recipe | str | None = "q4", **settings: Any
) -> dict:
    given: dict[str, Any] = {"calibrate": "random", "verify": False, "force": True, "threads": 1} | settings
    results = convert_all(checkpoint, targets.split(","), level, out, **given)
    return {r.backend: r for r in results}


def test_calibrated_codes_are_the_same_in_every_container_and_verified(checkpoint: Path, tmp_path: Path) -> None:
    made = convert(checkpoint, tmp_path / "out", "gguf,mlx")
    fast = convert(checkpoint, tmp_path / "fast.gguf", calibrate=None)["gguf"]
    hashes = {r.receipt["weights_hash"] for r in made.values()}
    assert len(hashes) == 1 and fast.receipt["weights_hash"] not in hashes
    assert {r.receipt["source"]["hash"] for r in (*made.values(), fast)} == {fast.receipt["source"]["hash"]}
    record = made["gguf"].receipt["rounding"]
    assert (record["effort"], record["text"], record["tokens"]) == ("good", "random", 128)
    assert not list((tmp_path / "out").glob(".*")), "the work is deleted after success"
    for name, result in made.items():
        check = packing(result.out, checkpoint, name)
        assert check.status is Status.PASS and "content hashes" in check.reason


def test_the_verifying_child_compares_bit_for_bit_and_a_later_one_by_hash(checkpoint: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    made = convert(checkpoint, tmp_path / "m.gguf", verify=True, work=work)["gguf"]
    assert made.report is not None and made.report.ok
    assert "equal bit for bit" in made.report.checks[0].reason and "hashes" not in made.report.checks[0].reason
    assert (work / RESULT).is_file(), "--work keeps it"
    assert "hashes" not in packing(made.out, checkpoint, rounding=work).reason
    assert "content hashes" in packing(made.out, checkpoint).reason
    file = work / "layers.1.safetensors"
    tensors = load_file(file)
    tensors["layers.1.mlp.up.weight.codes"][3, 5] ^= 1
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"work: the codes of layers\.1\.mlp\.up\.weight are damaged"):
        convert(checkpoint, tmp_path / "n.gguf", work=work)
    broken = packing(made.out, checkpoint, rounding=work)
    assert broken.status is Status.FAIL and "layers.1.mlp.up.weight: 1 codes differ, first [3, 5]" in broken.reason
    data = bytearray(made.out.read_bytes())
    data[-100] ^= 1
    made.out.write_bytes(data)
    changed = packing(made.out, checkpoint)
    assert changed.status is Status.FAIL and "content hash is not the receipt's" in changed.reason


@pytest.mark.parametrize("level", ["q4", "q4_k_m"])
def test_the_source_is_the_one_that_was_calibrated(checkpoint: Path, small: Spec, tmp_path: Path, level: str) -> None:
    work = tmp_path / "work"
    made = convert(checkpoint, tmp_path / "m.gguf", level=level, work=work)["gguf"]
    tensors = weights(small)
    tensors["layers.1.mlp.up.weight"] = tensors["layers.1.mlp.up.weight"][::-1].copy()
    other = write_checkpoint(tmp_path / "other", small, tensors)
    for rounding in (work, None) if level == "q4" else (None,):
        assert packing(made.out, checkpoint, rounding=rounding).status is Status.PASS
        check = packing(made.out, other, rounding=rounding)
        assert check.status is Status.FAIL and "not those that the receipt names" in check.reason


def test_an_interrupted_calibration_goes_on_to_the_same_codes(checkpoint: Path, tmp_path: Path) -> None:
    whole = convert(checkpoint, tmp_path / "whole.gguf")["gguf"].receipt["weights_hash"]
    done: list[str] = []

    def stop(stage: str, *_: int) -> None:
        done.append(stage)
        if done.count("calibrate") == 3:
            raise KeyboardInterrupt

    def interrupted(level: Recipe | str) -> list[str]:
        done.clear()
        try:
            convert(checkpoint, tmp_path / "m.gguf", level=level, progress=stop)
        except KeyboardInterrupt as e:
            return e.__notes__
        raise AssertionError("it was to be interrupted")

    notes = interrupted("q4")
    (work,) = tmp_path.glob(".*.calibration")
    assert (work / KEY).is_file() and not (work / RESULT).exists()
    assert notes == [f"what is calibrated already is kept in {work}: the same command goes on from there"]
    assert not (tmp_path / "m.gguf").exists()
    interrupted(Recipe("q4", (("head", "q8"),)))
    assert len(list(tmp_path.glob(".*.calibration"))) == 2, "another recipe has another folder"
    made = convert(checkpoint, tmp_path / "m.gguf")["gguf"]
    assert made.receipt["weights_hash"] == whole
    assert not work.exists()


def test_the_command_says_what_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("convert.stream.rounded", interrupted)
    with pytest.raises(SystemExit) as e:
        cli.main([str(checkpoint), "--calibrate", "random", "--no-verify", "--threads", "1"])
    told = capsys.readouterr().err.splitlines()
    assert e.value.code == 130
    assert "interrupted; nothing was written; what is calibrated already is kept in .checkpoint." in told[-1]


def test_a_dry_run_tells_what_would_be_calibrated_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    (result,) = convert(checkpoint, tmp_path / "m.gguf", check=True).values()
    told = result.to_dict()["calibration"]
    assert told["tokens"] == 128 and told["rounded"] == result.levels["q4"] + result.levels["q8"]
    assert min(told["seconds"], told["memory_bytes"], told["disk_bytes"]) > 0
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint"}


def test_a_budget_and_overrides_go_with_a_calibration(checkpoint: Path, tmp_path: Path) -> None:
    asked = Recipe("q4", (("head", "f16"), ("layers.1.mlp.down", "q8")), bits=6.5)
    made = convert(checkpoint, tmp_path / "m.gguf", level=asked)["gguf"]
    assert made.bits <= 6.5
    receipt = made.receipt
    assert receipt["recipe"] == asked.to_dict()
    assert receipt["tensors"]["head.weight"][0] == "f16"
    assert receipt["tensors"]["layers.1.mlp.down.weight"][0] == "q8"
    assert packing(made.out, checkpoint).status is Status.PASS


def test_a_recipe_is_verified_by_the_receipt_that_says_it(checkpoint: Path, small: Spec, tmp_path: Path) -> None:
    asked = Recipe("q4", (("layers.*.attn.*", "q8"), ("head", "q6_k")))
    made = convert(checkpoint, tmp_path / "m.gguf", level=asked, calibrate=None)["gguf"]
    check = packing(made.out, checkpoint)
    assert check.status is Status.PASS and "equal bit for bit" in check.reason
    with pytest.raises(UserError, match=r"the receipt gives head\.weight no level that there is"):
        planned(
            backends.get("gguf"),
            small,
            "q4",
            None,
            {"recipe": {}, "tensors": made.receipt["tensors"] | {"head.weight": ["q99"]}},
        )
    artifact = backends.part(backends.get("gguf"), "read").open_artifact(made.out)
    wrong = {"recipe": {}, "tensors": made.receipt["tensors"] | {"layers.0.attn.q.weight": ["q4"]}}
    packed = Packed(artifact, planned(backends.get("gguf"), small, "q4", None, wrong))
    assert packed.problems() == {"blk.0.attn_q.weight": "is stored as q8_0, the recipe says q4_0"}


def test_experts_that_no_token_chose_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parity_tests.cases import FEATURES

    monkeypatch.setattr(calibrated, "Settings", partial(Settings, tokens=2))
    spec = FEATURES["moe_sigmoid"]
    made = convert(write_checkpoint(tmp_path / "moe", spec, weights(spec)), tmp_path / "m.gguf")["gguf"]
    named = made.receipt["rounding"]["untouched"]
    assert re.fullmatch(
        r"layers\.1\.mlp\.experts\.\{[\d,.]+\}\.gate\.weight, layers\.1\.mlp\.experts\..*\.up\.weight", named
    )
    assert f"not reached by the calibration text, rounded by the plain search: {named}" in made.notes
    assert named in (tmp_path / "m.gguf.md").read_text()


def test_parts_of_one_stored_tensor_have_one_type(tmp_path: Path) -> None:
    from parity_tests.cases import FEATURES

    spec = FEATURES["gpt2"]
    folder = write_checkpoint(tmp_path / "gpt2", spec, weights(spec))
    out = tmp_path / "m.gguf"
    with pytest.raises(
        UserError,
        match=r"gguf: layers\.0\.attn\.k\.weight q8, layers\.0\.attn\.v\.weight f16: .*stored \(or served\) as one",
    ):
        convert(folder, out, level=Recipe("q8", (("layers.*.attn.v", "f16"),)), calibrate=None)
    made = convert(folder, out, level=Recipe("q4", (("layers.*.attn.v", "q8"),)), calibrate=None)["gguf"]
    assert packing(made.out, folder).status is Status.PASS


REFUSED = {
    "effort": (["--effort", "bst"], "--effort bst: no such effort (did you mean best?)"),
    "fast reads no text": (["--effort", "fast", "--calibrate", "random"], "--effort fast runs no model"),
    "nothing to keep": (["--work", "w"], "--work w: --effort fast runs no model"),
    "no codes": (["--quant", "f16", "--effort", "good", "--calibrate", "random"], "f16 has no codes to choose"),
    "own rounding": (["--to", "mlx", "--quant", "mlx-q4", "--calibrate", "random"], "takes no importance"),
    "no tokenizer": (["--effort", "good"], "the source has no tokenizer"),
    "no text": (["--calibrate", "nothing.txt"], "--calibrate nothing.txt"),
    "several targets": (["--to", "gguf,mlx", "--override", "head=q6_k"], "a type of gguf alone"),
    "not carried": (["--to", "coreml", "--override", "head=bf16"], "--override head=bf16: no such level"),
    "work of another": (["--calibrate", "random", "--work", "checkpoint"], "is not empty and holds no calibration"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_calibrated_is_refused_in_one_line(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    with pytest.raises(SystemExit) as e:
        cli.main(["checkpoint", "--no-verify", *words])
    told = capsys.readouterr().err.splitlines()
    assert e.value.code == 2
    assert len(told) == 1 and message in told[0]
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_source_and_rounding_belong_together(checkpoint: Path, small: Spec, tmp_path: Path) -> None:
    work = tmp_path / "work"
    convert(checkpoint, tmp_path / "m.gguf", work=work)
    data = json.loads((work / RESULT).read_text())
    (work / RESULT).write_text(json.dumps(data | {"key": data["key"] | {"spec": "another"}}))
    with pytest.raises(UserError, match="is the rounding of another spec"):
        open_source(checkpoint, (), work)
    changed = weights(small) | {"head.weight": np.zeros((96, 64), np.float32)}
    other = write_checkpoint(tmp_path / "other", small, changed)
    with pytest.raises(UserError, match="holds another calibration"):
        convert(other, tmp_path / "n.gguf", work=work)


def test_a_checkpoint_that_was_trained_for_its_codes_keeps_them(small: Spec, tmp_path: Path) -> None:
    planned = plan(small, Recipe("q4", bits=5.5))
    tensors, levels = weights(small), {p.name: p.level for p in planned if p.level in GROUPS}
    hashes = {}
    for name, level in levels.items():
        q = quantize(tensors[name], CODES[level], GROUPS[level])
        hashes[name] = content_hash([q])
        tensors |= {name: q.dequantize(), name + SCALES: q.scales}
    folder = write_checkpoint(tmp_path / "trained", small, {})
    recipe = {"level": "q4", "bits": 5.5}
    save_file(tensors, folder / "model.safetensors", described(recipe, levels))
    made = convert(folder, tmp_path / "m.gguf", level=None, calibrate=None)["gguf"]
    assert made.receipt["recipe"] == recipe
    assert {n: made.receipt["tensors"][n] for n in levels} == {n: [x, hashes[n]] for n, x in levels.items()}
    assert "equal bit for bit" in packing(made.out, folder).reason
    with pytest.raises(UserError, match=r"--effort good: the checkpoint was trained for q4, and its codes are those"):
        convert(folder, tmp_path / "n.gguf", level="q4")
    other = convert(folder, tmp_path / "n.gguf", level="q8", calibrate=None)["gguf"]
    assert any("trained for q4: at q8 its weights are rounded anew" in note for note in other.notes)
