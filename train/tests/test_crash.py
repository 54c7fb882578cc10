"""Interruptions: signals, kills, crashes between any two writes, a full disk. A checkpoint is whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from backends.torch.checkpoint import load_decoder
from convert.sources import open_source
from spec.errors import UserError
from spec.load import load as load_spec
from spec.params import params
from train import checkpoint, config, session
from train.checkpoint import RunFolder, Saver, newest, number
from train.parallel import Ranks
from train.tests.conftest import saved_tensors
from train.tests.launch import ROOT, start
from train.watch import history

Options = Callable[..., dict[str, Any]]
Train = Callable[..., session.Result]


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def steps_done(out: Path) -> int:
    return len(history(out / "training" / "train.jsonl"))


@pytest.mark.parametrize(("number_", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(number_: signal.Signals, code: int, options: Options, tmp_path: Path) -> None:
    process = start(options(steps=100_000, checkpoint__every=100_000), tmp_path)
    wait_for(process, lambda: steps_done(tmp_path / "run") >= 2)
    process.send_signal(number_)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    saved = newest(tmp_path / "run")
    assert saved is not None
    assert f"stopped and saved at step {number(saved)} of 100000" in out
    assert f"python -m train --out {tmp_path / 'run'} --resume" in out
    assert number(saved) == steps_done(tmp_path / "run")
    load_decoder(tmp_path / "run")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_a_full_disk_keeps_the_previous_checkpoint(
    asynchronous: bool, options: Options, train: Train, tmp_path: Path
) -> None:
    """The limit on a file's size fails the write itself, as a full disk does."""
    train(options(checkpoint__asynchronous=asynchronous), stop_after=3)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and "training" not in p.parts}
    size = (tmp_path / "run" / "model.safetensors").stat().st_size
    process = start({"out": str(tmp_path / "run")}, tmp_path, "--resume", limit=size // 2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    [line] = err.splitlines()
    assert "cannot save step 8" in line
    assert "the checkpoint of step 3 is intact; make room and continue with --resume" in line
    assert {p: p.read_bytes() for p in before} == before
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert train({"out": str(tmp_path / "run")}, resume=True).step == 8


class Crash(BaseException):
    """What a power cut is: nothing on the disk changes any more."""


@pytest.fixture
def folder(tmp_path: Path, spec_file: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run", load_spec(spec_file), {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"})


def write_step(folder: RunFolder, step: int, **fields: Any) -> None:
    """A checkpoint whose every tensor says which step it is of."""
    c = config.layered({"checkpoint": {"keep": 1, **fields}})
    saver = Saver(folder, Ranks(0, 1, torch.device("cpu")), c, lambda line: None)
    tensors = {f"model/{p.name}": torch.full(p.shape, float(step)) for p in params(folder.spec)}
    tensors["optimizer/embed.weight/step"] = torch.tensor(float(step))
    saver._write(step, tensors, {"version": 2, "step": step})


def assert_of_one_step(path: Path, step: int | None = None) -> int:
    """Everything in a checkpoint's folder is of one step; returns which."""
    decoder = load_decoder(path)
    [found] = {int(v) for p in decoder.parameters() for v in p.unique().tolist()}
    if step is not None:
        assert found == step
        assert checkpoint.read(path)["step"] == step
        assert int(saved_tensors(path)["optimizer/embed.weight/step"]) == step
    return found


SEVERAL = {"shard_size": 5e-5}
"""Gigabytes of a file: the weights need more than one."""


@pytest.mark.parametrize("fields", [{}, pytest.param(SEVERAL, marks=pytest.mark.slow)], ids=["one-file", "several"])
def test_a_crash_between_any_two_operations_leaves_whole_checkpoints(
    fields: dict[str, Any], folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that changes the disk, in turn, is the last one."""
    write_step(folder, 1, **fields)
    countdown = [0]

    def crashing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            countdown[0] -= 1
            if countdown[0] < 0:
                raise Crash
            return original(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "link", "symlink", "mkdir", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, crashing(getattr(os, name)))
    crashes, step = 0, 1
    for n in range(1000):
        step += 1
        countdown[0] = n
        try:
            write_step(folder, step, **fields)
            break
        except (Crash, UserError):  # DCP catches everything, and what follows may not change the disk either
            crashes += 1
        countdown[0] = 10**9
        found = newest(folder.path)
        assert found is not None
        saved = assert_of_one_step(found, number(found))
        assert saved in (step - 1, step)
        assert assert_of_one_step(folder.path) <= saved
        folder.clean()
        folder.publish(found)
        assert assert_of_one_step(folder.path) == saved
        step = saved
    assert crashes > 20
    assert assert_of_one_step(folder.path) == step
    assert [number(p) for p in checkpoint.steps(folder.path)] == [step]
    assert not [*folder.path.glob(".*"), *folder.path.glob("checkpoints/.*")]
    files = [{p.stat().st_ino for p in at.glob("*.safetensors")} for at in (folder.path, folder.step(step))]
    assert files[0] == files[1] and (len(files[0]) > 1) == bool(fields)


def test_other_sizes_of_files_replace_each_other(folder: RunFolder) -> None:
    folder = replace(folder, tokenizer={})
    for step, fields in enumerate([{}, SEVERAL, SEVERAL, {"shard_size": 2e-5}, {}, {"dtype": "bfloat16"}], 1):
        write_step(folder, step, **fields)
        assert assert_of_one_step(folder.path, None) == step
        with open_source(folder.path) as source:
            assert {float(v) for n in source.names() for v in np.unique(source.tensor(n))} == {float(step)}
        names = {p.name for p in folder.path.glob("*.safetensors*")}
        assert ("model.safetensors" in names) == (fields not in (SEVERAL, {"shard_size": 2e-5}))
    assert {p.name for p in folder.path.glob("*.safetensors*")} == {"model.safetensors"}
    assert folder.path.joinpath("model.safetensors").stat().st_size < 80_000  # 35 thousand weights


def test_a_disk_without_hard_links_gets_copies(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)
    for step in (1, 2):
        write_step(folder, step, keep=2)
        assert assert_of_one_step(folder.path) == step
    assert (folder.path / "model.safetensors").stat().st_nlink == 1


def test_only_the_newest_checkpoints_are_kept(folder: RunFolder) -> None:
    for step in (5, 10, 15, 1_000_000):
        write_step(folder, step, keep=2)
    assert [number(p) for p in checkpoint.steps(folder.path)] == [15, 1_000_000]
    assert sorted(p.name for p in (folder.path / "checkpoints").iterdir()) == ["step-000015", "step-1000000"]
    modes = {(folder.path / name).stat().st_mode for name in ("spec.yaml", "model.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize("name", ["state.json", "tensors/.metadata", "tensors/__0_0.distcp"])
def test_damaged_training_state_is_one_error(name: str, options: Options, train: Train, tmp_path: Path) -> None:
    train(options(), stop_after=1)
    saved = newest(tmp_path / "run")
    assert saved is not None
    file = saved / "training" / name
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be resumed, the training state is damaged") as found:
        train({"out": str(tmp_path / "run")}, resume=True)
    assert len(str(found.value).splitlines()) == 1
    file.unlink()
    with pytest.raises(UserError, match="cannot be resumed"):
        train({"out": str(tmp_path / "run")}, resume=True)


def test_metadata_that_would_run_something_is_refused(options: Options, train: Train, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    train(options(), stop_after=1)
    file = (newest(tmp_path / "run") or Path()) / "training" / "tensors" / ".metadata"
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"mkdir is not part of a checkpoint"):
        train({"out": str(tmp_path / "run")}, resume=True)
    assert not (tmp_path / "ran").exists()


def test_an_older_checkpoint_is_refused_with_what_to_do(options: Options, train: Train, tmp_path: Path) -> None:
    train(options(), stop_after=1)
    file = (newest(tmp_path / "run") or Path()) / checkpoint.STATE
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1}))
    with pytest.raises(UserError, match=r"version 1 is not 2 .* begin from its weights: --init"):
        train({"out": str(tmp_path / "run")}, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(("asynchronous", "lost"), [(False, 1), (True, 2)], ids=["blocking", "asynchronous"])
def test_kills_at_random_points_never_corrupt(
    asynchronous: bool, lost: int, options: Options, train: Train, tmp_path: Path
) -> None:
    """Saving after every step, so that most kills fall into a save; resuming reaches what an undisturbed run does.

    At most the step that was being saved is lost, and in the background the one that was trained meanwhile.
    """
    rng = random.Random(0)
    data = options(steps=400, checkpoint__every=1, validation__every=1000, checkpoint__asynchronous=asynchronous)
    out = tmp_path / "run"
    for _ in range(20):
        process = start(data, tmp_path, "--continue")
        before = steps_done(out)
        wait_for(process, lambda before=before: steps_done(out) > before)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
        found = newest(out)
        if found is not None:
            assert_whole(out, found)
            assert steps_done(out) - number(found) <= lost
    reached = number(newest(out) or Path())
    assert 20 <= reached < 400
    train({"out": str(out)}, resume=True, stop_after=reached + 1)
    train(options("whole", steps=400, validation__every=1000), stop_after=reached + 1)
    assert_same_weights(out, tmp_path / "whole")


def assert_whole(out: Path, found: Path) -> None:
    """A checkpoint and what is published can be read, all of it."""
    load_decoder(found)
    assert checkpoint.read(found)["step"] == number(found)
    assert saved_tensors(found)
    assert load_decoder(out).spec == load_spec(found)


def assert_same_weights(a: Path, b: Path) -> None:
    x, y = (load_file(p / "model.safetensors") for p in (a, b))
    assert all(torch.equal(x[k], y[k]) for k in y)


def workers(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """The processes of a launch by rank."""
    found: dict[str, psutil.Process] = {}
    for p in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "RANK" in p.environ() and "-m" in p.cmdline() and "train" in p.cmdline():
                found[p.environ()["RANK"]] = p
    return found


@pytest.mark.slow
def test_a_lost_rank_begins_again_at_the_last_checkpoint(options: Options, tmp_path: Path) -> None:
    """torchrun starts all ranks again, and without a flag they go on: the run ends as the undisturbed one."""
    data = options(steps=40, checkpoint__every=3, validation__every=1000)
    whole = start({**data, "out": str(tmp_path / "whole")}, tmp_path, ranks=2)
    _, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    process = start(data, tmp_path, ranks=2, restarts=2)
    for rank, step in (("1", 7), ("0", 16)):
        wait_for(process, lambda step=step: steps_done(tmp_path / "run") >= step)
        workers(process)[rank].kill()
        time.sleep(1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [m["step"] for m in history(tmp_path / "run" / "training" / "train.jsonl")] == list(range(1, 41))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_torchrun_saves(options: Options, tmp_path: Path) -> None:
    process = start(options(steps=100_000, checkpoint__every=100_000), tmp_path, ranks=2)
    wait_for(process, lambda: steps_done(tmp_path / "run") >= 2)
    process.terminate()
    process.communicate(timeout=120)
    found = newest(tmp_path / "run")
    assert found is not None and number(found) == steps_done(tmp_path / "run")
    assert_whole(tmp_path / "run", found)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_kills_of_two_ranks_never_corrupt(asynchronous: bool, options: Options, tmp_path: Path) -> None:
    """One rank, the other or both at once, at random points of runs that save after every step."""
    rng = random.Random(1)
    data = options(steps=400, checkpoint__every=1, validation__every=1000, checkpoint__asynchronous=asynchronous)
    out = tmp_path / "run"
    for n in range(10):
        process = start(data, tmp_path, "--continue", ranks=2)
        before = steps_done(out)
        wait_for(process, lambda before=before: steps_done(out) > before)
        found = workers(process)
        time.sleep(rng.random() * 0.3)
        for rank in (("0",), ("1",), ("0", "1"))[n % 3]:
            found[rank].kill()
        process.communicate(timeout=120)
        saved = newest(out)
        if saved is not None:
            assert_whole(out, saved)
            assert steps_done(out) - number(saved) <= (2 if asynchronous else 1)
    assert number(newest(out) or Path()) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "asynchronous"])
def test_a_disk_that_fills_up_between_files_keeps_the_previous_checkpoint(
    asynchronous: bool, options: Options, tmp_path: Path
) -> None:
    """On a small disk of its own: the training state still fits, the weights do not; later there is room again."""
    script = """
        set -e
        mount -t tmpfs -o size=4m tmpfs disk
        $PY -m train --config run.yaml --stop-after 2 > log
        state=$(stat -c %s disk/run/checkpoints/step-000002/training/tensors/__0_0.distcp)
        fallocate -l $(($(df --output=avail -B1 disk | tail -1) - state - 70000)) disk/ballast
        set +e; $PY -m train --out disk/run --resume > log 2> error; echo $? > code; set -e
        ls -A disk/run/checkpoints > listed
        cp -r disk/run kept
        rm disk/ballast
        $PY -m train --out disk/run --resume > log
        cp -r disk/run end
    """
    (tmp_path / "disk").mkdir()
    data = {**options(steps=4, checkpoint__asynchronous=asynchronous, validation__every=1000), "out": "disk/run"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**data, "samples": {"every": 0}}), encoding="utf-8")
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("a disk of one's own needs user namespaces")
    env = {**os.environ, "PY": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    error = (tmp_path / "error").read_text() if (tmp_path / "error").is_file() else ""
    assert done.returncode == 0, done.stderr + error
    assert (tmp_path / "code").read_text().strip() == "2"
    [line] = error.splitlines()
    assert "cannot save step 4" in line and "No space left on device" in line
    assert "the checkpoint of step 2 is intact; make room and continue with --resume" in line
    assert (tmp_path / "listed").read_text().split() == ["step-000002"]
    assert_whole(tmp_path / "kept", tmp_path / "kept" / "checkpoints" / "step-000002")
    assert number(newest(tmp_path / "end") or Path()) == 4
