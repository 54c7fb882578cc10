"""Checkpointed and compiled layers compute what plain ones do, keep less, and are few graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from backends.torch.attention import Kernel, Plan
from backends.torch.balance import MORE, Balance
from backends.torch.model import Decoder
from parity_tests.cases import FEATURES, random_ids
from spec import Spec, UserError, parse
from spec.config import MoE, merge
from train import parallel
from train.config import Memory
from train.parallel import compiling
from train.parallel.mesh import DIMENSIONS, Degrees, Ranks
from train.parallel.recompute import Recomputed
from train.tests.test_parallel import _check_gradients

# Dynamo looks at the .grad of every tensor that it is given, and torch warns of it.
dynamo = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

ALONE = Ranks(0, 1, torch.device("cpu"))

HOW: dict[str, Memory] = {
    "full": Memory(checkpointing="full"),
    "every second": Memory(checkpointing="full", every=2),
    "selective": Memory(checkpointing="selective"),
    "attention alone": Memory(checkpointing="selective", save=("attention",)),
}

MIXTURES = ("moe_sigmoid", "moe_sinks")


def _spec(name: str) -> Spec:
    """With dropout wherever it can be, so that a second computation must draw the same numbers."""
    block = {"dropout": 0.2, "attention": {"dropout": 0.1}, "mlp": {"dropout": 0.1}}
    return parse(merge(FEATURES[name].model_dump(exclude_unset=True), {"block": block}))


def _trained(spec: Spec, *wraps: Any) -> dict[str, Tensor | None]:
    """Gradients of two accumulated passes in float32, by name; a router's statistics among them."""
    model = Decoder(spec)
    parallel.shard(model, ALONE, "float32", wraps)
    model.init_weights(1)
    model.train()
    model.balance = Balance(0.02, 0.001, torch.device("cpu"))
    model.balance.scale.fill_(0.5)
    leaves: dict[str, Tensor] = {}
    for i, block in enumerate(spec.layers):
        if isinstance(block.mlp, MoE):
            leaf = leaves[f"loads of {i}"] = torch.zeros(block.mlp.experts + MORE, requires_grad=True)
            model.layers[i].mlp.router.statistics = leaf  # type: ignore[union-attr]
    ids = torch.from_numpy(random_ids(spec))
    torch.manual_seed(5)
    for _ in range(2):
        (model(ids, ids.roll(-1, 1)) * 0.5).backward()
    return {n: p.grad for n, p in model.named_parameters()} | {n: leaf.grad for n, leaf in leaves.items()}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["gemma2", "sinks", *MIXTURES])
def test_recomputing_changes_no_bit_of_a_gradient(name: str, how: str) -> None:
    """Dropout and a router's counted loads included."""
    spec = _spec(name)
    plain, recomputed = _trained(spec), _trained(spec, parallel.recomputing(HOW[how]))
    assert plain.keys() == recomputed.keys()
    for n, g in plain.items():
        if g is None:
            assert recomputed[n] is None, n
            continue
        assert torch.equal(g, recomputed[n]), n  # type: ignore[arg-type]


def test_every_kth_layer_is_recomputed_and_all_keep_their_names() -> None:
    spec = FEATURES["window_pattern"]
    model, plain = Decoder(spec), Decoder(spec)
    parallel.shard(model, ALONE, "float32", [parallel.recomputing(Memory(checkpointing="full", every=2))])
    assert [isinstance(b, Recomputed) for b in model.layers] == [i % 2 == 1 for i in range(spec.depth)]
    assert list(model.state_dict()) == list(plain.state_dict())


def kept(memory: Memory, *, compiled: bool = False, attention: str = "auto") -> int:
    """Bytes that the layers of a mid-size model keep between the passes."""
    sizes = {"vocab_size": 64, "width": 128, "depth": 4, "context": 256}
    spec = parse({**sizes, "block": {"attention": {"heads": 4, "kv_heads": 2}, "mlp": {"hidden": 384}}})
    model = Decoder(spec, attention=attention)
    wraps = [parallel.recomputing(memory), *([parallel.compile_layer] if compiled else [])]
    parallel.shard(model, ALONE, "float32", wraps)
    model.init_weights(0)
    model.train()
    ids = torch.randint(64, (4, 256), generator=torch.Generator().manual_seed(0))
    model(ids, ids).backward()
    model.zero_grad()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        loss = model(ids, ids)
    net = sum(e.self_cpu_memory_usage for e in profile.key_averages())
    loss.backward()
    return int(net)


def test_each_way_of_checkpointing_keeps_less_than_the_one_before() -> None:
    ways = [
        Memory(),
        Memory(checkpointing="selective"),
        Memory(checkpointing="selective", save=("attention",)),
        Memory(checkpointing="full"),
    ]
    none, selective, attention, full = (kept(m) for m in ways)
    assert selective < 0.8 * none
    assert attention < 0.7 * selective
    assert full < 0.7 * attention  # of each layer its input, and not what attention gave
    scores = kept(Memory(checkpointing="selective"), attention="math")
    assert scores < 1.2 * selective, "scores of the reference attention are not kept"


@dynamo
def test_equal_layers_share_a_graph_whatever_is_done_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _spec("window_pattern")
    for memory in (Memory(), HOW["selective"]):
        graphs = _graphs_of(spec, monkeypatch, memory, [24, 24])
        assert graphs == len({b.model_dump_json() for b in spec.layers})


@dynamo
def test_further_shapes_run_eagerly_rather_than_compile_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FEATURES["llama"]
    monkeypatch.setattr(compiling, "SHAPES", 2)
    assert _graphs_of(spec, monkeypatch, Memory(), [4, 5, 6, 7, 4]) == 2


def _graphs_of(spec: Spec, monkeypatch: pytest.MonkeyPatch, memory: Memory, lengths: list[int]) -> int:
    """How many graphs a training over sequences of these lengths takes; losses are those of plain layers."""
    compile_: Any = torch.compile
    torch._dynamo.reset()  # type: ignore[attr-defined]
    torch._dynamo.utils.counters.clear()  # type: ignore[attr-defined]
    models = [Decoder(spec), Decoder(spec)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **how: compile_(f, backend="aot_eager", **how))
        parallel.shard(models[0], ALONE, "float32", [parallel.recomputing(memory), parallel.compile_layer])
    for model in models:
        model.init_weights(0)
        model.train()
    shapes = parallel.Shapes()
    for length in lengths:
        ids = torch.from_numpy(random_ids(spec, length=length))
        losses = []
        for model in models:
            torch.manual_seed(0)
            with shapes.stance(*ids.shape, True, True):
                losses.append(model(ids, ids))
            losses[-1].backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for (n, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=n)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]  # type: ignore[attr-defined]


@dynamo
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside inductor
def test_a_budget_keeps_less_and_computes_the_same() -> None:
    import torch._functorch.config as functorch

    torch._dynamo.reset()  # type: ignore[attr-defined]
    try:
        sizes = [kept(Memory(checkpointing="budget", budget=b), compiled=True) for b in (1.0, 0.5, 0.0)]
    finally:
        functorch.activation_memory_budget = 1.0
    assert sizes[2] < 0.7 * sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize(
    ("switch", "kind", "absent", "more", "outcome"),
    [
        ("auto", "cuda", None, {}, (True, "it pays on GPUs")),
        ("auto", "cuda", "a missing Triton", {}, (False, "stopped by a missing Triton")),
        ("auto", "cpu", None, {"budget": True}, (True, "memory.checkpointing budget needs it")),
        ("true", "cpu", None, {}, (True, "as asked")),
        ("false", "cuda", None, {}, (False, "as asked")),
    ],
)
def test_what_is_compiled_has_a_reason(
    switch: str, kind: str, absent: str | None, more: dict[str, bool], outcome: tuple[bool, str]
) -> None:
    found = compiling.decide(switch, kind, absent, **{"experts_move": False, "budget": False, **more})
    assert found == outcome


def test_what_is_asked_for_and_cannot_be_compiled_is_an_error() -> None:
    absent = "a missing C++ compiler (install g++)"
    with pytest.raises(UserError, match=r"^compile: true is stopped by a missing C\+\+ compiler") as e:
        compiling.decide("true", "cpu", absent, experts_move=False, budget=False)
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"^memory.checkpointing: budget is stopped by rows that travel"):
        compiling.decide("auto", "cuda", None, experts_move=True, budget=True)
    assert compiling.decide("auto", "cuda", None, experts_move=True, budget=False)[0] is False


def test_a_missing_compiler_is_found_before_a_step_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config, cpp_builder

    assert compiling.missing("cpu") is None
    monkeypatch.setitem(config.cpp.__dict__, "cxx", (None, str(tmp_path / "nowhere")))
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: str(tmp_path / "nowhere"))
    assert "is not there" in (compiling.missing("cpu") or "")


def test_a_pinned_kernel_equals_torchs_choice() -> None:
    from backends.torch.attention import KERNELS

    attention = FEATURES["llama"].layers[0].attention
    q, k, v = (torch.randn(2, h, 8, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    results = []
    names: tuple[Kernel, ...] = ("sdpa", "flash")  # torch's CPU has the second one, too
    for name in names:
        plan = Plan(name, causal=True)
        results.append(KERNELS[name](q, k, v, plan, attention, None))
    torch.testing.assert_close(*results)
    with pytest.raises(RuntimeError, match=r"No (available kernel|viable backend)"):
        KERNELS["cudnn"](q, k, v, Plan("cudnn", causal=True), attention, None)


def _two_ranks(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    d = Degrees(dp=2)
    ranks = Ranks(rank, 2, torch.device("cpu"), d, init_device_mesh("cpu", (1, 1, 2, 1), mesh_dim_names=DIMENSIONS))
    compile_: Any = torch.compile
    torch.compile = lambda f, **how: compile_(f, backend="aot_eager", **how)  # type: ignore[assignment, misc]
    full, selective = (parallel.recomputing(HOW[how]) for how in ("full", "selective"))
    _check_gradients(FEATURES["moe_sinks"], ranks, full)
    _check_gradients(FEATURES["gemma2"], ranks, selective)
    _check_gradients(FEATURES["llama"], ranks, selective, parallel.compile_layer)
    _check_offloaded(FEATURES["tied"], ranks)
    dist.destroy_process_group()


def _check_offloaded(spec: Spec, ranks: Ranks) -> None:
    """FSDP's own policy and where parameters and buffers are put; the CPU stands in for the GPU."""
    with torch.device("meta"):
        model = Decoder(spec)
    parallel.shard(model, ranks, "float32", offload=True)
    parallel.allocate(model, torch.device("cpu"), offload=True)
    model.init_weights(0)
    whole = Decoder(spec)
    whole.init_weights(0)
    ids = torch.from_numpy(random_ids(spec))
    model(ids[ranks.rank :][:1], ids[ranks.rank :][:1]).backward()
    whole(ids, ids).backward()
    for (n, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parallel.whole(p.grad), q.grad, rtol=1e-4, atol=1e-5, msg=n)  # type: ignore[arg-type]


def test_two_ranks_recompute_compile_and_offload_as_one_does(tmp_path: Path) -> None:
    mp.spawn(_two_ranks, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]
