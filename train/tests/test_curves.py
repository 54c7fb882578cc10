"""Twenty steps of `python -m train` on several ranks follow the one process: losses, clip norms, validation.

The bound: ranks sum the same numbers in another order, so a gradient differs by a few float32 roundings (measured:
1e-7 of its norm). Adam divides by its size, which makes steps of rounding noise where a gradient is near zero;
over 20 steps that moves the loss by less than 2e-5 of it, and the norm by less than 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from train import session
from train.tests.launch import start
from train.watch import history

Options = Callable[..., dict[str, Any]]
Train = Callable[..., session.Result]

SPEC = """\
version: 1
name: mini
vocab_size: 301
width: 48
depth: 3
context: 32
head: {tied: false}
block:
  attention: {heads: 4, kv_heads: 2, qk_norm: {over: head}}
  mlp: {hidden: 64}
"""

LAYOUTS = {
    "pp2": {"pp": 2},
    "tp2": {"tp": 2},
    "fsdp2": {"dp": 2},
    "fsdp4": {"dp": 4},
    "fsdp2-tp2": {"dp": 2, "tp": 2},
    "fsdp2-pp2": {"dp": 2, "pp": 2},
    "hsdp2x2": {"dp": 2, "replicate": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
}
DEFAULT = ("pp2", "fsdp2-tp2")


@pytest.mark.parametrize("layout", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS])
def test_ranks_follow_the_one_process(layout: str, options: Options, train: Train, tmp_path: Path) -> None:
    spec = tmp_path / "untied.yaml"
    spec.write_text(SPEC, encoding="utf-8")
    degrees = LAYOUTS[layout]
    ranks = 1
    for degree in degrees.values():
        ranks *= degree
    common = {"steps": 20, "batch__sequences": 8, "batch__micro": 2, "validation__every": 10}
    data = options(**common, optimizer__clip=0.5, spec=str(spec))
    train({**data, "out": str(tmp_path / "one")})
    process = start({**data, "out": str(tmp_path / "many"), "parallel": degrees}, tmp_path, ranks=ranks)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-5000:]
    one, many = (history(tmp_path / out / "training" / "train.jsonl") for out in ("one", "many"))
    assert len(one) == len(many) == 20
    for a, b in zip(one, many, strict=True):
        assert (a["step"], a["tokens"], a["lr"], a["skipped"]) == (b["step"], b["tokens"], b["lr"], b["skipped"])
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert ("val_loss" in a) == ("val_loss" in b)
        if "val_loss" in a:
            assert b["val_loss"] == pytest.approx(a["val_loss"], rel=2e-5)
