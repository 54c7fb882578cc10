"""What was trained with `--quant` is what every container holds: the weights that the run was validated with, its codes
and its scales, decoded from the files."""

from __future__ import annotations

import random
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from backends.base import QuantizedTensor
from convert.pipeline import convert_all
from convert.recipe import plan
from convert.sources import open_source
from parity_tests.artifacts import opened
from spec.load import load
from spec.params import params
from train import config, parallel, session
from train.engine import Engine
from train.tests.launch import begin, spawn

SPEC = """\
version: 1
name: small
vocab_size: 300
width: 128
depth: 2
context: 32
block:
  attention: {heads: 4, kv_heads: 2}
  mlp: MLP
head: {tied: TIED}
"""
DENSE, MOE = "{hidden: 192}", "{kind: moe, experts: 3, hidden: 64, router: {top_k: 2}}"


def options(folder: Path, mlp: str = DENSE, *, tied: bool = False, **fields: Any) -> dict[str, Any]:
    """A run of a few steps on words at random, in `folder / run`."""
    rng = random.Random(0)
    (folder / "text").mkdir(exist_ok=True)
    for n in range(8):
        words = (" ".join(rng.choices(["alpha", "beta", "if", "return", "λ", "42"], k=9)) for _ in range(40))
        (folder / "text" / f"{n}.txt").write_text("\n".join(words), encoding="utf-8")
    (folder / "small.yaml").write_text(SPEC.replace("MLP", mlp).replace("TIED", str(tied).lower()), encoding="utf-8")
    return {
        "spec": str(folder / "small.yaml"),
        "out": str(folder / "run"),
        "steps": 4,
        "device": "cpu",
        "ship": ["f32"],
        "data": {"source": str(folder / "text"), "cache": str(folder / "cache")},
        "optimizer": {"lr": 1e-2},
        **fields,
    }


def train(data: dict[str, Any], seen: dict[str, torch.Tensor], **how: Any) -> None:
    """Train, and let `seen` be the whole weights of the last pass that scored the held-out documents."""
    score = Engine.score

    def spying(self: Engine, rows: Any) -> torch.Tensor:
        seen.update({n: parallel.whole(p).clone() for n, p in self.decoder.named_parameters()})
        return score(self, rows)

    c = config.layered(data)
    if how.get("resume"):
        c, out, _ = session.resumed(data)
        c = c.model_copy(update={"out": str(out)})
    Engine.score = spying
    try:
        session.train(c, console=Console(file=StringIO()), **how)
    finally:
        Engine.score = score


def check(run: Path, level: str, targets: list[str], seen: dict[str, torch.Tensor], out: Path) -> None:
    """Every artifact has the weights that were seen, at the levels that the run was for, codes and scales alike."""
    with open_source(run) as source:
        trained = {p.name: p.level for p in plan(source.spec, level, source.held)}
        held = dict(source.held.levels)
    assert {n: x for n, x in trained.items() if x.startswith("q")} == held
    out.mkdir()
    exact = {"compute": "f32"} if {"mlx", "onnx"} & {*targets} else {}
    spec = load(run)
    coded: dict[str, list[QuantizedTensor]] = {}
    for r in convert_all(run, targets, level, out, options=exact, verify=False):
        artifact = opened(r.backend, r.out)
        for p in params(spec):
            found = artifact.rows(p.name, 0, p.shape[0])
            if p.name in held:
                assert isinstance(found, QuantizedTensor), (r.backend, p.name)
                coded.setdefault(p.name, []).append(found.grouped(128 if held[p.name].endswith("128") else 32))
                found = found.dequantize()
            assert (found.reshape(p.shape) == seen[p.name].numpy()).all(), (r.backend, p.name)  # type: ignore[union-attr]
    for name, (first, *others) in coded.items():
        assert all((q.codes == first.codes).all() and (q.scales == first.scales).all() for q in others), name


def test_every_container_has_the_codes_of_the_training(tmp_path: Path) -> None:
    chosen = {"level": "q4", "override": "layers.0.attn.o=q8", "start": 1}
    data = options(tmp_path, tied=True, quant=chosen)
    data["optimizer"]["ema"] = 0.9
    seen: dict[str, torch.Tensor] = {}
    train(data, seen, stop_after=2)
    train(data, seen, resume=True)
    check(tmp_path / "run", "q4", ["gguf", "mlx", "onnx", "hf"], seen, tmp_path / "shipped")


@pytest.mark.slow
@pytest.mark.parametrize("level", ["q8", "q4-g128"])
def test_experts_and_wide_groups_too(level: str, tmp_path: Path) -> None:
    seen: dict[str, torch.Tensor] = {}
    train(options(tmp_path, MOE, quant=level), seen)
    check(tmp_path / "run", level, ["gguf", "mlx", "onnx", "hf"], seen, tmp_path / "shipped")


RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "dp": (DENSE, {"parallel": {"dp": 2}, "precision": "bfloat16", "memory": {"checkpointing": "full"}}),
    "tp": (DENSE, {"parallel": {"tp": 2}}),
    "pp": (DENSE, {"parallel": {"pp": 2}}),
    "ep": (MOE.replace("experts: 3", "experts: 4"), {"parallel": {"ep": 2}}),
}


def _rank(rank: int, ports: list[int], folder: Path) -> None:
    for (how, (mlp, fields)), port in zip(RANKS.items(), ports, strict=True):
        begin(rank, 2, port)
        seen: dict[str, torch.Tensor] = {}
        (folder / how).mkdir(exist_ok=True)
        chosen = {"level": "q4", "override": "layers.0.attn.o=q8", "start": 1}
        fields = {"precision": "float32", "batch": {"sequences": 8, "micro": 4}, **fields}
        train(options(folder / how, mlp, quant=chosen, **fields), seen)
        torch.save(seen, folder / how / f"seen-{rank}.pt")


@pytest.mark.slow
def test_two_ranks_train_the_codes_that_ship(tmp_path: Path) -> None:
    """Sharded by rows (FSDP2, in bfloat16, activations recomputed), with columns of `o` and `down` on different ranks,
    with a layer on each, and with the experts divided."""
    spawn(_rank, 2, tmp_path, starts=len(RANKS))
    for how in RANKS:
        folder = tmp_path / how
        seen = {n: t for rank in range(2) for n, t in torch.load(folder / f"seen-{rank}.pt").items()}
        check(folder / "run", "q4", ["gguf", "hf"], seen, folder / "shipped")
