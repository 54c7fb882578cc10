"""Several targets in one conversion: what appears, what is kept back, and what a user is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert import pipeline
from convert.cli import main
from convert.pipeline import convert_all
from convert.tests.conftest import weights, write_checkpoint
from convert.verify import Check, Report, Status
from spec import Spec, parse
from spec.errors import UserError

for package in ("gguf", "llama_cpp", "onnx", "onnxruntime"):
    pytest.importorskip(package)


def command(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, list[str], str]:
    """Exit status, lines on stderr and stdout of `convert ARGS`."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in args])
    said = capsys.readouterr()
    return int(e.value.code or 0), said.err.splitlines(), said.out


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.suffix in (".gguf", ".onnx", ".partial", ".lock"))


def test_one_table_and_one_line_a_check(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, out = command(capsys, checkpoint, "--to", "gguf,onnx", "--quant", "q8", "--out", tmp_path / "all")
    assert code == 0, said
    assert {"verify gguf: packing PASS  0 (gate 0)", "verify onnx: packing PASS  0 (gate 0)"} <= set(said)
    assert "tokenizer: NOT_RUN (the source has no tokenizer)" in out and "read, rounded and written in one pass" in out
    assert len(names(tmp_path / "all")) == 2


def test_what_fails_is_kept_back_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = pipeline._verify

    def failing(job: Any, t: Any, *rest: Any) -> Report:
        report = verify(job, t, *rest)
        if t.backend.name == "gguf":
            report.checks.append(Check("graph", Status.FAIL, 1.0, 0.0, "a bug"))
        return report

    monkeypatch.setattr(pipeline, "_verify", failing)
    code, said, out = command(capsys, checkpoint, "--to", "gguf,onnx", "--quant", "q8", "--out", tmp_path, "--json")
    found = json.loads(out)
    assert code == 1 and not found["ok"] and [a["ok"] for a in found["artifacts"]] == [False, True]
    assert "verification failed, it was not written: graph: a bug" in said[-1]
    assert names(tmp_path) == ["model.onnx"]


def test_an_interrupt_while_the_second_is_verified_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = pipeline._verify

    def interrupted(job: Any, t: Any, *rest: Any) -> Report:
        if t.backend.name == "onnx":
            raise KeyboardInterrupt
        return verify(job, t, *rest)

    monkeypatch.setattr(pipeline, "_verify", interrupted)
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "there", tmp_path / "new" / "folder"):
        code, said, _ = command(capsys, checkpoint, "--to", "gguf,onnx", "--quant", "q8", "--out", out)
        assert code == 130 and said[-1] == "convert: interrupted; nothing was written"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "there"], "what was there before stays"
    assert not any((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["gguf", "onnx"], "level": "q4_k_m"}, "q4_k_m: a type of gguf alone, converted to one target"),
        ({"targets": ["coreml", "onnx"], "level": "bf16"}, r"bf16: no level of coreml \(did you mean f16"),
        ({"targets": ["gguf", "onx"], "level": "q4"}, r"onx: nothing is converted to it \(did you mean onnx"),
        ({"targets": [], "level": "q4"}, "--to: names no target"),
        ({"targets": ["torch"], "level": "f32"}, "nothing is converted to it"),
        ({"targets": ["gguf"], "level": "q4", "options": {"profile": "ort"}}, "no option of gguf .it is one of onnx"),
        ({"targets": ["onnx"], "level": "q4", "options": {"profile": "ortt"}}, "onnx has no such choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_any_work(
    arguments: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as e:
        convert_all(checkpoint, out=tmp_path / "out", **arguments)
    assert len(str(e.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_target_named_twice_is_one(checkpoint: Path, tmp_path: Path) -> None:
    (result,) = convert_all(checkpoint, ["gguf", "gguf"], "q8", tmp_path / "a.gguf", check=True)
    assert result.out == tmp_path / "a.gguf"


def test_of_several_targets_those_that_would_work_are_named(
    tmp_path: Path, small: Spec, capsys: pytest.CaptureFixture[str]
) -> None:
    """A target may refuse the tokenizer, which is found out later, or the spec."""
    folder = write_checkpoint(tmp_path / "in", small, weights(small))
    bytes_ = {c: i for i, c in enumerate("abcdefgh")}
    mark = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": bytes_, "merges": []},
        "normalizer": {"type": "Lowercase"}, "pre_tokenizer": mark, "post_processor": None, "decoder": mark,
    }))  # fmt: skip
    form = "convert: gguf: tokenizer.normalizer: Lowercase has no llama.cpp form for a byte-level BPE"
    asked = ("--quant", "q8", "--out", tmp_path / "out")
    code, said, _ = command(capsys, folder, "--to", "onnx,gguf,hf", *asked)
    assert (code, said) == (2, [form, "convert: leave gguf out: --to onnx,hf"])
    code, said, _ = command(capsys, folder, "--to", "gguf", *asked)
    assert (code, said) == (2, [form]) and not (tmp_path / "out").exists()
    endless = parse(small.model_dump() | {"final_norm": None})
    other = write_checkpoint(tmp_path / "other", endless, weights(endless))
    code, said, _ = command(capsys, other, "--to", "onnx,gguf,hf", *asked)
    assert code == 2 and said[-1] == "convert: leave gguf, hf out: --to onnx", said
    assert "convert: hf: final_norm: none, and transformers' " in "\n".join(said)
