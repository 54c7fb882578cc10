"""One configuration from YAML and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec.errors import UserError
from spec.load import read_yaml
from train import config
from train.cli import main


def cli(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as e:
        main(argv)
    code = e.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().err.strip()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--optimizer.rl", "3e-4"), "did you mean --optimizer.lr?"),
        (("--optimizer.lr", "-1"), "--optimizer.lr: '-1' input should be greater than 0"),
        (("--steps", "many"), "--steps: 'many' input should be a valid integer"),
        (("--batch.micro", "3"), "batch.micro: 3 does not divide batch.sequences=4 (try 2)"),
        (("--schedule.warmup", "600"), "schedule.warmup: 600 leaves no step of steps=600"),
        (("--spec", "tinny", "--check"), "did you mean tiny?"),
        (("--device", "tpu"), "--device: 'tpu'"),
        (("--resume", "--force"), "contradict"),
        (("--stop-after", "0"), "--stop-after: 0 must be at least 1"),
        (("--data", "/no/such/folder", "--check"), "/no/such/folder: no such file or folder"),
        (("--config", "/no/such/file.yaml"), "/no/such/file.yaml: No such file"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_status_2(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = cli(capsys, *argv)
    assert code == 2
    assert said.lower() in err.lower()
    assert len(err.splitlines()) == 1


def test_an_unknown_key_in_a_file_is_an_error_with_a_suggestion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lr: 1e-3, weight_decai: 0.1}\nstep: 10\n", encoding="utf-8")
    code, err = cli(capsys, "--config", str(path))
    assert code == 2
    assert sorted(err.splitlines()) == [
        f"{path}: optimizer.weight_decai: is not a field (did you mean weight_decay?)",
        f"{path}: step: is not a field (did you mean steps?)",
    ]


def test_the_later_layer_wins_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: stdlib\nsteps: 10\nbatch: {sequences: 9}\noptimizer: {lr: 1e-3, eps: 1e-9}\n", "utf-8")
    c = config.layered(config.read(path), {"batch": {"micro": 3}, "optimizer": {"lr": 2e-3}})
    assert (c.data.source, c.steps, c.batch.sequences, c.batch.micro) == ("stdlib", 10, 9, 3)
    assert (c.optimizer.lr, c.optimizer.eps) == (2e-3, 1e-9)


def test_yaml_round_trip() -> None:
    c = config.layered({"steps": 7, "data": {"document_mask": True}, "optimizer": {"betas": [0.8, 0.9], "clip": None}})
    assert config.parse(read_yaml(config.dump(c), "")) == c


def test_differences_name_fields_by_path() -> None:
    a, b = config.layered({}), config.layered({"optimizer": {"lr": 0.5}, "steps": 3})
    assert config.differences(a, b) == ["steps: 600 -> 3", f"optimizer.lr: {a.optimizer.lr} -> 0.5"]


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"steps: \xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 7"):
        config.read(path)


def test_another_optimizer_is_refused_on_resume_in_one_line() -> None:
    saved = config.layered({})
    for kind in ("muon", "lion", "adafactor"):
        with pytest.raises(UserError, match=rf"^optimizer\.kind: adamw -> {kind} cannot be changed on resume \(.*\)$"):
            config.resumed(saved, {"optimizer": {"kind": kind}})
    assert config.resumed(saved, {"optimizer": {"kind": "adamw", "lr": 1e-4}}).optimizer.lr == 1e-4


def test_options_are_judged_by_the_optimizer_that_has_them() -> None:
    from train import optim

    with pytest.raises(UserError) as e:
        config.layered({"optimizer": {"options": {"foo": 3}}})
    assert str(e.value) == "optimizer.options.foo: 3 is no option of adamw (adamw has no options)"
    with pytest.raises(UserError, match=r"optimizer.options.adjust_lr_fn: 'nope' is no adjust_lr_fn of muon"):
        config.layered({"optimizer": {"kind": "muon", "options": {"adjust_lr_fn": "nope"}}})
    with pytest.raises(UserError, match=r"optimizer: adafactor refuses its settings: .*beta2_decay"):
        optim.check(config.layered({"optimizer": {"kind": "adafactor", "options": {"beta2_decay": 1.0}}}).optimizer)
    for kind in config.optim.KINDS:
        optim.check(config.layered({"optimizer": {"kind": kind}}).optimizer)
