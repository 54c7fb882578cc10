"""The global norm of the gradients over all ranks, and what limits them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from train.config import Optimizer
from train.optim.shares import gradient, local
from train.parallel import Ranks


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor], ranks: Ranks) -> Tensor:
    """The 2-norm of all gradients of the whole model, as a scalar on this rank's device.

    Each rank sums the squares of what it has and nobody else counts, whatever mesh a parameter is on, and one sum over
    all ranks joins shards and pipeline stages. Not finite where any gradient is not.
    """
    counted = [g for g in _counted(parameters, ranks) if g.numel()]
    wide = torch.float32 if ranks.device.type == "mps" else torch.float64
    squares = torch.zeros((), dtype=wide, device=ranks.device)
    if counted:
        norms = torch._foreach_norm(counted, 2)  # pyright: ignore[reportPrivateImportUsage]
        squares += torch.stack([n.to(ranks.device, wide) for n in norms]).square().sum()
    if ranks.world > 1:
        dist.all_reduce(squares)
    return squares.sqrt().float()


def _counted(parameters: Iterable[Tensor], ranks: Ranks) -> Iterator[Tensor]:
    """Gradients that this rank counts: of the copies of a shard, and of a mesh, the first one."""
    first = ranks.rank
    if ranks.mesh is not None:
        first = int(ranks.mesh.mesh[ranks.place("pp")].flatten()[0])  # of this stage
    for p in parameters:
        grad = gradient(p)
        if grad is None:
            continue
        if isinstance(grad, DTensor):
            mesh, place = grad.device_mesh, grad.device_mesh.get_coordinate() or []
            copy = any(q.is_replicate() and i for q, i in zip(grad.placements, place, strict=True))
            if not copy and bool((mesh.mesh == first).any()):
                yield grad.to_local()
        elif ranks.rank == first:
            yield grad


@torch.no_grad()
def clip(parameters: Iterable[Tensor], config: Optimizer, norm: Tensor) -> None:
    """Limit the gradients as the configuration says: scaled so that `norm` is at most `clip`, or cut one by one."""
    if config.clip is None:
        return
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    if not grads:
        return
    if config.clip_by == "value":
        torch._foreach_clamp_min_(grads, -config.clip)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_clamp_max_(grads, config.clip)  # pyright: ignore[reportPrivateImportUsage]
        return
    share = (config.clip / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    torch._foreach_mul_(grads, share.to(grads[0].device))  # pyright: ignore[reportPrivateImportUsage]
