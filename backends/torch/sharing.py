"""Blocks that n ranks compute together: tensor parallelism with sequence parallelism, and expert parallelism.

Outside of attention and MLP each rank has its T/n tokens and whole weights; inside, all T tokens and its H/n heads or
F/n inner dimensions. The column-parallel linears (q, k, v, gate, up) read gathered tokens, the row-parallel ones (o,
down) scatter their sums (Korthikanti et al. 2022). What is no linear has plain weights, of which a rank uses its part,
so that a gradient is always a sum over the ranks.

Shapes: B batch, T tokens, D model, H q-heads, E experts, N rows, n ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from backends.torch.modules import at_least_float32
from backends.torch.ops import TorchOps
from spec.config import Attention, Norm, QKNorm
from spec.ops import Step


class Share:
    """This rank's part of what the n ranks of a mesh of one dimension compute together."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.rank, self.size = mesh, mesh.get_local_rank(), mesh.size()

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor that all have, cut as `torch.chunk` does: the last may be smaller, or empty."""
        length = x.shape[dim]
        size = -(-length // self.size)
        start = min(self.rank * size, length)
        return x.narrow(dim, start, min(size, length - start))

    def gather(self, x: Tensor, tokens: int) -> DTensor:
        """[B, T/n, D] -> [B, T, D]; its gradient, a sum over the ranks, is scattered back."""
        shape = torch.Size((x.shape[0], tokens, *x.shape[2:]))
        stride = torch.empty(shape, device="meta").stride()
        parts = DTensor.from_local(x.contiguous(), self.mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
        return parts.redistribute(placements=[Replicate()])

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, on each; and so for its gradient."""
        summed = DTensor.from_local(x, self.mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        return summed.to_local(grad_placements=[Partial()])


class _Heads:
    """What attention kernels read of a layer, for this rank's heads."""

    def __init__(self, share: Share, w: Any) -> None:
        self.kind = w.kind
        self.sinks = None if w.sinks is None else share.part(w.sinks, 0)
        self.slopes = None if w.slopes is None else share.part(w.slopes, 0)


class SharedOps(TorchOps):
    """Operations of one forward pass over T tokens that several ranks make together."""

    def __init__(self, share: Share, tokens: int, *options: Any) -> None:
        super().__init__(*options)
        self.share, self.tokens = share, tokens

    def linear(self, x: Tensor, w: Any) -> Tensor:
        return w(self._read(x, w))

    def project(self, x: Tensor, ws: Any) -> list[Tensor]:
        x = self._read(x, ws[0])
        return [w(x) for w in ws]

    def _read(self, x: Tensor, w: Any) -> Tensor:
        return self.share.gather(x, self.tokens) if getattr(w, "gathers", False) else x

    def total(self, x: Tensor) -> Tensor:
        return self.share.total(x)

    def norm(self, x: Tensor, w: Any, norm: Norm) -> Tensor:
        """A norm over the whole width of q or k needs the other ranks' squares."""
        if not (isinstance(norm, QKNorm) and norm.over == "width"):
            return w(x)
        h, share = at_least_float32(x), self.share
        width = x.shape[-1] * share.size
        if not w.rms:
            h = h - share.total(h.sum(-1, keepdim=True)) / width
        h = h * torch.rsqrt(share.total(h.square().sum(-1, keepdim=True)) / width + w.eps)
        if w.weight is not None:
            h = h * (share.part(w.weight, 0).to(h.dtype) + w.offset)
        return (h if w.bias is None else h + share.part(w.bias, 0).to(h.dtype)).to(x.dtype)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, step: Step[Tensor], key_slots: Any, a: Attention, w: Any) -> Tensor:
        return super().mix(q, k, v, step, key_slots, a, _Heads(self.share, w))


class Exchange:
    """Rows travel to the ranks that have their experts, E/n each, and what became of them comes back."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, rows: Tensor, counts: Tensor, compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """rows [N, D] sorted by expert, counts [E] -> [N, D'].

        `compute(rows, counts [E/n], owner)` runs this rank's experts over rows that are sorted by expert.
        """
        n = self.group.size()
        arriving = wait_tensor(all_to_all_single(counts, None, None, self.group)).unflatten(0, (n, -1))
        sent, received = counts.unflatten(0, (n, -1)).sum(1).tolist(), arriving.sum(1).tolist()
        x = all_to_all_single_autograd(rows, received, sent, self.group)
        # rank by rank, and sorted by expert in each
        owner = torch.arange(arriving.shape[1], device=rows.device).repeat(n).repeat_interleave(arriving.flatten())
        order = owner.argsort(stable=True)
        y = compute(x[order], arriving.sum(0), owner[order])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return all_to_all_single_autograd(y[back], sent, received, self.group)
