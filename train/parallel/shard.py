"""Weights in shards (FSDP2), and sharded tensors from and to whole ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.parallel.mesh import Ranks
from train.parallel.precision import DTYPES


def shard(decoder: nn.Module, ranks: Ranks, precision: str) -> None:
    """FSDP2: every block is a group, the rest (a tied embedding serves the head too) the root. Gradients are reduced in
    float32 and summed, not averaged: the loss is already divided by the global count of targets."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    assert ranks.mesh is not None, "several ranks"
    mesh = ranks.mesh["replicate", "dp"] if ranks.degrees.replicate > 1 else ranks.mesh["dp"]
    half = None if precision == "float32" else DTYPES[precision]
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    layers: Any = decoder.layers
    for block in layers:
        if block is not None:
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


def settle(decoder: nn.Module) -> None:
    """After a pass without gradients: FSDP leaves the root's weights whole, and those are not what is trained."""
    if hasattr(decoder, "reshard"):
        decoder.reshard()  # type: ignore[operator]


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
