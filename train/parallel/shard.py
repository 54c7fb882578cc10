"""Weights in shards: layers divided among ranks, then FSDP2; and sharded tensors from and to whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backends.torch.model import Decoder
from backends.torch.modules import Block, Router
from train.parallel.mesh import Ranks
from train.parallel.precision import DTYPES
from train.parallel.tensor import blocks, expert_parallel, tensor_parallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor, Placement


def policy(precision: str, stored: torch.dtype) -> MixedPrecisionPolicy:
    """In which numbers FSDP gathers weights and reduces gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    half = None if DTYPES[precision] == torch.float32 else DTYPES[precision]
    return MixedPrecisionPolicy(half, reduce_dtype=stored if stored == torch.float64 else torch.float32)


def shard(
    decoder: Decoder,
    ranks: Ranks,
    precision: str,
    wraps: Iterable[Callable[[Block], None]] = (),
    *,
    offload: bool = False,
) -> None:
    """Divide a decoder, or a pipeline's stage of one, among the ranks; on the meta device no rank ever has it whole.
    A process without a group has it whole.

    Tensor and expert parallelism first, then what `wraps` do to each block (checkpointing, compiling), then FSDP2:
    every block is a group, the rest (a tied embedding serves the head too) the root. Gradients are summed, not
    averaged: the loss is already divided by the global count of targets.

    Weights that several ranks divide among them are sharded over `dp`. All others are sharded over dp x tp, whose
    ranks have different tokens. Routers' corrections every rank has whole, in float32: small updates would vanish in
    the 16 bits that FSDP gathers.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

    if ranks.mesh is None:
        for block in blocks(decoder):
            for wrap in wraps:
                wrap(block)
        return
    d = ranks.degrees
    if d.tp > 1:
        tensor_parallel(decoder, ranks.mesh["tp"])
    mesh = _data_mesh(ranks.mesh, "dp", d.replicate)
    whole_mesh, placement = mesh, None
    if d.tp > 1 or d.ep > 1:
        whole_mesh, placement = _divide_experts(decoder, ranks, mesh)
    for block in blocks(decoder):
        for wrap in wraps:
            wrap(block)
    corrections = [m.correction for m in decoder.modules() if isinstance(m, Router)]
    options: Any = {"mp_policy": policy(precision, next(decoder.parameters()).dtype)}
    options["ignored_params"] = {p for p in corrections if p is not None}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type != "cpu")
    for block in blocks(decoder):
        fully_shard(block, mesh=mesh, shard_placement_fn=placement, **options)
    fully_shard(decoder, mesh=whole_mesh, **options)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum


def _data_mesh(mesh: DeviceMesh, shards: str, copies: int) -> DeviceMesh:
    return mesh["replicate", shards] if copies > 1 else mesh[shards]


def _divide_experts(
    decoder: Decoder, ranks: Ranks, mesh: DeviceMesh
) -> tuple[DeviceMesh, Callable[[nn.Parameter], Any]]:
    """The mesh of dp x tp, and over which mesh FSDP shards a parameter of a block; divides experts where asked."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    from torch.distributed.tensor import DTensor

    d = ranks.degrees

    def info(mesh: DeviceMesh) -> FSDPMeshInfo:
        if mesh.ndim == 1:
            return FSDPMeshInfo(mesh, shard_mesh_dim=0)
        return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)

    whole_mesh = mesh if d.tp == 1 else _data_mesh(ranks.flat(1), "shard", d.replicate)
    by_mesh = {(): info(whole_mesh), ("tp",): None}
    if d.ep > 1:
        flat = ranks.flat(d.ep)
        expert_parallel(decoder, flat["ep"])
        by_mesh["ep",] = info(_data_mesh(flat, "shard", d.replicate))

    def placement(p: nn.Parameter) -> ShardPlacementResult | None:
        divided = p.device_mesh.mesh_dim_names if isinstance(p, DTensor) else ()
        found = by_mesh[divided or ()]
        return None if found is None else ShardPlacementResult(None, found)

    return whole_mesh, placement


def allocate(decoder: nn.Module, device: torch.device, *, offload: bool = False) -> None:
    """Memory for a decoder that was built on the meta device: on `device`, with `offload` only what FSDP does not
    move there itself."""
    from torch.distributed.tensor import DTensor

    decoder.to_empty(device="cpu" if offload else device)
    if offload:
        for module in decoder.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
            for p in module.parameters(recurse=False):
                if not isinstance(p, DTensor):
                    p.data = p.data.to(device)


def accumulating(decoder: nn.Module, last: bool) -> None:
    """Between copies of the shards (HSDP), sum gradients only with the last pass of a step. To shards they are reduced
    with each: no rank ever has them whole."""
    if hasattr(decoder, "set_requires_all_reduce"):
        decoder.set_requires_all_reduce(last)  # type: ignore[operator]


def settle(decoder: nn.Module) -> None:
    """After a pass without gradients: FSDP leaves the root's weights whole, and those are not what is trained."""
    if hasattr(decoder, "reshard"):
        decoder.reshard()  # type: ignore[operator]


def whole(t: Tensor) -> Tensor:
    """A tensor, gathered on its mesh's device if it is sharded; every rank of the mesh takes part."""
    from torch.distributed.tensor import DTensor

    t = t.detach()
    if not isinstance(t, DTensor):
        return t
    here, kind = t.to_local(), t.device_mesh.device_type
    if here.device.type != kind:  # offloaded
        t = from_parts(here.to(kind), t.device_mesh, t.placements, t.shape)
    return t.full_tensor()


def from_parts(t: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """A tensor of this whole shape, of which each rank gives its part; nothing is sent."""
    from torch.distributed.tensor import DTensor

    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(t, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
