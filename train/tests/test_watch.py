"""What a run tells of itself, and what it does when its loss goes wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer as Fast
from tokenizers.models import WordLevel

from backends.text import Text
from backends.torch.model import Decoder
from spec.errors import MissingDependency, UserError
from spec.load import load as load_spec
from train import config, loop, session
from train.checkpoint import newest, number
from train.config import Samples, Watch
from train.parallel import Ranks
from train.tests.conftest import saved_tensors, write_text
from train.tests.launch import begin, spawn
from train.tests.test_loop import assert_equal, journal
from train.watch import Board, Guard, Journal, Metrics, Sampler, Score, by_name, history
from train.watch import report as reports
from train.watch.charts import Series, chart, thin, ticks
from train.watch.charts import number as label
from train.watch.console import Progressing
from train.watch.journal import entries
from train.watch.portability import crippled

Options = Callable[..., dict[str, Any]]
Train = Callable[..., session.Result]

ROOT = Path(__file__).parents[2]


def events(out: Path) -> list[dict[str, Any]]:
    return list(entries(out / "training" / "events.jsonl"))


def samples(out: Path) -> list[dict[str, Any]]:
    return list(entries(out / "training" / "samples.jsonl"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the batches of these numbers (from 1 on, over the whole run) go wrong: the loss and every gradient are
    multiplied by `factor`."""
    real = loop.gradients

    def poison(*batches: int, factor: float = math.nan) -> None:
        def gradients(run: loop.Run) -> tuple[float, torch.Tensor, int]:
            loss, norm, valid = real(run)
            if run.batches.state.batches not in batches:
                return loss, norm, valid
            for p in run.decoder.parameters():
                if p.grad is not None:
                    p.grad.mul_(factor)
            return loss * factor, norm * factor, valid

        monkeypatch.setattr(loop, "gradients", gradients)

    return poison


SPIKES = {"watch__spike": "skip", "watch__spike_window": 8, "schedule__warmup": 2}


# The figures.


def test_every_figure_of_a_step_is_in_the_journal(options: Options, train: Train, tmp_path: Path) -> None:
    train(options(steps=6, validation__every=3))
    steps = history(tmp_path / "run" / "training" / "train.jsonl")
    for m in steps:
        assert m["perplexity"] == pytest.approx(math.exp(m["loss"]))
        assert 0 <= m["data_wait"] < m["seconds"] < 60
        assert m["memory"] > 50e6
        assert m["tokens_per_second"] == pytest.approx(128 / m["seconds"])
        assert "mfu" not in m  # nobody knows this CPU's peak
    assert min(s["tokens_per_second"] for s in steps) <= steps[-1]["tokens_per_second_smooth"]
    assert steps[2]["val_perplexity"] == pytest.approx(math.exp(steps[2]["val_loss"]))


def test_a_number_that_is_not_finite_leaves_strict_json(tmp_path: Path) -> None:
    j = Journal(tmp_path)
    j.begin({}, 0)
    m = Metrics(1, math.nan, 1e-3, math.inf, 1.0, 1, 1, parts={"cross_entropy": 800.0})
    j.log(1, m.values())
    j.text(1, "p\ud800", "a\nb")  # a lone surrogate is no UTF-8
    j.close()
    [line] = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert (found["loss"], found["grad_norm"], found["perplexity"], found["cross_entropy"]) == (None, None, None, 800)
    assert samples_in(tmp_path)[0]["text"] == "a\nb"


def samples_in(folder: Path) -> list[dict[str, Any]]:
    return list(entries(folder / "samples.jsonl"))


def test_what_a_full_disk_refuses_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StringIO()
    board = Board(Progressing(Console(file=log, width=200), 0, 9, 100), tmp_path)
    board.begin(0, 0, {})
    write, full = os.write, False

    def limited(handle: int, data: bytes) -> int:
        if full:
            raise OSError(28, "No space left on device")
        return write(handle, data[:7])  # a disk may take part of a line

    monkeypatch.setattr(os, "write", limited)
    for step in range(1, 7):
        full = step in (3, 4)
        board.step(Metrics(step, 2.0, 1e-3, 0.5, 10.0, 9, 0))
    board.close()
    assert [m["step"] for m in history(tmp_path / "train.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert log.getvalue().count("No space left on device (the run goes on)") == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "training").write_text("a file", encoding="utf-8")
    board = Board(Progressing(Console(quiet=True), 0, 9, 100), tmp_path / "training")
    with pytest.raises(UserError, match="training: cannot be written: File exists"):
        board.begin(0, 0, {})
    board.report(picture=True)  # there is nothing to report
    board.close()


def test_a_log_has_plain_lines_and_a_terminal_a_bar() -> None:
    m = Metrics(10, 2.0, 1e-3, 0.5, 1234.0, 999, 1, val_loss=1.9, val_bits_per_byte=0.8, val_parts={"code": 1.5})
    log = StringIO()
    shown = Progressing(Console(file=log, width=200), 0, 20, 10)
    shown.step(m)
    shown.close()
    assert log.getvalue().splitlines() == [
        "step 10/20  loss 2.0000  lr 1.0e-03  norm 0.50  1,234 tokens/s  skipped 1  ETA 0:00",
        "step 10/20  validation loss 1.9000 = 0.800 bits/byte  code 1.5000",
    ]
    screen = StringIO()
    shown = Progressing(Console(file=screen, width=200, force_terminal=True), 0, 20, 10)
    shown.step(m)
    shown.close()
    assert "10/20" in screen.getvalue() and "\x1b[" in screen.getvalue()


def test_each_source_of_a_mixture_is_scored_apart(options: Options, train: Train, tmp_path: Path) -> None:
    data = options(steps=2, validation__tokens=10**6)
    other = write_text(tmp_path / "other", files=9, seed=3)
    text = data["data"].pop("source")
    data["data"]["mixture"] = [{"source": text}, {"source": str(other)}]
    train(data)
    last = journal(tmp_path / "run")[-1]
    a, b = last["val_loss/text"], last["val_loss/other"]
    assert min(a, b) < last["val_loss"] < max(a, b)
    assert by_name(["/a/x", "/b/x", "hf:o/y", "stdlib"], [1, 2, 3, 4]) == {"x": 1, "x#2": 2, "y": 3, "stdlib": 4}


# Trackers.


def test_tensorboard_has_the_run_and_goes_on_in_its_folder(options: Options, train: Train, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = options(steps=6, watch__trackers=["tensorboard"], validation__every=3, samples__tokens=4)
    train(data, stop_after=5)
    file = tmp_path / "run" / "training" / "train.jsonl"
    first = history(file)
    train({"out": data["out"]}, resume=True)
    found = EventAccumulator(str(tmp_path / "run" / "training" / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    losses = found.Scalars("train/loss")
    assert [e.step for e in losses] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in losses[:5]] == pytest.approx([m["loss"] for m in first])
    assert {"validation/val_loss", "system/memory", "train/grad_norm"} <= set(found.Tags()["scalars"])
    assert any(tag.startswith("samples/") for tag in found.Tags()["tensors"])


def test_wandb_writes_offline_and_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    """In a process of its own, since W&B starts a service beside the one that calls it."""
    pytest.importorskip("wandb")
    script = """
import sys
from pathlib import Path
from train.config import Watch
from train.watch.trackers import trackers

folder = Path(sys.argv[1])
folder.mkdir(parents=True)
for step in (0, 2):
    [(name, tracker)] = trackers(Watch(trackers=("wandb",)), folder)  # no key is known: offline
    tracker.begin({"steps": 4}, step)
    tracker.log(step + 1, {"loss": 3.5, "val_loss": 2.5, "seconds": 0.1})
    tracker.text(step + 1, "", "<b>text")
    tracker.close()
"""
    folder = tmp_path / "run" / "training"
    env = {k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "WANDB_MODE")}
    env |= {"HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    identity = (folder / "wandb-run-id").read_text(encoding="utf-8")
    files = list((folder / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 2
    written = b"".join(f.read_bytes() for f in files)
    assert b"train/loss" in written and b"validation/val_loss" in written and b"samples/beginning" in written


def test_a_tracker_that_fails_is_reported_once_and_stops_nothing(tmp_path: Path) -> None:
    class Broken:
        calls = 0

        def begin(self, config: Any, step: int) -> None: ...
        def text(self, step: int, name: str, text: str) -> None: ...
        def close(self) -> None: ...

        def log(self, step: int, values: Any) -> None:
            self.calls += 1
            raise ConnectionError("the network is gone\nmuch more")

    broken, log = Broken(), StringIO()
    board = Board(Progressing(Console(file=log, width=200), 0, 9, 100), tmp_path, {}, [("cloud", broken)])
    board.begin(0, 0, {})
    for step in (1, 2, 3):
        board.step(Metrics(step, 2.0, 1e-3, 0.5, 10.0, 9, 0))
    board.close()
    assert broken.calls == 1
    assert log.getvalue().splitlines()[1:] == ["cloud: the network is gone (the run goes on without it)"]
    assert len(history(tmp_path / "train.jsonl")) == 3


def test_a_tracker_that_is_not_installed_is_one_line(
    options: Options, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from train.watch import trackers

    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("no_such_package", trackers.Wandb))
    with pytest.raises(MissingDependency, match=r"wandb is not installed \(pip install 'allotrope\[tracking\]'\)"):
        train(options(watch__trackers=["wandb"]))
    assert not (tmp_path / "run").exists()


# What goes wrong.


def test_skipped_steps_leave_the_run_that_never_saw_their_batches(
    options: Options, train: Train, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned(4)
    train(options(steps=6, samples__every=0))
    steps = journal(tmp_path / "run")
    assert [m["skipped"] for m in steps] == [0, 0, 0, 1, 1, 1]
    assert steps[3]["loss"] is None
    [e] = events(tmp_path / "run")
    assert (e["event"], e["step"], e["batches"]) == ("skip", 4, 4) and "not finite" in e["reason"]


def test_a_spike_is_skipped_and_a_resumed_run_judges_alike(
    options: Options, train: Train, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    """The window of the detector is in the checkpoint: the run that was stopped within it skips the same batch."""
    poisoned(1, 11, 14, factor=30.0)  # the window of 8 is not yet full at the first
    train(options("whole", steps=16, **SPIKES))
    train(options("parts", steps=16, **SPIKES), stop_after=10)
    for last in (12, None):
        train({"out": str(tmp_path / "parts")}, resume=True, stop_after=last)
    assert journal(tmp_path / "whole") == journal(tmp_path / "parts")
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert whole is not None and parts is not None
    assert_equal(whole, parts)
    for out in ("whole", "parts"):
        assert [(e["event"], e["step"]) for e in events(tmp_path / out)] == [("skip", 11), ("skip", 14)]
        assert "watch.spike_std" in events(tmp_path / out)[0]["reason"]


def test_a_rollback_goes_on_from_the_checkpoint_behind_the_batch(
    options: Options, train: Train, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    """After it the run is the one that was at the checkpoint and met the later batches first."""
    poisoned(7)
    how = {"steps": 10, "checkpoint__every": 4, "checkpoint__best": False, "watch__nonfinite": "rollback"}
    train(options(**how))
    out = tmp_path / "run"
    assert [m["step"] for m in journal(out)] == list(range(1, 11))
    assert [m["rollbacks"] for m in journal(out)] == [0] * 4 + [1] * 6
    assert [m["tokens"] // 128 for m in journal(out)] == [1, 2, 3, 4, 8, 9, 10, 11, 12, 13]
    [e] = events(out)
    assert (e["event"], e["step"], e["to"], e["batches"]) == ("rollback", 7, 4, 7)
    assert json.loads((newest(out) / "training" / "state.json").read_text())["watch"]["rollbacks"] == 1  # type: ignore[operator]
    html = (out / "training" / "report.html").read_text(encoding="utf-8")
    assert "rolled back to step 4" in html
    # Stopped before and after it, and resumed: the same.
    train(options("parts", **how), stop_after=6)
    train({"out": str(tmp_path / "parts")}, resume=True, stop_after=8)
    train({"out": str(tmp_path / "parts")}, resume=True)
    assert [m["step"] for m in journal(tmp_path / "parts")] == list(range(1, 11))
    [e] = events(tmp_path / "parts")
    assert (e["step"], e["to"]) == (7, 6)


def test_a_rollback_before_the_first_checkpoint_goes_back_to_the_beginning(
    options: Options, train: Train, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned(2)
    train(options(steps=3, watch__nonfinite="rollback"))
    [e] = events(tmp_path / "run")
    assert (e["step"], e["to"]) == (2, 0)
    assert [m["tokens"] // 128 for m in journal(tmp_path / "run")] == [3, 4, 5]


def test_rollbacks_end_where_the_run_has_had_its_share(
    options: Options, train: Train, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned(*range(3, 100))
    with pytest.raises(UserError, match=r"step 3: .* rolled back watch\.rollbacks=2 times; saved without this step"):
        train(options(watch__nonfinite="rollback", watch__rollbacks=2, checkpoint__every=2))
    assert [e["event"] for e in events(tmp_path / "run")] == ["rollback", "rollback", "stop"]


def test_stop_saves_without_the_step_and_resume_goes_on_behind_it(
    options: Options, train: Train, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned(5)
    data = options(steps=8, watch__nonfinite="stop")
    with pytest.raises(UserError, match=r"step 5: .* are not finite; saved without this step .*--resume"):
        train(data)
    saved = newest(tmp_path / "run")
    assert saved is not None and number(saved) == 5
    assert all(torch.isfinite(t).all() for t in saved_tensors(saved).values())
    assert "not finite" in (tmp_path / "run" / "training" / "report.html").read_text(encoding="utf-8")
    assert train({"out": data["out"]}, resume=True).step == 8
    assert [m["step"] for m in journal(tmp_path / "run")] == list(range(1, 9))


def test_spikes_without_end_end_the_run(
    options: Options, train: Train, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned(*range(10, 100), factor=30.0)
    with pytest.raises(UserError, match=r"step 13: spikes for 4 steps in a row \(optimizer.max_skipped\)"):
        train(options(steps=30, optimizer__max_skipped=4, **SPIKES))


def test_thresholds() -> None:
    w = Watch(spike="skip", spike_window=8, spike_std=3, spike_norm=5)
    guard = Guard()
    for n in range(20):
        guard.applied(w, 2.0 + 0.1 * (-1) ** n, 1.0)
    assert len(guard.losses) == 8
    assert guard.judge(w, 2.29, 4.9, warm=True) is None
    assert "above 2.3000" in guard.judge(w, 2.31, 1.0, warm=True).reason  # type: ignore[union-attr]
    assert "5 times the median" in guard.judge(w, 2.0, 5.1, warm=True).reason  # type: ignore[union-attr]
    assert guard.judge(w, 2.31, 9.0, warm=False) is None
    assert guard.judge(w, math.inf, 1.0, warm=False) is not None
    again = Guard.of(json.loads(json.dumps(guard.as_dict())))
    assert again == guard
    steady = Guard(losses=[2.0] * 8, norms=[1.0] * 8)
    assert steady.judge(w, 2.05, 1.0, warm=True) is None  # 1 % of the mean counts as a deviation


def test_a_validation_that_no_longer_improves_ends_the_run(
    options: Options, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scores = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    monkeypatch.setattr(loop, "validate", lambda run: Score(next(scores), 1.0, {}))
    how = {"steps": 20, "validation__every": 2, "validation__patience": 2, "samples__every": 0}
    train(options(**how), stop_after=5)  # resumed in between: the best score is in the checkpoint
    result = train({"out": str(tmp_path / "run")}, resume=True)
    assert (result.step, result.ended) == (8, True)
    assert number(newest(tmp_path / "run") or Path()) == 8
    assert "best validation loss was 2.0000, 2 validations ago" in events(tmp_path / "run")[-1]["reason"]


def test_the_beginning_is_scored_where_asked(options: Options, train: Train, tmp_path: Path) -> None:
    train(options(steps=2, validation__at_start=True))
    [e] = events(tmp_path / "run")
    assert e["val_loss"] == pytest.approx(math.log(300), abs=0.2)
    assert reports.Record.read(tmp_path / "run").scored[0] == (0, e["val_loss"])


# Samples.


def test_samples_are_deterministic_and_change_no_bit_of_the_training(
    options: Options, train: Train, tmp_path: Path
) -> None:
    with_ = {"samples__every": 2, "samples__prompts": ["", "alpha beta"], "samples__tokens": 12}
    train(options("none", samples__every=0))
    train(options("some", **with_))
    train(options("parts", **with_), stop_after=5)
    train({"out": str(tmp_path / "parts")}, resume=True)
    folders = [newest(tmp_path / out) for out in ("none", "some", "parts")]
    a, b, c = (saved_tensors(f) for f in folders if f is not None)
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)
    assert journal(tmp_path / "none") == journal(tmp_path / "some") == journal(tmp_path / "parts")
    found = samples(tmp_path / "some")
    assert [(s["step"], s["prompt"]) for s in found] == [(n, p) for n in (2, 4, 6, 8) for p in ("", "alpha beta")]
    assert found == samples(tmp_path / "parts")
    assert all(s["text"] for s in found)
    assert len({s["text"] for s in found}) > 4


def test_a_prompt_that_leaves_no_room_is_refused(options: Options, train: Train) -> None:
    with pytest.raises(UserError, match=r"samples\.prompts\[1\]: \d+ tokens leave no room in 32"):
        train(options(samples__prompts=["", "x y z " * 60]))


def test_samples_come_with_a_kernel_that_has_no_cache(options: Options) -> None:
    mini = load_spec(options()["spec"])
    tokenizer = Fast(WordLevel({"a": 0, "b": 1, "<unk>": 2}))
    decoder = Decoder(mini, attention="flex")
    decoder.init_weights(0)
    ranks = Ranks(0, 1, torch.device("cpu"))
    sampler = Sampler(Samples(prompts=("b",), tokens=5), decoder, ranks, Text(tokenizer, {}), [0])
    decoder.train()
    state = torch.get_rng_state()
    first = sampler.write()
    assert first == sampler.write() and first[0][0] == "b"
    assert (decoder.training, decoder.attention) == (True, "flex")
    assert torch.equal(state, torch.get_rng_state())


def _poisoned_ranks(rank: int, ports: list[int], data: dict[str, Any]) -> None:
    begin(rank, 2, *ports)
    real = loop.gradients

    def gradients(run: loop.Run) -> tuple[float, torch.Tensor, int]:
        loss, norm, valid = real(run)
        return loss, norm * (math.nan if rank == 1 and run.batches.state.batches == 3 else 1), valid

    loop.gradients = gradients
    session.train(config.layered(data), console=Console(file=StringIO()))


def test_two_ranks_write_samples_and_roll_back_together(options: Options, tmp_path: Path) -> None:
    """What is wrong on one rank alone is so for both."""
    how = {"steps": 4, "samples__every": 2, "samples__tokens": 6, "checkpoint__every": 2, "ship": []}
    data = options(**how, watch__nonfinite="rollback")
    spawn(_poisoned_ranks, 2, data)
    out = tmp_path / "run"
    [e] = events(out)
    assert (e["event"], e["step"], e["to"]) == ("rollback", 3, 2)
    assert [m["step"] for m in journal(out)] == [1, 2, 3, 4]
    assert [s["step"] for s in samples(out)] == [2, 4]
    assert all(s["text"] for s in samples(out))


# The report.


class Checked(HTMLParser):
    """Fails on unbalanced tags; collects what a page would load and run."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()


def test_the_report_is_one_page_that_loads_nothing_and_escapes_everything(
    options: Options, train: Train, poisoned: Callable[..., None], tmp_path: Path
) -> None:
    poisoned(5)
    nasty = "<script>alert(1)</script> & \" '"
    source = write_text(tmp_path / "text <b>")
    data = options(steps=8, validation__every=2, samples__prompts=[nasty[:9]], samples__tokens=3, ship=["q4"])
    data["data"]["source"] = str(source)
    train(data)
    out = tmp_path / "run"
    with (out / "training" / "samples.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps({"step": 8, "prompt": nasty, "text": nasty}) + "\n")
    with (out / "training" / "events.jsonl").open("a", encoding="utf-8") as f:
        f.write(json.dumps({"event": nasty, "step": 8, "batches": 8, "reason": nasty}) + "\n")
    text = reports.write(out).read_text(encoding="utf-8")
    page = Checked(text)
    assert not page.loads and not page.tags & {"script", "link", "iframe", "img", "b <b"}
    assert "<script" not in text and "&lt;script&gt;" in text and "text &lt;b&gt;" in text
    for said in ("loss (nats/token)", "learning rate", "gradient norm", "tokens/s", "waiting for data", "memory",
                 "step skipped", "What to type next", "config.yaml", "validation bits/byte", "torch"):  # fmt: skip
        assert said in text
    assert text.count("<svg") >= 6 and "http" not in text.replace("https://arxiv", "")
    assert "prefers-color-scheme: dark" in text


def test_a_report_comes_from_the_folder_alone(
    options: Options, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train.cli import main

    data = options(steps=4, validation__every=2)
    train(data, stop_after=3)
    file = tmp_path / "run" / "training" / "report.html"
    before = file.read_text(encoding="utf-8")
    assert "step 3 of 4" in before
    Path(data["spec"]).unlink()
    file.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as e:
        main(["report", str(tmp_path / "moved")])
    assert not e.value.code
    assert capsys.readouterr().out.strip() == str(tmp_path / "moved" / "training" / "report.html")
    again = (tmp_path / "moved" / "training" / "report.html").read_text(encoding="utf-8")
    assert again.replace(str(tmp_path / "moved"), str(tmp_path / "run")).replace("moved.gguf", "run.gguf") == before
    with pytest.raises(SystemExit) as e:
        main(["report", str(tmp_path / "nothing")])
    assert e.value.code == 2
    assert "no run" in capsys.readouterr().err


def test_a_report_of_a_run_that_has_not_begun(options: Options, train: Train, tmp_path: Path) -> None:
    train(options(steps=2), stop_after=1)
    (tmp_path / "run" / "training" / "train.jsonl").unlink()
    Checked(reports.write(tmp_path / "run").read_text(encoding="utf-8"))


def test_charts() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(2.1, 2.9) == pytest.approx([2.2, 2.4, 2.6, 2.8])
    assert ticks(1, 1) == [1]
    assert [label(v) for v in (0.15, 1200, 35000, 1.2e6, 3e-5)] == ["0.15", "1200", "35k", "1.2M", "3e-05"]
    points = [(float(n), float(n == 5000)) for n in range(10_000)]
    assert len(thin(points)) <= 400
    assert max(y for _, y in thin(points, extremes=True)) == 1.0
    assert chart([Series("", [], 1)]) == ""
    for log in (False, True):
        flat = chart([Series("", [(1, 2.0), (2, 2.0)], 1)], log=log, marks=[(2, "<&>")])
        assert "nan" not in flat and "&lt;&amp;&gt;" in flat
    assert "nan" not in chart([Series("", [(1, 0.0), (2, 10.0), (3, 1e4)], 1)], log=True)


# The profile, and what is said at the start.


def test_a_profile_has_a_trace_and_a_list(options: Options, tmp_path: Path) -> None:
    import gzip

    log = StringIO()
    c = config.layered(options(steps=4, profile="2..3", samples__every=0))
    session.train(c, console=Console(file=log, width=200))
    folder = tmp_path / "run" / "training" / "profile"
    trace = json.loads(gzip.decompress((folder / "steps-2-3.json.gz").read_bytes()))
    assert any(e.get("name") == "aten::mm" for e in trace["traceEvents"])
    assert "aten::mm" in (folder / "steps-2-3.txt").read_text(encoding="utf-8")
    said = log.getvalue()
    assert f"profile of steps 2-3: {folder}" in said and "self time" in said and "aten::mm" in said


def test_a_profile_that_the_run_does_not_reach_the_end_of_is_written(
    options: Options, train: Train, tmp_path: Path
) -> None:
    train(options(steps=3, profile="3..9", samples__every=0))
    assert (tmp_path / "run" / "training" / "profile" / "steps-3-8.json.gz").is_file() or list(
        (tmp_path / "run" / "training" / "profile").glob("*.json.gz")
    )


def test_dimensions_that_cripple_a_level_are_named(tmp_path: Path) -> None:
    spec = tmp_path / "odd.yaml"
    spec.write_text(
        "version: 1\nname: odd\nvocab_size: 512\nwidth: 192\ndepth: 2\ncontext: 64\n"
        "block:\n  attention: {heads: 3, head_dim: 64}\n  mlp: {hidden: 500}\n",
        encoding="utf-8",
    )
    odd = load_spec(spec)
    assert crippled(load_spec("tiny"), ("q8", "q4", "q4_k_m")) == []
    assert crippled(odd, ("f16",)) == []
    down = "layers.*.mlp.down: input width 500 is no multiple of 32, and stays f16 at q8 and q4 on every target"
    lines = crippled(odd, ("q8",))
    assert lines == [f"{down} (try 480 or 512)"]
    lines = crippled(odd, ("q8", "q4", "q4_k_m"))
    assert lines[0].startswith(down)
    assert "attn.q" in lines[1] and "192 is no multiple of 128" in lines[1] and "(try 128 or 256)" in lines[1]
    assert len(lines) == 2  # 192 is named once
    [line] = [text for text in crippled(odd, ("q4_k_m",)) if "192" in text]
    assert "no multiple of 256" in line and "(try 256)" in line


def test_the_targets_are_said_before_the_first_step(options: Options, tmp_path: Path) -> None:
    log = StringIO()
    data = options(steps=1, ship=["q4", "q4_k_m"])
    session.train(config.layered(data), console=Console(file=log, width=160))
    said = log.getvalue()
    assert said.index("gguf") < said.index("step 1/1")
    assert "layers.*.mlp.down: input width 48 is no multiple of 32" in said
    assert "training mini" in said
    again = StringIO()
    session.train(config.layered({**data, "steps": 2}), resume=True, console=Console(file=again, width=160))
    assert "gguf" not in again.getvalue()  # a resumed run has said it


def test_a_level_that_no_backend_has_is_refused_before_anything(options: Options, train: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ship: q44: no such precision level \(did you mean q4"):
        train(options(ship=["q44"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"watch": {"spike_sdt": 3}}, r"watch\.spike_sdt: is not a field \(did you mean spike_std\?\)"),
        ({"watch": {"trackers": ["tensorbord"]}}, r"watch\.trackers\[0\]: 'tensorbord' input should be 'tensorboard'"),
        ({"watch": {"spike_window": 2}}, r"watch\.spike_window: 2 input should be greater than or equal to 8"),
        ({"samples": {"prompt": "x"}}, r"samples\.prompt: is not a field \(did you mean prompts\?\)"),
        ({"validation": {"patiense": 3}}, r"validation\.patiense: is not a field \(did you mean patience\?\)"),
        ({"profile": "3-4"}, r"profile: '3-4' string should match"),
        ({"profile": "700"}, r"profile: '700' begins behind the last step, 600"),
        (
            {"watch": {"spike": "skip"}, "steps": 100},
            r"watch\.spike_window: 100 applied steps come before .* steps=100",
        ),
        (
            {"validation": {"patience": 2}, "data": {"validation": 0}},
            r"validation\.patience: 2 needs scores, and nothing is held out",
        ),
        (
            {"validation": {"at_start": True}, "data": {"validation": 0}},
            r"validation\.at_start: True needs scores, and nothing is held out",
        ),
        ({"watch": {"spike_std": 3}}, r"watch\.spike_std: 3\.0 is a threshold of watch\.spike, which is off"),
        (
            {"checkpoint": {"export_every": 50}},
            r"checkpoint\.export_every: 50 is for checkpoint\.export, which names no",
        ),
        ({"samples": {"every": 5, "prompts": []}}, r"samples\.every: 5 has no prompts"),
        ({"profile": "9..4"}, r"profile: '9\.\.4' ends before it begins \(try 4\.\.9\)"),
    ],
)
def test_wrong_fields_are_one_line_with_a_suggestion(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as e:
        config.layered(fields)
    assert len(str(e.value).splitlines()) == 1


def test_levels_may_be_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    from train.cli import main

    assert config.layered({"ship": "q4, q8"}).ships == ("q4", "q8")
    assert config.layered({"ship": []}).ships == ()
    with pytest.raises(SystemExit):
        main(["--ship", "q4,q44", "--device", "cpu"])
    assert capsys.readouterr().err.strip() == "ship: q44: no such precision level (did you mean q4?)"
