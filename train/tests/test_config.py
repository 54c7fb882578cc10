"""One configuration from YAML and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec.errors import UserError
from spec.load import read_yaml
from train import config
from train.cli import main, summary


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
        (("--lr", "1e-3"), "Unknown option: --lr. Did you mean --optimizer.lr?"),
        (("--export-every", "3"), "Did you mean --checkpoint.export-every?"),
        (("--check", "--ranks", "-2"), "--ranks: -2 must be at least 1"),
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
    from train.config.optim import KINDS

    with pytest.raises(UserError) as e:
        config.layered({"optimizer": {"options": {"foo": 3}}})
    assert str(e.value) == "optimizer.options.foo: 3 is no option of adamw (adamw has no options)"
    with pytest.raises(UserError, match=r"optimizer.options.adjust_lr_fn: 'nope' is no adjust_lr_fn of muon"):
        config.layered({"optimizer": {"kind": "muon", "options": {"adjust_lr_fn": "nope"}}})
    with pytest.raises(UserError, match=r"optimizer: adafactor refuses its settings: .*beta2_decay"):
        optim.check(config.layered({"optimizer": {"kind": "adafactor", "options": {"beta2_decay": 1.0}}}).optimizer)
    for kind in KINDS:
        optim.check(config.layered({"optimizer": {"kind": kind}}).optimizer)


def test_a_configuration_that_is_no_mapping_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("- steps\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a run's configuration is a mapping of fields, not list"):
        config.read(path)


def test_the_check_and_the_run_refuse_the_same_before_any_text_is_read(
    tmp_path: Path, spec_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("train.session.text", never)
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    run = ["--spec", str(spec_file), "--device", "cpu", "--out", str(file / "run"), "--tokenizer", "/nope"]
    run += ["--ship", "zz", "--checkpoint.export", "foo:f32", "--attention.kernel", "flash"]
    run += ["--data.messages", "m", "--data.template", str(tmp_path / "none.jinja")]
    code, checked = cli(capsys, *run, "--check")
    assert (code, checked) == cli(capsys, *run)
    assert code == 2
    for said in (
        f"{file / 'run'}: cannot be written: ",
        "checkpoint.export: foo:f32: ",
        "ship: zz: no such precision level",
        "attention.kernel: the kernel 'flash' cannot run causal attention",
        "/nope: No such file",
    ):
        assert sum(said in line for line in checked.splitlines()) == 1, said
    run[run.index("/nope")] = str(file)
    assert "not a tokenizer" in cli(capsys, *run, "--check")[1]
    at = run.index("--tokenizer")
    del run[at : at + 2]
    assert "none.jinja: No such file" in cli(capsys, *run, "--check")[1]


def test_a_folder_that_holds_a_run_is_refused_by_the_check_too(
    tmp_path: Path, spec_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "training").mkdir(parents=True)
    run = ["--spec", str(spec_file), "--device", "cpu", "--out", str(tmp_path / "run"), "--check"]
    assert "training is already there" in cli(capsys, *run)[1]
    assert cli(capsys, *run, "--force")[0] == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["training"]


def test_the_hint_to_go_on_names_what_started_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.session import Result

    stopped = Result(Path("runs/x"), 3, 9, 2, None)
    assert summary(stopped)[-1] == "  python -m train --out runs/x --resume"
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert summary(stopped)[-1] == "  torchrun --nnodes 2 --nproc-per-node 4 -m train --out runs/x --resume"
