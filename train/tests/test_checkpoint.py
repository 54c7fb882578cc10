"""Checkpoints of several ranks: bit for bit with as many, the same run with fewer or otherwise divided; what is kept;
weights to begin with; exports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from rich.console import Console
from safetensors.torch import load_file

from backends.torch.checkpoint import load_decoder
from backends.torch.model import Decoder
from spec.errors import UserError
from spec.load import load as load_spec
from train import checkpoint, config, parallel, session
from train.checkpoint import newest, number
from train.checkpoint.tensors import Reader, Stager, save
from train.config import Parallel
from train.tests.conftest import saved_tensors
from train.watch import history

Options = Callable[..., dict[str, Any]]
Train = Callable[..., session.Result]

ROOT = Path(__file__).parents[2]

UNEVEN = """\
version: 1
name: uneven
vocab_size: 301
width: 32
depth: 2
context: 32
block:
  attention: {heads: 2, kv_heads: 2, sinks: true}
  mlp: {hidden: 48}
"""
"""301 rows over 2 or 4 ranks, and 2 sinks over 4, two of which have none."""


def losses(out: Path | str) -> list[float]:
    """A run's losses."""
    return [m["loss"] for m in history(Path(out) / "training" / "train.jsonl")]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _begin(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _train(rank: int, world: int, ports: list[int], jobs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for port, (data, how) in zip(ports, jobs, strict=True):
        _begin(rank, world, port)
        c = config.layered(data)
        if how.get("resume"):
            c, out, _ = session.resumed(data)
            c = c.model_copy(update={"out": str(out)})
        session.train(c, console=Console(file=StringIO()), **how)


def on_ranks(world: int, *jobs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Trainings one after another on gloo processes."""
    mp.spawn(_train, (world, [_free_port() for _ in jobs], list(jobs)), nprocs=world)  # type: ignore[attr-defined]


@pytest.fixture
def uneven(options: Options, tmp_path: Path) -> Options:
    """Options of the model whose vocabulary no number of ranks divides."""

    def make(out: str, **fields: Any) -> dict[str, Any]:
        data = options(out, **{"batch__sequences": 4, "steps": 6, "validation__every": 2, **fields})
        Path(data["spec"]).write_text(UNEVEN, encoding="utf-8")
        return data

    return make


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits."""
    x, y = saved_tensors(a), saved_tensors(b)
    assert x.keys() == y.keys()
    assert not [k for k in x if not torch.equal(x[k], y[k])]
    assert json.loads((a / checkpoint.STATE).read_text()) == json.loads((b / checkpoint.STATE).read_text())


def newest_of(out: Path) -> Path:
    """The newest checkpoint, which is there."""
    found = newest(out)
    assert found is not None
    return found


def test_two_ranks_resume_bit_for_bit_twice_and_one_goes_on(uneven: Options, train: Train, tmp_path: Path) -> None:
    """In the background too. What two ranks saved, one goes on with, and the other way round: the same batches, and
    losses that differ by the rounding of other sums."""
    whole = uneven("whole", checkpoint__asynchronous=True)
    parts, back = {**whole, "out": str(tmp_path / "parts")}, {**whole, "out": str(tmp_path / "back")}
    train({**whole, "out": str(tmp_path / "one")})
    train(back, stop_after=3)
    again = {"out": parts["out"]}
    on_ranks(
        2,
        (whole, {}),
        (parts, {"stop_after": 2}),
        (again, {"resume": True, "stop_after": 4}),
        (again, {"resume": True}),
        ({"out": back["out"]}, {"resume": True}),
    )
    assert_same(newest_of(tmp_path / "whole"), newest_of(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    state = checkpoint.read(newest_of(tmp_path / "whole"))
    assert state["world"] == 2 and state["degrees"]["dp"] == 2
    assert {k for k in saved_tensors(newest_of(tmp_path / "whole")) if "random" in k} == {"random/0/cpu", "random/1/cpu"}
    assert losses(tmp_path / "back") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    one = checkpoint.read(newest_of(tmp_path / "one"))["data"]
    assert checkpoint.read(newest_of(tmp_path / "back"))["data"] == one == state["data"]
    result = train({"out": parts["out"], "steps": 8}, resume=True)
    assert result.step == 8
