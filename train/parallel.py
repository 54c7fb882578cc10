"""Ranks, devices and sharding. One process needs no process group; torchrun starts several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spec.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64 (float32 on devices without it)."""
        if self.world == 1:
            return list(values)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        t = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(t)
        return t.tolist()

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, on every rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU. Raises `UserError` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name} is not there (torch sees {torch.cuda.device_count()} CUDA devices)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device: mps is not there (use cpu)")
    return device


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision, and why."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "the GPU has it"
    return "float32", f"bfloat16 autocast is no clear gain on {device.type}; ask for it with --precision bfloat16"


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """The process group of a torchrun launch (NCCL on CUDA, gloo elsewhere), or this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(0, 1, choose_device(device))
        return
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, chosen)
        dist.barrier()  # gloo may abort a rank whose peer has left while its own threads still end
    finally:
        dist.destroy_process_group()


def shard(decoder: nn.Module, ranks: Ranks, precision: str) -> None:
    """FSDP2: every block is a group, the rest (a tied embedding serves the head too) the root. Gradients are reduced in
    float32 and summed, not averaged: the loss is already divided by the global count of targets."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    half = None if precision == "float32" else DTYPES[precision]
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    layers: Any = decoder.layers
    for block in layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(decoder, mesh=mesh, mp_policy=policy)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum


def accumulating(decoder: nn.Module, last: bool) -> None:
    """Reduce gradients over the ranks only with the last forward pass of a step."""
    if hasattr(decoder, "set_requires_gradient_sync"):
        decoder.set_requires_gradient_sync(last)  # type: ignore[operator]


def autocast(ranks: Ranks, precision: str) -> Any:
    """Autocast for one process; FSDP casts by its own policy."""
    if precision == "float32" or ranks.world > 1:
        return nullcontext()
    return torch.autocast(ranks.device.type, DTYPES[precision])


def whole(t: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded, on the CPU. Every rank must take part."""
    t = t.detach()
    full = getattr(t, "full_tensor", None)
    return (full() if full is not None else t).cpu()


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """`values` where and as `parameter` is: on its device, and sharded as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    values = values.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return values.clone()
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
