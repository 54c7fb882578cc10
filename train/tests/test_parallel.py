"""Divided layers against one process, on gloo: gradients, losses and decoding in float64; and what is planned."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor

from backends.torch.model import Decoder, assign
from parity_tests.cases import FEATURES, random_ids, random_weights
from spec import Spec, SpecError, UserError, parse
from train import config, estimate, parallel, plan
from train.config import Memory, Parallel, TrainConfig
from train.parallel.meeting import fresh_store
from train.parallel.mesh import DIMENSIONS, Degrees, Ranks

BOUND = 1e-9
"""Of a float64 gradient's error, in shares of its norm (and of the largest norm, since some gradients are zero)."""

TENSOR = (
    *("sinks", "alibi", "qk_layernorm", "olmo2", "parallel_shared", "all_bias", "mlp_plain_bias", "window_pattern"),
    *("gpt2", "gemma2", "moe_shared_gate"),
)
MIXTURES = ("moe_sigmoid", "moe_sinks", "moe_plain_scores")
FOUR = {
    Degrees(dp=2, tp=2): ("qk_norm_width", "moe_sinks", "uneven"),
    Degrees(dp=4): ("moe_sigmoid",),
    Degrees(replicate=2, dp=2): ("gemma2",),
    Degrees(replicate=2, tp=2): ("moe_shared_gate",),
    Degrees(dp=2, tp=2, ep=2): ("moe_sigmoid", "moe_sinks"),
    Degrees(dp=4, ep=2): ("moe_plain_scores",),
    Degrees(dp=2, tp=2, ep=4): ("moe_sinks",),
    Degrees(replicate=2, dp=2, ep=2): ("moe_sigmoid",),
}


def _spec(name: str) -> Spec:
    if name != "uneven":
        return FEATURES[name]
    sizes = {"vocab_size": 97, "width": 30, "depth": 1, "context": 48}  # 5 rows of an MLP on each of 2 ranks
    bias = {"gate": True, "up": True, "down": True}
    block = {"attention": {"heads": 2, "head_dim": 6, "bias": True}, "mlp": {"hidden": 10, "bias": bias}}
    return parse({**sizes, "block": block})


def _ranks(d: Degrees) -> Ranks:
    from torch.distributed.device_mesh import init_device_mesh

    shape = tuple(getattr(d, name) for name in DIMENSIONS)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=DIMENSIONS)
    return Ranks(dist.get_rank(), d.world, torch.device("cpu"), d, mesh)


def _whole(spec: Spec) -> Decoder:
    model = Decoder(spec).double()
    model.load_state_dict({name: torch.from_numpy(w) for name, w in random_weights(spec).items()})
    return model


def _divided(spec: Spec, ranks: Ranks, *wraps: Any) -> Decoder:
    with torch.device("meta"):
        model = Decoder(spec).double()
    parallel.shard(model, ranks, "float32", wraps)
    model.to_empty(device="cpu")
    weights = {name: torch.from_numpy(w).double() for name, w in random_weights(spec).items()}
    for name, p in model.named_parameters():
        assign(p, weights[name])
    return model


def _check_gradients(spec: Spec, ranks: Ranks, *wraps: Any) -> None:
    """Those of the summed loss over four rows, in two accumulated passes."""
    whole, model = _whole(spec), _divided(spec, ranks, *wraps)
    ids = torch.from_numpy(random_ids(spec, batch=8))
    targets = ids.roll(-1, 1).masked_fill(ids % 5 == 0, -100)
    segments = (ids % 7 == 0).cumsum(1)
    exact = whole(ids, targets, segments=segments)
    exact.backward()
    loss = torch.zeros((), dtype=torch.float64)
    shares = [torch.arange(8).view(2, ranks.degrees.data, -1)[n, ranks.data] for n in (0, 1)]
    for n, mine in enumerate(shares):
        parallel.accumulating(model, last=n == 1)
        part = model(ids[mine], targets[mine], segments=segments[mine])
        part.backward()
        loss += part.detach()
        if ranks.degrees.replicate == 1:
            assert all(isinstance(p.grad, DTensor) for p in model.parameters() if p.requires_grad)
    dist.all_reduce(loss)
    assert abs(loss.item() / exact.item() - 1) < 1e-12
    largest = max(float(p.grad.norm()) for p in whole.parameters() if p.grad is not None)
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parallel.whole(p), q), name
        if q.grad is None:
            assert p.grad is None, name
            continue
        assert p.grad is not None, name
        error = float((parallel.whole(p.grad) - q.grad).norm())
        assert error < BOUND * max(float(q.grad.norm()), 1e-6 * largest), name


def _check_decoding(spec: Spec, ranks: Ranks) -> None:
    """Whatever the number of tokens: all of them, an odd number, one at a time."""
    whole, model = _whole(spec).eval(), _divided(spec, ranks).eval()
    ids = torch.from_numpy(random_ids(spec))
    with torch.no_grad():
        exact, cache = whole(ids), model.new_cache(2)
        torch.testing.assert_close(model(ids), exact, rtol=0, atol=1e-10)
        torch.testing.assert_close(model(ids[:, :23]), exact[:, :23], rtol=0, atol=1e-10)
        steps = torch.cat([model.step(chunk, cache) for chunk in ids.split([9, *[1] * 15], 1)], 1)
        torch.testing.assert_close(steps, exact, rtol=0, atol=1e-10)


def _check_traffic(ranks: Ranks) -> None:
    """A layer gathers its tokens twice each way, and scatters its sums twice each way: q, k and v share one gather."""
    from torch.distributed.tensor.debug import CommDebugMode

    spec = FEATURES["llama"]
    model, ids = _divided(spec, ranks), torch.from_numpy(random_ids(spec))
    with CommDebugMode() as forward:
        loss = model(ids, ids)
    with CommDebugMode() as backward:
        loss.backward()
    ops: Any = torch.ops.c10d_functional
    for comms in (forward, backward):
        counts = comms.get_comm_counts()
        assert counts[ops.all_gather_into_tensor] == counts[ops.reduce_scatter_tensor] == 2 * spec.depth


def _check_memory(spec: Spec, ranks: Ranks) -> None:
    """Nobody has more than a share of the weights, which the plan knows exactly."""
    model = _divided(spec, ranks)
    own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert own < 1.1 * total / (ranks.world // ranks.degrees.replicate) + 64
    most = torch.tensor(own)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    plan = estimate.stage(TrainConfig(), spec, ranks.degrees, range(spec.depth), 0, 4, "cpu")
    assert plan.parameters == most


def _tensor_ranks(rank: int, folder: str) -> None:
    _begin(rank, 2, folder)
    ranks = _ranks(Degrees(tp=2))
    for name in TENSOR:
        _check_gradients(_spec(name), ranks)
    for name in ("sinks", "qk_norm_width", "learned_offset", "window_pattern", "moe_sinks"):
        _check_decoding(_spec(name), ranks)
    _check_gradients(_spec("all_bias"), ranks, parallel.recomputing(Memory(checkpointing="full")))
    _check_gradients(_spec("sinks"), ranks, parallel.recomputing(Memory(checkpointing="selective")))
    _check_traffic(ranks)
    experts = _ranks(Degrees(tp=2, ep=2))
    for name in MIXTURES:
        _check_gradients(_spec(name), experts)
    _check_decoding(_spec("moe_sinks"), experts)
    _check_gradients(_spec("moe_sinks"), experts, parallel.recomputing(Memory(checkpointing="full")))
    dist.destroy_process_group()


def _all_features(rank: int, folder: str) -> None:
    _begin(rank, 2, folder)
    ranks = _ranks(Degrees(tp=2))
    for spec in FEATURES.values():
        with suppress(SpecError):
            parallel.check(spec, ranks.degrees, 24)
            _check_gradients(spec, ranks)
            _check_decoding(spec, ranks)
    dist.destroy_process_group()


def _four_ranks(rank: int, folder: str) -> None:
    _begin(rank, 4, folder)
    for d, names in FOUR.items():
        ranks = _ranks(d)
        for name in names:
            _check_gradients(_spec(name), ranks)
    for d in (Degrees(dp=2, tp=2), Degrees(dp=2, tp=2, ep=2), Degrees(replicate=2, dp=2)):
        ranks = _ranks(d)
        for name in ("moe_sinks", *(("uneven", "gpt2") if d.ep == 1 else ())):
            _check_memory(_spec(name), ranks)
    dist.destroy_process_group()


def _compiled_ranks(rank: int, folder: str) -> None:
    _begin(rank, 2, folder)

    def compile_(block: Any) -> None:
        block.compile(fullgraph=True, backend="aot_eager")

    ranks = _ranks(Degrees(tp=2))
    for name in ("sinks", "qk_norm_width", "alibi", "mlp_plain_bias", "moe_sigmoid"):
        torch._dynamo.reset()  # type: ignore[attr-defined]
        _check_gradients(_spec(name), ranks, compile_)
    dist.destroy_process_group()


def _begin(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)


def _spawn(ranks: Any, world: int, folder: Path) -> None:
    mp.spawn(ranks, (str(folder),), nprocs=world)  # type: ignore[attr-defined]


def test_two_ranks_that_share_layers_or_experts_compute_what_one_does(tmp_path: Path) -> None:
    _spawn(_tensor_ranks, 2, tmp_path)


def test_four_ranks_in_every_layout_compute_what_one_does(tmp_path: Path) -> None:
    _spawn(_four_ranks, 4, tmp_path)


def _meet(rank: int, port: int) -> None:
    started = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in {**started, "TORCHELASTIC_MAX_RESTARTS": 1}.items()})
    store = fresh_store()
    assert isinstance(store, TCPStore)
    assert store.port != port
    store.set(f"rank {rank}", "came")
    assert store.get(f"rank {1 - rank}") == b"came"
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < 2:
        time.sleep(0.01)


def test_ranks_that_are_started_again_do_not_read_what_others_wrote_before_them() -> None:
    shared = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared.set("meeting/1", "a word of one that is gone")
    mp.spawn(_meet, (shared.port,), nprocs=2)  # type: ignore[attr-defined]
    assert shared.check(["meeting/1"])


@pytest.mark.slow
def test_layers_of_every_feature_are_shared(tmp_path: Path) -> None:
    _spawn(_all_features, 2, tmp_path)


@pytest.mark.slow
def test_shared_layers_compile_into_one_graph(tmp_path: Path) -> None:
    _spawn(_compiled_ranks, 2, tmp_path)


@pytest.mark.parametrize(
    ("name", "d", "length", "message"),
    [
        ("llama", Degrees(tp=4), 48, "parallel.tp: 4 does not divide attention.kv_heads=2 (try 2)"),
        ("odd_heads", Degrees(tp=2), 48, "parallel.tp: 2 does not divide attention.kv_heads=3 (use parallel.tp 1, or"),
        ("llama", Degrees(tp=2), 47, "parallel.tp: 2 does not divide sequences of data.length=47"),
        ("llama", Degrees(), 4800, "data.length: 4800 is beyond the spec's context="),
        ("mha", Degrees(tp=3), 48, "parallel.tp: 3 does not divide attention.heads=4 (try 2 or 4)"),
        ("moe_sigmoid", Degrees(tp=4), 48, "parallel.tp: 4 does not divide attention.kv_heads=2"),
        ("moe_sigmoid", Degrees(dp=4, ep=4), 48, "parallel.ep: 4 does not divide mlp.experts=6 (try 2)"),
        ("llama", Degrees(dp=2, ep=2), 48, "parallel.ep: 2 divides experts, and the spec has none"),
    ],
)
def test_what_a_degree_cannot_divide_is_named(name: str, d: Degrees, length: int, message: str) -> None:
    with pytest.raises(SpecError) as e:
        parallel.check(FEATURES[name], d, length)
    assert message in str(e.value)
    assert len(set(str(e.value).splitlines())) == len(str(e.value).splitlines())


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        ({"dp": 4, "tp": 2}, 4, "dp 4 x tp 2 x pp 1 = 8 rank(s), and there are 4 (parallel.dp 2, or torchrun"),
        ({"tp": 3}, 4, "= 3 rank(s), and there are 4 (torchrun --nproc-per-node 3)"),
        ({"tp": 2}, 1, "= 2 rank(s), and there are 1 (torchrun --nproc-per-node 2)"),
        ({"tp": 2, "ep": 3}, 4, "parallel.ep: 3 does not divide dp x tp = 2 x 2 (try 2 or 4)"),
    ],
)
def test_a_product_of_degrees_that_is_not_the_number_of_ranks_is_named(
    fields: dict[str, int], world: int, message: str
) -> None:
    with pytest.raises(UserError) as e:
        parallel.degrees(Parallel.model_validate(fields), world)
    assert message in str(e.value)


def _config(**fields: Any) -> TrainConfig:
    return config.layered({"spec": "tiny", "device": "cpu", **fields})


def test_the_plan_names_everything_that_would_stop_the_run() -> None:
    with pytest.raises(UserError) as e:
        plan.make(_config(parallel={"tp": 8, "dp": 3, "pp": 3}, batch={"sequences": 4}), force=True)
    text = str(e.value)
    for start in (
        "parallel.tp: 8 does not divide",
        "batch.sequences: 4 does not divide evenly",
        "parallel.pp: 3 stages",
    ):
        assert any(line.startswith(start) for line in text.splitlines()), start


def test_the_plan_of_more_ranks_has_less_of_everything_on_each() -> None:
    one = plan.make(_config(batch={"sequences": 16}), force=True).stages[0]
    many = plan.make(_config(batch={"sequences": 16}, parallel={"dp": 4, "tp": 2}), force=True)
    assert many.degrees.world == 8
    stage = many.stages[0]
    for name in ("weights", "gradients", "moments"):
        assert getattr(stage, name) < 1.1 * getattr(one, name) / 8
    assert stage.flops == pytest.approx(one.flops / 8)
    assert stage.activations < one.activations / 4
    assert not one.traffic
    assert set(stage.traffic) == {"fsdp gather", "fsdp reduce", "tp"}


def test_the_plan_of_a_pipeline_has_a_stage_each_and_its_idle_share() -> None:
    spec = {"batch": {"sequences": 8, "micro": 1}, "parallel": {"pp": 2}}
    found = plan.make(_config(spec="mistral-7b", **spec), force=True)
    whole = plan.make(_config(spec="mistral-7b", batch={"sequences": 8, "micro": 1}), force=True)
    assert [s.layers.start for s in found.stages] == [0, found.stages[1].layers.start]
    assert found.bubble == pytest.approx(1 / 9)
    assert sum(s.parameters for s in found.stages) == whole.stages[0].parameters
    assert sum(s.flops for s in found.stages) == pytest.approx(whole.stages[0].flops)


def test_the_plan_is_plain_data_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from train.cli import app

    text = tmp_path / "text.txt"
    text.write_text("a few words\n" * 50, encoding="utf-8")
    flags = ["--check", "--json", "--ranks", "4", "--parallel.tp", "2", "--data", str(text), "--batch.sequences", "4"]
    with pytest.raises(SystemExit) as e:
        app(flags)
    assert e.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["degrees"] == {"pp": 1, "replicate": 1, "dp": 2, "tp": 2, "ep": 1}
    assert found["stages"][0]["weights"] == 4 * found["stages"][0]["parameters"]
    assert any("tp 2" in how for how in found["placements"].values())
