"""A model small enough to train within seconds, and text for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from backends.torch.checkpoint import files_of
from train import config, session
from train.checkpoint import TENSORS
from train.checkpoint.tensors import Reader, quiet
from train.config import TrainConfig

SPEC = """\
version: 1
name: mini
vocab_size: 300
width: 32
depth: 2
context: 32
block:
  attention: {heads: 2, kv_heads: 1}
  mlp: {hidden: 48}
  dropout: 0.1
"""


def write_text(folder: Path, files: int = 12, seed: int = 0) -> Path:
    """A folder of small text files."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "größe", "λ", "42", "if", "return", "x"]
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(files):
        lines = [" ".join(rng.choices(words, k=9)) for _ in range(40)]
        (folder / f"file{n:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights as trained and as published, moments, random states."""
    quiet()
    reader = Reader(folder / TENSORS)
    out = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in reader.tensors.items()}
    reader.load(out)
    for file in sorted(set(files_of(folder).values())):
        out |= load_file(file)
    return out


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """The small spec, dropout included, so that random states count."""
    path = tmp_path / "mini.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


@pytest.fixture
def options(tmp_path: Path, spec_file: Path) -> Callable[..., dict[str, Any]]:
    """Plain configuration of a run in `tmp_path / out`, fields by dotted path."""

    def make(out: str = "run", **fields: Any) -> dict[str, Any]:
        data: dict[str, Any] = {
            "spec": str(spec_file),
            "out": str(tmp_path / out),
            "steps": 8,
            "device": "cpu",
            "data": {"source": str(write_text(tmp_path / "text")), "cache": str(tmp_path / "cache")},
            "batch": {"sequences": 4},
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"every": 100},
            "validation": {"every": 100, "tokens": 512},
        }
        for path, value in fields.items():
            *parents, last = path.split("__")
            here = data
            for p in parents:
                here = here.setdefault(p, {})
            here[last] = value
        return data

    return make


@pytest.fixture
def train() -> Callable[..., session.Result]:
    """Train in this process, silently; `resume=True` goes on like the command line does."""

    def go(data: dict[str, Any], **how: Any) -> session.Result:
        c: TrainConfig = config.layered(data)
        if how.get("resume"):
            c, out, _ = session.resumed(data)
            c = c.model_copy(update={"out": str(out)})
        return session.train(c, console=Console(file=StringIO()), **how)

    return go
