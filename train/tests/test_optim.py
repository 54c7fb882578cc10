"""Optimizers: each kind on shards and on one process, its state in and out, clipping, averages, schedules.

Gradients are made up here, the same on any number of ranks, so that what is compared is the optimizer alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.tensor import DTensor, distribute_tensor

from backends.torch.model import Decoder
from spec.config import Spec
from spec.errors import MissingDependency, SpecError, UserError
from spec.load import parse as parse_spec
from train import config, optim, parallel, session
from train.checkpoint import newest
from train.config.optim import KINDS
from train.optim import kinds
from train.parallel import Degrees, Ranks
from train.parallel.mesh import DIMENSIONS
from train.tests.conftest import saved_tensors

ALL = tuple(KINDS)
ONE = Ranks(0, 1, torch.device("cpu"))
OPTIONS = {"soap": {"precondition_frequency": 2}}
"""So that SOAP turns its basis within a few steps."""


def mini(experts: bool = True) -> Spec:
    """Odd rows, a bias, a mixture, and matrices large enough for moments of 8 bits."""
    mixture = {"kind": "moe", "experts": 4, "hidden": 32, "router": {"top_k": 2, "correction": True}}
    block = {"attention": {"heads": 4, "kv_heads": 2, "bias": {"q": True}}, "mlp": {"hidden": 128}}
    changed = {"overrides": {"1": {"mlp": mixture}}} if experts else {}
    return parse_spec({"vocab_size": 301, "width": 128, "depth": 2, "context": 16, "block": block, **changed})


def chosen(kind: str, **fields: Any) -> config.Optimizer:
    return config.layered({"optimizer": {"kind": kind, "options": OPTIONS.get(kind), **fields}}).optimizer


def whole_model(spec: Spec) -> Decoder:
    decoder = Decoder(spec)
    decoder.init_weights(0)
    return decoder


def feed(decoder: nn.Module, step: int, scale: float = 0.1) -> None:
    """Gradients of one step, sharded as the parameters are."""
    for name, p in decoder.named_parameters():
        if p.requires_grad:
            seed = int.from_bytes(f"{step}{name}".encode(), "little") % 2**31
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * scale
            p.grad = (
                distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else g
            )


def run(decoder: nn.Module, optimizer: optim.Optimizer, steps: range) -> None:
    for step in steps:
        feed(decoder, step)
        optimizer.scale(1 / step)
        optimizer.step()
        optimizer.zero_grad()


def weights(decoder: nn.Module) -> dict[str, Tensor]:
    return {name: parallel.whole(p).clone() for name, p in decoder.named_parameters()}


def started(spec: Spec, kind: str, **fields: Any) -> tuple[Decoder, optim.Optimizer]:
    decoder = whole_model(spec)
    return decoder, optim.build(decoder, spec, chosen(kind, **fields))


def reference(spec: Spec, kind: str, steps: int, **fields: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and state of one process."""
    decoder, optimizer = started(spec, kind, **fields)
    run(decoder, optimizer, range(1, steps + 1))
    return weights(decoder), {k: t.clone() for k, t in optim.state(optimizer).items()}


# ---- configuration


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "adam"}, r"optimizer\.kind: .*adam.* is no optimizer \(did you mean adamw"),
        ({"kind": "sgd", "betas": [0.9, 0.9]}, r"optimizer\.betas: .*sgd has none \(it has lr, momentum"),
        ({"kind": "adamw", "momentum": 0.9}, r"optimizer\.momentum: 0\.9 adamw has none"),
        ({"kind": "adamw", "rest_lr": 0.1}, r"optimizer\.rest_lr: 0\.1 adamw has none"),
        (
            {"kind": "muon", "options": {"ns_step": 5}},
            r"optimizer\.options\.ns_step: 5 is no option of muon .*ns_steps",
        ),
        ({"kind": "muon", "options": {"ns_steps": 2.5}}, r"optimizer\.options\.ns_steps: 2\.5 is no int"),
        ({"kind": "lion", "options": {"x": 1}}, r"optimizer\.options: .*lion has none|lion has no options"),
        ({"kind": "sgd", "momentum": 0.0, "nesterov": True}, r"optimizer\.nesterov: True needs a momentum"),
        ({"kind": "mine.py:make", "betas": [0.9, 0.9]}, r"put it into optimizer\.options\.betas"),
    ],
)
def test_a_field_that_an_optimizer_has_not_is_an_error(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        config.layered({"optimizer": fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "constant", "final": 0.1}, r"schedule\.final: 0\.1 is for cosine and linear and wsd"),
        ({"decay": 0.1}, r"schedule\.decay: 0\.1 is for wsd, and schedule\.kind is cosine"),
        ({"warmup": 3, "warmup_tokens": 9}, r"schedule\.warmup_tokens: 9 contradicts schedule\.warmup=3"),
        ({"warmup": 100}, r"schedule\.warmup: 100 leaves no step of steps=100"),
        ({"kind": "wsd", "warmup": 50, "decay": 0.6}, r"schedule\.decay: 0\.6 .* before the warm-up"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_an_error(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        config.layered({"steps": 100, "schedule": fields})


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_has_its_own_defaults_and_they_survive_a_file(kind: str) -> None:
    from spec.load import read_yaml

    c = config.layered({"optimizer": {"kind": kind}})
    own = KINDS[kind]
    assert {n: getattr(c.optimizer, n) for n in own} == dict(own)
    assert config.layered(read_yaml(config.dump(c), "")).optimizer == c.optimizer
    assert c.optimizer.model_dump(exclude_unset=True) == {"kind": kind}


def test_none_turns_clipping_off() -> None:
    assert config.layered({"optimizer": {"clip": "none"}}).optimizer.clip is None
    assert config.layered({"optimizer": {"clip": None}}).optimizer.clip is None
    with pytest.raises(SpecError, match=r"optimizer\.clip"):
        config.layered({"optimizer": {"clip": "some"}})


# ---- groups


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    spec = mini()
    decoder = whole_model(spec)
    optimizer = optim.build(decoder, spec, chosen("muon", rest_lr=3e-4, embedding_lr=1e-2))
    names = [{s.name for s in part.shares} for part in optimizer.parts]
    assert [type(part.inner).__name__ for part in optimizer.parts] == ["Muon", "AdamW"]
    assert names[0] == {
        *(f"layers.{i}.attn.{w}.weight" for i in range(2) for w in "qkvo"),
        *(f"layers.0.mlp.{w}.weight" for w in ("gate", "up", "down")),
        *(f"layers.1.mlp.experts.{w}.weight" for w in ("gate", "up", "down")),
    }
    trained = {n for n, p in decoder.named_parameters() if p.requires_grad}
    assert names[0] | names[1] == trained and "layers.1.mlp.router.correction" not in trained
    rates = {
        s.name: g["lr"]
        for part in optimizer.parts
        for g, group in zip(part.inner.param_groups, part.groups, strict=True)
        for s in group
    }
    assert rates["layers.0.attn.q.weight"] == KINDS["muon"]["lr"]
    assert (rates["embed.weight"], rates["head.weight"], rates["final_norm.weight"]) == (1e-2, 3e-4, 3e-4)


def test_muon_and_soap_treat_every_expert_as_a_matrix_of_its_own() -> None:
    """A mixture's tensor steps as torch's Muon would step four parameters."""
    spec = mini()
    decoder, optimizer = started(spec, "muon", weight_decay=0.1)
    name = "layers.1.mlp.experts.down.weight"
    parts = [nn.Parameter(t.clone()) for t in decoder.get_parameter(name).detach().chunk(4)]
    assert parts[0].shape == (128, 32)
    lr = KINDS["muon"]["lr"]
    plain = torch.optim.Muon(parts, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(1, 4):
        feed(decoder, step)
        grad = decoder.get_parameter(name).grad
        assert grad is not None
        for part, g in zip(parts, grad.chunk(4), strict=True):
            part.grad = g.clone()
        optimizer.step()
        plain.step()
    assert torch.equal(decoder.get_parameter(name), torch.cat(tuple(parts)))
    assert optim.state(optimizer)[f"{name}/momentum_buffer"].shape == (4, 128, 32)
    decoder, optimizer = started(spec, "soap")
    run(decoder, optimizer, range(1, 3))
    assert optim.state(optimizer)[f"{name}/GG/0"].shape == (4, 128, 128)


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_moves_every_weight(kind: str) -> None:
    spec = mini()
    decoder, optimizer = started(spec, kind)
    before = weights(decoder)
    run(decoder, optimizer, range(1, 3))
    same = {n for n, t in weights(decoder).items() if torch.equal(t, before[n])}
    assert same == {"layers.1.mlp.router.correction"}


# ---- state


@pytest.mark.parametrize("kind", ALL)
def test_a_run_that_goes_on_takes_the_same_steps(kind: str) -> None:
    spec = mini()
    decoder, optimizer = started(spec, kind, ema=0.9)
    run(decoder, optimizer, range(1, 4))
    saved = {k: t.clone() for k, t in optim.state(optimizer).items()}
    kept = weights(decoder)
    assert all(type(t) is Tensor for t in saved.values())
    run(decoder, optimizer, range(4, 8))
    other = Decoder(spec)
    again = optim.build(other, spec, chosen(kind, ema=0.9))
    room = optim.wanted(again, {k: t.shape for k, t in saved.items()})
    assert room.keys() == saved.keys()
    with torch.no_grad():
        for k, t in room.items():
            t.copy_(saved[k])
        for name, p in other.named_parameters():
            p.copy_(kept[name])
    optim.load_state(again, room)
    run(other, again, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), other.parameters(), strict=True))
    ours, theirs = optim.state(optimizer), optim.state(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


def test_state_of_another_optimizer_is_refused() -> None:
    spec = mini()
    _, saved = reference(spec, "adamw", 1)
    _, optimizer = started(spec, "lion")
    with pytest.raises(UserError, match=r"the checkpoint has the optimizer state .*exp_avg_sq.* needs"):
        optim.wanted(optimizer, {k: t.shape for k, t in saved.items()})


def test_what_had_no_state_has_none_afterwards() -> None:
    spec = mini()
    decoder, optimizer = started(spec, "soap")
    optim.load_state(optimizer, {})
    assert optim.state(optimizer) == {}
    run(decoder, optimizer, range(1, 4))
    assert all(
        torch.equal(t, w)
        for t, w in zip(weights(decoder).values(), reference(spec, "soap", 3)[0].values(), strict=True)
    )


# ---- clipping, averages


def test_clipping_limits_the_norm_each_value_or_nothing() -> None:
    spec = mini()
    decoder = whole_model(spec)
    feed(decoder, 1)
    grads = [p.grad.clone() for p in decoder.parameters() if p.grad is not None]
    norm = optim.gradient_norm(decoder.parameters(), ONE)
    assert norm == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in grads)), rel=1e-6)

    def clipped(**fields: Any) -> list[Tensor]:
        feed(decoder, 1)
        optim.clip(decoder.parameters(), chosen("adamw", **fields), norm)
        return [p.grad for p in decoder.parameters() if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(clipped(clip=None), grads, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(clipped(clip=1e6), grads, strict=True))
    assert all(
        torch.equal(a, g.clamp(-0.05, 0.05)) for a, g in zip(clipped(clip=0.05, clip_by="value"), grads, strict=True)
    )
    for a, g in zip(clipped(clip=0.5), grads, strict=True):
        torch.testing.assert_close(a, g * (0.5 / norm), rtol=1e-5, atol=0)
    list(decoder.parameters())[3].grad[0] = float("nan")  # type: ignore[index]
    assert not optim.gradient_norm(decoder.parameters(), ONE).isfinite()


def test_the_average_follows_the_weights_and_lends_itself() -> None:
    spec = mini()
    decoder, optimizer = started(spec, "adamw", ema=0.5)
    expected: dict[str, Tensor] = {}
    for step in range(1, 7):
        run(decoder, optimizer, range(step, step + 1))
        d = min(0.5, (1 + step) / (10 + step))
        for name, t in weights(decoder).items():
            expected[name] = t.double() if step == 1 else expected[name] * d + t.double() * (1 - d)
    own = weights(decoder)
    with optimizer.averaged():
        inside = weights(decoder)
    for name, t in expected.items():
        torch.testing.assert_close(inside[name].double(), t, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(t, own[n]) for n, t in weights(decoder).items())
    assert not torch.equal(inside["embed.weight"], own["embed.weight"])


def test_a_run_publishes_the_average_and_goes_on_from_the_weights(
    options: Callable[..., dict[str, Any]], train: Callable[..., session.Result], tmp_path: Path
) -> None:
    fields = {"steps": 5, "optimizer": {"kind": "muon", "ema": 0.9}, "checkpoint__every": 5}
    train(options("whole", **fields))
    parts = options("parts", **fields)
    train(parts, stop_after=3)
    train({"out": parts["out"]}, resume=True)
    found = [newest(tmp_path / out) for out in ("whole", "parts")]
    assert found[0] is not None and found[1] is not None
    whole, again = (saved_tensors(f) for f in found if f is not None)
    assert whole.keys() == again.keys() and all(torch.equal(t, again[k]) for k, t in whole.items())
    published = load_file(tmp_path / "parts" / "model.safetensors")
    assert torch.equal(published["embed.weight"], whole["optimizer/embed.weight/ema"])
    assert not torch.equal(published["embed.weight"], whole["model/embed.weight"])


def test_what_a_resumed_run_is_given_is_judged_with_its_own(
    options: Callable[..., dict[str, Any]], train: Callable[..., session.Result]
) -> None:
    data = options(steps=4, schedule={"kind": "wsd", "warmup": 1})
    train(data, stop_after=2)
    changed = session.resumed({"out": data["out"], "schedule": {"decay": 0.25}})
    assert changed[2] == ["schedule.decay: 0.2 -> 0.25"]
    changed = session.resumed({"out": data["out"], "schedule": {"kind": "cosine"}})
    assert (changed[0].schedule.kind, changed[0].schedule.final, changed[0].schedule.decay) == ("cosine", 0.05, None)
    with pytest.raises(SpecError, match=r"schedule\.decay: 0\.9 .* before the warm-up"):
        session.resumed({"out": data["out"], "schedule": {"decay": 0.9}})


# ---- schedules


def factors(steps: int = 100, tokens: int = 1000, **schedule: Any) -> list[float]:
    c = config.layered({"steps": steps, "schedule": schedule})
    return [optim.factor(c, step, step * tokens) for step in range(1, steps + 1)]


def test_schedules_are_their_closed_forms() -> None:
    up = [s / 11 for s in range(1, 11)]
    done = [(s - 10) / 90 for s in range(11, 101)]
    assert factors(warmup=10) == pytest.approx([*up, *(0.05 + 0.95 * (1 + math.cos(math.pi * x)) / 2 for x in done)])
    assert factors(warmup=10, kind="linear", final=0.1) == pytest.approx([*up, *(1 - 0.9 * x for x in done)])
    assert factors(warmup=10, kind="constant") == pytest.approx([*up, *[1.0] * 90])
    assert factors(warmup=10, kind="inverse_sqrt") == pytest.approx([*up, *(math.sqrt(11 / s) for s in range(11, 101))])
    stable, fall = [1.0] * 65, [i / 25 for i in range(1, 26)]
    wsd = partial(factors, warmup=10, kind="wsd", decay=0.25)
    assert wsd(decay_shape="linear") == pytest.approx([*up, *stable, *(1 - x for x in fall)])
    assert wsd() == pytest.approx([*up, *stable, *(1 - math.sqrt(x) for x in fall)])
    half = [0.2 + 0.8 * (1 + math.cos(math.pi * x)) / 2 for x in fall]
    assert wsd(decay_shape="cosine", final=0.2) == pytest.approx([*up, *stable, *half])
    assert factors(warmup=0, kind="linear", final=0.0)[0] == pytest.approx(0.99)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_warm_up_by_tokens_is_warm_up_by_steps_where_steps_are_alike(kind: str) -> None:
    assert factors(kind=kind, warmup_tokens=10_000) == pytest.approx(factors(kind=kind, warmup=10))
    c = config.layered({"steps": 100, "schedule": {"warmup_tokens": 10_000}})
    assert optim.factor(c, 30, 6_000) < optim.factor(c, 30, 9_000) < 1
    assert optim.factor(c, 40, 20_000) == pytest.approx(
        optim.factor(config.layered({"steps": 100, "schedule": {"warmup": 20}}), 40, 0)
    )


# ---- of the user's own, and what is not installed


def test_an_optimizer_of_the_users_own_sees_whole_tensors(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n\ndef make(groups, lr, power=1):\n    return torch.optim.Adagrad(groups, lr=lr * power)\n"
        "\ndef bare(groups, lr):\n    return torch.optim.Rprop(groups, lr=lr)\n"
    )
    spec = mini()
    decoder, optimizer = started(spec, f"{file}:make", lr=0.1, options={"power": 2})
    run(decoder, optimizer, range(1, 3))
    assert type(optimizer.parts[0].inner) is torch.optim.Adagrad
    assert {k.partition("/")[2] for k in optim.state(optimizer)} == {"step", "sum"}
    for name, said in (
        ("made", r"has no function or class made \(did you mean make"),
        ("torch", "has no function or class torch"),
    ):
        with pytest.raises(UserError, match=said):
            started(spec, f"{file}:{name}")
    with pytest.raises(UserError, match=r"optimizer\.kind: .*absent\.py: no such file"):
        started(spec, f"{tmp_path / 'absent.py'}:make")
    with pytest.raises(UserError, match=r"optimizer\.weight_decay: 0\.1, and .*:bare has none"):
        started(spec, f"{file}:bare", weight_decay=0.1)
    with pytest.raises(UserError, match=r"unexpected keyword argument"):
        started(spec, f"{file}:make", options={"strength": 2})
    file.write_text("def make(groups, lr):\n    return 1\nx = 1 / 0\n")
    with pytest.raises(UserError, match=r"mine\.py:3: ZeroDivisionError"):
        started(spec, f"{file}:make")


@pytest.mark.parametrize(
    ("kind", "package"), [("lion", "pytorch_optimizer"), ("soap", "pytorch_optimizer"), ("adamw8bit", "torchao")]
)
def test_a_missing_package_is_one_line(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependency, match=rf"optimizer\.kind: {kind} needs {package}: pip install"):
        started(mini(), kind)


# ---- shards: four processes


MESHES = {
    "pipeline": Degrees(pp=2, dp=2),
    "copies": Degrees(replicate=2, dp=2),
    "tensor": Degrees(dp=2, tp=2),
}
"""Two stages of two shards; two copies of two shards; layers divided by rows and columns, all else over four ranks."""


NEAR = 2e-6
"""How far weights may be from one process's, of the distance that they went. The numbers are the same and are worked on
in the same order; element by element, a kernel may round once less in its body (a fused product and sum) than in its
tail, and shards have other tails."""


def close(kind: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], begun: dict[str, Tensor]) -> None:
    for name, t in ours.items():
        went = torch.linalg.norm(theirs[name] - begun[name])
        assert torch.linalg.norm(t - theirs[name]) <= NEAR * went, (kind, name)


def sharded(spec: Spec, ranks: Ranks) -> Decoder:
    decoder = Decoder(spec)
    spans = parallel.spans(spec, ranks.degrees.pp)
    if len(spans) > 1:
        decoder.keep(spans[ranks.place("pp")])
    parallel.shard(decoder, ranks, "float32")
    decoder.init_weights(0)
    return decoder


def model(decoder: Decoder) -> dict[str, Tensor]:
    return {f"model {n}": p.detach() for n, p in decoder.named_parameters()}


def load(optimizer: optim.Optimizer, decoder: Decoder, folder: Path) -> None:
    """Weights and state of a checkpoint, each rank its own part."""
    reader = FileSystemReader(folder)
    there = {k: getattr(m, "size", ()) for k, m in reader.read_metadata().state_dict_metadata.items()}
    room = optim.wanted(optimizer, {k: v for k, v in there.items() if "/" in k})
    state_dict_loader.load({**room, **model(decoder)}, storage_reader=reader)
    optim.load_state(optimizer, room)


def check_kind(kind: str, ranks: Ranks, folder: Path, before: str | None) -> None:
    """The same steps as one process's, on from what another mesh has saved."""
    spec = mini()
    begun = weights(whole_model(spec))
    decoder = sharded(spec, ranks)
    optimizer = optim.build(decoder, spec, chosen(kind, ema=0.9))
    name = next(n for n, d in MESHES.items() if d == ranks.degrees)
    if before is None:
        run(decoder, optimizer, range(1, 4))
    else:
        load(optimizer, decoder, folder / f"{kind}-{before}")
    expected, state = reference(spec, kind, 3, ema=0.9)
    close(kind, weights(decoder), {n: expected[n] for n in weights(decoder)}, begun)
    saved = optim.state(optimizer)
    owned = [k for k, t in saved.items() if not isinstance(t, DTensor) and t.dim() and ".correction/" not in k]
    assert bool(owned) == kinds.KINDS[kind].whole
    for k, t in saved.items():
        assert t.shape == state[k].shape, (kind, k)
    state_dict_saver.save({**saved, **model(decoder)}, checkpoint_id=folder / f"{kind}-{name}")
    run(decoder, optimizer, range(4, 6))
    expected, _ = reference(spec, kind, 5, ema=0.9)
    close(kind, weights(decoder), {n: expected[n] for n in weights(decoder)}, begun)
    if ranks.degrees.pp == 1:
        check_average(decoder, optimizer, ranks)


@torch.no_grad()
def check_average(decoder: Decoder, optimizer: optim.Optimizer, ranks: Ranks) -> None:
    """The average is lent after a pass that left the root's weights whole, and a pass inside computes with it."""
    ids = torch.arange(16)[None]
    before = decoder(ids, ids)
    with optimizer.averaged():
        inside = decoder(ids, ids)
        lent = weights(decoder)
    assert torch.equal(decoder(ids, ids), before)
    parallel.settle(decoder)
    alone = whole_model(mini())
    for name, p in alone.named_parameters():
        p.copy_(lent[name])
    if ranks.degrees.tp > 1:  # each has the losses of its part of the tokens
        dist.all_reduce(inside, group=ranks.mesh["tp"].get_group())  # type: ignore[index]
    torch.testing.assert_close(inside, alone(ids, ids), rtol=1e-5, atol=0)


def check_clipping(ranks: Ranks) -> None:
    """Norm and clipped gradients are one process's."""
    spec = mini()
    alone, decoder = whole_model(spec), sharded(spec, ranks)
    for model, of in ((alone, ONE), (decoder, ranks)):
        feed(model, 1)
        norm = optim.gradient_norm(model.parameters(), of)
        assert float(norm) == pytest.approx(float(optim.gradient_norm(alone.parameters(), ONE)), rel=1e-6) or of is ONE
    feed(alone, 1)
    norms = [float(optim.gradient_norm(m.parameters(), r)) for m, r in ((alone, ONE), (decoder, ranks))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for fields in ({"clip": 0.5}, {"clip": 0.05, "clip_by": "value"}):
        for model in (alone, decoder):
            feed(model, 1)
            optim.clip(model.parameters(), chosen("adamw", **fields), torch.tensor(norms[0]))
        for name, p in decoder.named_parameters():
            if p.requires_grad:
                assert p.grad is not None
                torch.testing.assert_close(parallel.whole(p.grad), alone.get_parameter(name).grad, rtol=1e-6, atol=0)


def four(rank: int, folder: str, names: tuple[str, ...], kinds_: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    from torch.distributed.device_mesh import init_device_mesh

    before = None
    for name in names:
        d = MESHES[name]
        mesh = init_device_mesh("cpu", tuple(getattr(d, n) for n in DIMENSIONS), mesh_dim_names=DIMENSIONS)
        ranks = Ranks(rank, 4, torch.device("cpu"), d, mesh)
        check_clipping(ranks)
        for kind in kinds_:
            check_kind(kind, ranks, Path(folder), before)
        before = name
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process loads what four saved
@pytest.mark.parametrize(
    ("names", "kinds_"),
    [
        pytest.param(("tensor",), ("adamw", "muon"), id="quick"),
        pytest.param(tuple(MESHES), ALL, id="all", marks=pytest.mark.slow),
    ],
)
def test_shards_take_the_steps_of_one_process_and_resume_elsewhere(
    names: tuple[str, ...], kinds_: tuple[str, ...], tmp_path: Path
) -> None:
    mp.spawn(four, (str(tmp_path), names, kinds_), nprocs=4)  # type: ignore[attr-defined]
    spec = mini()
    begun = weights(whole_model(spec))
    for kind in kinds_:
        decoder, optimizer = started(spec, kind, ema=0.9)
        load(optimizer, decoder, tmp_path / f"{kind}-tensor")
        run(decoder, optimizer, range(4, 6))
        close(kind, weights(decoder), reference(spec, kind, 5, ema=0.9)[0], begun)
