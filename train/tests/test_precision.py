"""Numbers and devices: what is chosen, what is refused, and float16's scaled loss in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backends.torch.model import Decoder
from parity_tests.cases import random_ids
from spec import SpecError, UserError, parse
from train import config, parallel, session
from train.parallel import device as devices
from train.parallel import peak, precision
from train.parallel.device import Hardware
from train.parallel.precision import Scaler
from train.watch import history

Options = Callable[..., dict[str, Any]]
Train = Callable[..., session.Result]

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
V100 = Hardware("cuda", "Tesla V100-SXM2-32GB", (7, 0), bfloat16=False)
A100 = Hardware("cuda", "NVIDIA A100-SXM4-80GB", (8, 0))
CPU = Hardware("cpu", "a processor")


@pytest.mark.parametrize(
    ("asked", "found", "chosen"),
    [
        ("auto", H100, "bfloat16"),
        ("auto", V100, "float32"),
        ("auto", CPU, "float32"),
        ("auto", Hardware("mps"), "float32"),
        ("auto", Hardware("xpu"), "bfloat16"),
        ("fp8", H100, "fp8"),
        ("tf32", A100, "tf32"),
        ("float16", V100, "float16"),
        ("float16", CPU, "float16"),
        ("bfloat16", CPU, "bfloat16"),
    ],
)
def test_a_precision_is_chosen_by_the_hardware(asked: str, found: Hardware, chosen: str) -> None:
    assert precision.choose(asked, found)[0] == chosen


@pytest.mark.parametrize(
    ("asked", "found", "message"),
    [
        ("tf32", CPU, "precision: tf32 needs a CUDA device of compute capability 8.0 (A100) or newer, not a processor"),
        ("tf32", V100, "not Tesla V100-SXM2-32GB (7.0) (use float32)"),
        ("fp8", A100, "precision: fp8 needs a CUDA device of compute capability 8.9 (L4, RTX 4090, H100) or newer"),
        ("fp8", CPU, "(use bfloat16)"),
        ("bfloat16", V100, "precision: bfloat16 is emulated at best on Tesla V100-SXM2-32GB (use float16)"),
    ],
)
def test_a_precision_that_the_hardware_lacks_is_one_line(asked: str, found: Hardware, message: str) -> None:
    with pytest.raises(UserError) as e:
        precision.choose(asked, found)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"cuda": 2, "xpu": 0, "mps": 0, "cpu": 1}
    monkeypatch.setattr(devices, "count", there.__getitem__)
    assert parallel.choose_device("auto") == torch.device("cuda")
    for name in ("xpu", "cuda:2", "mps"):
        with pytest.raises(UserError, match=rf"^device: {name} is not there \(torch sees cuda \(2\), cpu; use auto\)$"):
            parallel.choose_device(name)
    there["cuda"], there["xpu"] = 0, 1
    assert parallel.choose_device("auto") == torch.device("xpu")
    there["xpu"] = 0
    assert parallel.choose_device("auto") == torch.device("cpu")


def test_the_device_is_described() -> None:
    said = parallel.describe(torch.device("cpu"), "auto")
    assert said.startswith("cpu (")
    assert "threads; the first that is there of cuda, xpu, mps, cpu)" in said


@pytest.mark.parametrize(
    ("name", "at", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "fp8", 1978.9),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "bfloat16", None),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla V100-SXM2-32GB", "bfloat16", None),
        ("NVIDIA X999", "bfloat16", None),
    ],
)
def test_peaks_are_those_of_known_hardware_alone(name: str, at: str, tera: float | None) -> None:
    found = peak.flops(name, at)
    assert found == (None if tera is None else pytest.approx(tera * 1e12))


def test_the_scale_follows_what_overflows() -> None:
    scaler = Scaler(4.0, interval=3)
    assert [scaler.overflowed(1.0, float("inf")) for _ in range(3)] == [True, True, False], "it never falls below 1"
    assert not scaler.overflowed(float("nan"), float("nan")), "a wrong loss is no matter of its scale"
    assert [scaler.overflowed(1.0, 1.0) for _ in range(3)] == [False] * 3
    assert (scaler.scale, scaler.steady, scaler.overflows) == (2.0, 0, 2)
    again = Scaler()
    again.load_state(json.loads(json.dumps(scaler.state())))
    assert again.state() == scaler.state()


def test_scaling_rounds_nothing() -> None:
    weight = nn.Parameter(torch.zeros(64))
    weight.grad = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 1e-3
    before = weight.grad.clone()
    weight.grad *= 2.0**16
    Scaler(2.0**16).unscale([weight])
    assert torch.equal(weight.grad, before)


def test_float16_finds_its_scale_and_resumes_with_it(
    options: Options, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Steps lost to the search count neither as skipped nor against optimizer.max_skipped."""
    monkeypatch.setattr(parallel, "scaler", lambda name: Scaler(2.0**30))
    fields = {"precision": "float16", "steps": 24, "optimizer__max_skipped": 1}
    train(options(**fields), stop_after=20)
    found = json.loads(next((tmp_path / "run").glob("checkpoints/*/training/state.json")).read_text())["scaler"]
    assert 1 <= found["overflows"] < 18
    assert found["scale"] == 2.0 ** (30 - found["overflows"])
    train(options(**fields), resume=True)
    steps = history(tmp_path / "run" / "training" / "train.jsonl")
    assert len(steps) == 24
    assert steps[-1]["skipped"] == 0
    assert sum(m["grad_norm"] is None for m in steps[:20]) == found["overflows"]
    train(options("exact", steps=24))
    plain = history(tmp_path / "exact" / "training" / "train.jsonl")
    assert steps[0]["loss"] == pytest.approx(plain[0]["loss"], rel=2e-3)
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_16_bit_training_follows_float32(options: Options, train: Train, tmp_path: Path, name: str) -> None:
    curves = []
    for out, chosen in (("a", "float32"), ("b", name)):
        train(options(out, precision=chosen))
        curves.append([m["loss"] for m in history(tmp_path / out / "training" / "train.jsonl")])
    assert len(curves[0]) == len(curves[1]) == 8
    assert curves[0] != curves[1]
    for a, b in zip(*curves, strict=True):
        assert b == pytest.approx(a, rel=5e-3)


def test_fp8_keeps_names_and_what_does_not_fit() -> None:
    """Emulated, since 8-bit products need hardware."""
    pytest.importorskip("torchao")
    sizes = {"vocab_size": 96, "width": 32, "depth": 2, "context": 24}
    attention = {"heads": 2, "kv_heads": 1, "head_dim": 16}
    mlp = {"kind": "moe", "hidden": 40, "experts": 4, "router": {"top_k": 2}, "shared": {"hidden": 40}}
    spec = parse({**sizes, "block": {"attention": attention, "mlp": mlp}})
    models = [Decoder(spec), Decoder(spec)]
    names = list(models[0].state_dict())
    kept = parallel.convert_to_fp8(models[0], emulate=True)
    assert sorted(kept) == [f"layers.{i}.mlp.shared.{w}" for i in (0, 1) for w in ("down", "gate", "up")]
    assert list(models[0].state_dict()) == names
    assert type(models[0].layers[0].attn.q).__name__ == "Float8Linear"  # type: ignore[union-attr]
    ids = torch.from_numpy(random_ids(spec))
    losses = []
    for model in models:
        model.init_weights(0)
        losses.append(model(ids, ids))
        losses[-1].backward()
    assert losses[0].item() != losses[1].item()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-2)
    for (n, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if q.grad is not None and q.grad.norm() > 0:
            assert p.grad is not None
            assert (p.grad - q.grad).norm() < 0.2 * q.grad.norm(), n


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": {"checkpointing": "budget"}, "compile": False}, "memory.checkpointing: 'budget' is decided while"),
        ({"memory": {"checkpointing": "budget", "every": 2}}, "memory.every: 2"),
        (
            {"memory": {"budget": 0.3}},
            r"memory.budget: 0.3 does nothing with memory.checkpointing=none \(leave it at 0.5",
        ),
        ({"memory": {"checkpointing": "selective", "save": ()}}, "memory.save: "),
        ({"memory": {"checkpointing": "half"}}, "memory.checkpointing"),
        ({"precision": "fp8", "parallel": {"tp": 2}}, "precision: 'fp8' does not go together with tensor"),
        ({"attention": {"kernel": "flush"}}, "attention.kernel"),
        ({"compile": "yes"}, "compile"),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        config.layered(fields)


def test_offload_is_refused_where_weights_are_on_the_cpu_already(options: Options, train: Train) -> None:
    with pytest.raises(UserError, match=r"^memory.offload: weights are in the memory of cpu already"):
        train(options(memory={"offload": True}))
