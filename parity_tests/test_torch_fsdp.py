"""The decoder under FSDP2 on two gloo processes: hooks fire, shards add up, and what must stay float32 is not cast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from backends.torch.checkpoint import save_weights
from backends.torch.model import Decoder
from parity_tests.cases import FEATURES, random_ids
from spec import Spec

NAMES = ("gemma2", "llama", "sinks", "alibi", "moe_sigmoid")
WORLD = 2


def _sharded(spec: Spec, dtype: torch.dtype, seed: int, param_dtype: torch.dtype | None = None) -> Decoder:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, policy = Decoder(spec).to(dtype), MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    policy = policy if param_dtype else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.init_weights(seed)
    return model


def _check_exact(spec: Spec, rank: int, out: Path) -> None:
    """Gradients, initial values, decoding and saving in float64."""
    ids = torch.from_numpy(random_ids(spec))
    whole, model = Decoder(spec).double(), _sharded(spec, torch.float64, 3)
    whole.init_weights(3)
    whole(ids, ids).backward()
    model(ids[rank : rank + 1], ids[rank : rank + 1]).backward()
    for (n, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        if not p.requires_grad:
            continue
        assert p.grad is not None
        torch.testing.assert_close(p.grad.full_tensor() * WORLD, q.grad, rtol=1e-9, atol=1e-10, msg=n)  # type: ignore[attr-defined]
    save_weights(model, out)
    cache = model.eval().new_cache(2)
    steps = torch.cat([model.step(chunk, cache) for chunk in ids.split([9, *[1] * 15], 1)], 1)
    torch.testing.assert_close(steps, whole.eval()(ids), rtol=0, atol=1e-10)


def _check_mixed(spec: Spec) -> None:
    """16-bit compute keeps rotations in float32 and runs the loss and the cache."""
    ids = torch.from_numpy(random_ids(spec))
    model, exact = _sharded(spec, torch.float32, 3, torch.bfloat16), Decoder(spec).double()
    exact.init_weights(3)
    seen: list[tuple[torch.dtype, torch.dtype | None]] = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda _, a: seen.append((a[1].dtype, a[3] and a[3].cos.dtype)))
    total = model(ids, ids)
    total.backward()
    assert total.dtype == torch.float32
    assert abs(total.item() / exact(ids, ids).item() - 1) < 0.01
    rotated = torch.float32 if len(model.rope) else None
    assert seen == [(torch.bfloat16, rotated)] * spec.depth
    cache = model.eval().new_cache(2)
    model.step(ids[:, :9], cache)
    assert cache.length == 9


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    for name in NAMES:
        _check_exact(FEATURES[name], rank, Path(folder) / f"{name}.{rank}.safetensors")
        _check_mixed(FEATURES[name])
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path),), nprocs=WORLD)  # type: ignore[attr-defined]
    for name in NAMES:
        whole = Decoder(FEATURES[name]).double()
        whole.init_weights(3)
        for rank in range(WORLD):
            state = load_file(tmp_path / f"{name}.{rank}.safetensors")
            assert state.keys() == whole.state_dict().keys()
            assert all(torch.equal(state[n], t) for n, t in whole.state_dict().items())
