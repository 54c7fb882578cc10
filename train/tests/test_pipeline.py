"""A pipeline's stages compute what one process does: losses, gradients, their norm, scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from backends.torch.model import Decoder
from parity_tests.cases import FEATURES
from spec import Spec
from spec.errors import UserError
from spec.load import load as load_spec
from train.config import Parallel
from train.data.batches import Rows
from train.engine import Pipelined, Whole
from train.parallel import Degrees, Ranks, Stage, check_passes, shard, spans
from train.parallel.mesh import DIMENSIONS

SCALE = 1 / 100


def untied(name: str) -> Spec:
    """A feature's spec whose head has its own weight, which a pipeline needs."""
    spec = FEATURES[name]
    return spec.model_copy(update={"head": spec.head.model_copy(update={"tied": False})})


def rows(ids: Tensor, packed: bool) -> Rows:
    """Sequences [B, T + 1]; packed ones hold two documents."""
    segments = (torch.arange(ids.shape[1] - 1) >= 9).long().expand(len(ids), -1).contiguous().numpy()
    return Rows(ids[:, :-1].contiguous().numpy(), ids[:, 1:].contiguous().numpy(), segments if packed else None)


def _check(name: str, rank: int, degrees: Degrees, schedule: str, packed: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    spec, device = untied(name), torch.device("cpu")
    mesh = init_device_mesh("cpu", (degrees.pp, 1, degrees.dp, 1), mesh_dim_names=DIMENSIONS)
    ranks = Ranks(rank, degrees.world, device, degrees, mesh)
    whole, model = Decoder(spec), Decoder(spec)
    for m in (whole, model):
        m.init_weights(3)
        m.double().train()
    model.keep(spans(spec, degrees.pp)[ranks.place("pp")])
    shard(model, ranks, "float32")
    alone = Whole(whole, Ranks(0, 1, device), "float32")
    stage = Pipelined(model, ranks, Stage(model, ranks, schedule, torch.float64))
    for step in range(2):  # a schedule's buffers serve the next step too
        ids = torch.randint(0, spec.vocab_size, (8, 25), generator=torch.Generator().manual_seed(step))
        mine = ids[ranks.data :: degrees.data]
        expected = alone.backward([rows(ids, packed)], SCALE).double()
        loss = stage.backward([rows(part, packed) for part in mine.split(2)], SCALE).double()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        score = stage.score(rows(mine, packed)).double()
        dist.all_reduce(score)
        torch.testing.assert_close(score, alone.score(rows(ids, packed)), rtol=1e-12, atol=0)
    own = dict(whole.named_parameters())
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, n
            grad, reference = p.grad.full_tensor(), own[n].grad  # type: ignore[attr-defined]
            assert reference is not None
            # FSDP reduces in float32: one rounding of each rank's gradient and one of the sum
            assert torch.linalg.norm(grad - reference) <= 4 * 2**-24 * torch.linalg.norm(reference) + 1e-12, n


def _rank(rank: int, folder: str, degrees: Degrees, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=degrees.world)
    for n, name in enumerate(names):
        _check(name, rank, degrees, ("1f1b", "gpipe")[n % 2], packed=n % 3 == 1)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("degrees", "names"),
    [
        (Degrees(pp=2), ("gemma2", "alibi", "moe_sigmoid", "sinks", "learned_offset", "qk_norm_width")),
        (Degrees(pp=2, dp=2), ("llama", "sinks")),
    ],
    ids=["pp2", "pp2-fsdp2"],
)
def test_stages_compute_what_one_process_does(degrees: Degrees, names: tuple[str, ...], tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path), degrees, names), nprocs=degrees.world)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 30])
def test_stages_are_balanced_and_cover_every_layer(stages: int) -> None:
    spec = load_spec("llama-3.2-1b" if stages == 1 else "qwen3-30b-a3b")
    found = spans(spec.model_copy(update={"head": spec.head.model_copy(update={"tied": False})}), stages)
    assert [i for s in found for i in s] == list(range(spec.depth))
    assert len(found) == stages
    assert max(map(len, found)) - min(map(len, found[:-1] or found)) <= 1 + spec.depth // 10


def test_a_pipeline_that_cannot_be_is_one_line() -> None:
    with pytest.raises(UserError, match=r"parallel\.pp: 2 stages cannot share the tied embedding"):
        spans(load_spec("tiny"), 2)
    with pytest.raises(UserError, match=r"parallel\.pp: 40 stages need as many layers, and depth is"):
        spans(load_spec("tiny"), 40)
    with pytest.raises(UserError, match=r"parallel\.pp: 4 stages need at least as many forward passes a step"):
        check_passes(Parallel(pp=4), 2)
