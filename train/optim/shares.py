"""A parameter as its optimizer works on it: plain tensors, whatever the mesh.

`Local` is this rank's shard (or all of an unsharded parameter), for optimizers that work element by element. `Owned` is
the whole, on the one rank of the parameter's own mesh that owns it: gradient and weights are gathered there, the
library's optimizer steps there in float32, and the shards go back. Memory moves like the shards': each of n ranks holds
about 1/n of all weights, gradients and moments while it steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from train.parallel.shard import from_parts, whole


def local(t: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    t = t.detach()
    return t.to_local() if isinstance(t, DTensor) else t


def gradient(p: Tensor) -> Tensor | None:
    """A parameter's gradient, sharded as the parameter is (a replicated weight may have partial sums)."""
    grad = p.grad
    if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
        p.grad = grad = grad.redistribute(placements=p.placements)
    return grad


def cut(t: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """This rank's part of a whole tensor that every rank has."""
    replicated = from_parts(t.contiguous(), mesh, [Replicate()] * mesh.ndim, t.shape)
    return replicated.redistribute(placements=placements).to_local()


def as_shard(t: Tensor, p: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A rank's tensor as a part of one that is sharded like `p`, of this whole shape (that of `p`)."""
    return from_parts(t, p.device_mesh, p.placements, shape or p.shape) if isinstance(p, DTensor) else t


def part_of(t: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded like `p`, or whole on every rank."""
    if isinstance(t, DTensor):
        return t.to_local()
    t = t.to(p.device)
    return cut(t, p.device_mesh, p.placements) if isinstance(p, DTensor) and t.dim() else t


class Local:
    """A parameter's part on this rank; of a mixture, where experts are asked for, those of each expert.

    `pieces` are the tensors that the library sees. They are pointed at the parameter's memory before each step, so that
    nobody need care who replaces it.
    """

    def __init__(self, name: str, parameter: nn.Parameter, experts: int = 1) -> None:
        self.name, self.parameter, self.experts = name, parameter, experts
        self.pieces = [nn.Parameter(t) for t in self._cut(local(parameter))]
        for piece in self.pieces if experts == 1 else ():
            piece.whole, piece.columns = parameter.shape, self._columns()  # type: ignore[attr-defined]

    def take(self) -> None:
        """Lend the library the weights and the gradient."""
        grad = gradient(self.parameter)
        if grad is not None:
            self._point(local(self.parameter), local(grad))

    def give(self) -> None:
        """Take them back."""
        for piece, t in zip(self.pieces, self._cut(local(self.parameter)), strict=True):
            piece.data, piece.grad = t, None

    def blank(self) -> None:
        """Lend zeros of the same shape."""
        zeros = torch.zeros_like(local(self.parameter))
        self._point(zeros, torch.zeros_like(zeros))

    def entry(self, values: Sequence[Tensor]) -> Tensor:
        """A state tensor of the pieces as checkpoints have it: sharded as the parameter is, where it has its rows."""
        if len(values) > 1:
            return torch.stack(tuple(values))
        [t], p, here = values, self.parameter, local(self.parameter)
        if not isinstance(p, DTensor) or not t.dim():
            return t
        columns = here.shape[1] // t.shape[1] if here.dim() > 1 else 0  # that share a number, as a scale
        assert t.shape[0] == here.shape[0] and (not columns or t.shape[1] * columns == here.shape[1]), self.name
        return as_shard(t, p, (p.shape[0], p.shape[1] // columns) if columns else p.shape)

    def parts(self, t: Tensor, count: int) -> Sequence[Tensor]:
        """The `count` tensors of an entry, which may also be whole on every rank."""
        return t.unbind() if count > 1 else [part_of(t, self.parameter)]

    def _columns(self) -> int:
        """The width of a rank's part of a row; 1 where the ranks' differ."""
        p = self.parameter
        if not isinstance(p, DTensor):
            return p.shape[-1]
        ways = prod(p.device_mesh.size(i) for i, q in enumerate(p.placements) if q.is_shard(1))
        return 1 if p.shape[-1] % ways else p.shape[-1] // ways

    def _cut(self, t: Tensor) -> Sequence[Tensor]:
        return t.chunk(self.experts) if self.experts > 1 else [t]

    def _point(self, values: Tensor, grads: Tensor) -> None:
        for piece, v, g in zip(self.pieces, self._cut(values), self._cut(grads), strict=True):
            piece.data, piece.grad = v, g


class Owned(Local):
    """A whole parameter, on the rank that owns it; the others have no pieces."""

    def __init__(self, name: str, parameter: nn.Parameter, owner: int, experts: int = 1) -> None:
        assert isinstance(parameter, DTensor), "a parameter that ranks share"
        self.name, self.parameter, self.experts = name, parameter, experts
        self.mesh: DeviceMesh = parameter.device_mesh
        self.placements: tuple[Placement, ...] = parameter.placements
        self.owner: list[int] = (self.mesh.mesh == owner).nonzero()[0].tolist()
        self.place = list(self.mesh.get_coordinate() or ())
        self._moves = False
        self._whole: Tensor | None = None
        self.pieces = [nn.Parameter(t) for t in self._cut(self._empty())] if self.mine else []

    @property
    def mine(self) -> bool:
        """Whether this rank owns it."""
        return self.place == self.owner

    def _empty(self) -> Tensor:
        return torch.empty(self.parameter.shape, dtype=self.parameter.dtype, device=self.mesh.device_type)

    def take(self) -> None:
        """Gather weights and gradient on the owner; every rank of the mesh takes part."""
        grad = gradient(self.parameter)
        self._moves = grad is not None
        if grad is None:
            return
        values, grads = whole(self.parameter), whole(grad)
        if self.mine:
            self._whole = values
            self._point(values, grads)

    def give(self) -> None:
        """Send the owner's weights to all ranks, which keep their shards. Dimension after dimension of the mesh, so
        that no groups are needed but the mesh's own."""
        if self._moves:
            values = self._whole if self._whole is not None else self._empty()
            for d in range(self.mesh.ndim):
                if self.mesh.size(d) > 1 and self.place[d + 1 :] == self.owner[d + 1 :]:
                    dist.broadcast(values, group=self.mesh.get_group(d), group_src=self.owner[d])
            local(self.parameter).copy_(cut(values, self.mesh, self.placements))
        self.release()

    def release(self) -> None:
        """Free the whole tensors, once the library has seen its parameters' shapes."""
        self._moves, self._whole = False, None
        for piece in self.pieces:
            piece.data, piece.grad = piece.data.new_empty(0), None

    def blank(self) -> None:
        """Lend zeros of the same shape."""
        if self.mine:
            zeros = torch.zeros_like(self._empty())
            self._point(zeros, torch.zeros_like(zeros))

    def entry(self, values: Sequence[Tensor]) -> Tensor:
        """A state tensor of the pieces as checkpoints have it: whole, on its owner alone."""
        return torch.stack(tuple(values)) if len(values) > 1 else values[0]

    def parts(self, t: Tensor, count: int) -> Sequence[Tensor]:
        """The `count` tensors of an entry."""
        return t.unbind() if count > 1 else [t]


def owners(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """The owner of each sharded parameter by name: the largest first, to the rank of its mesh that has least so far.

    Every rank of a mesh has the same parameters on it, so all come to the same answer without a word.
    """
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    out: dict[str, int] = {}
    for name, p in sorted(parameters, key=lambda item: (-item[1].numel(), item[0])):
        if isinstance(p, DTensor) and p.device_mesh.size() > 1:
            ranks = tuple(p.device_mesh.mesh.flatten().tolist())
            load = loads.setdefault(ranks, dict.fromkeys(ranks, 0))
            owner = out[name] = min(load, key=lambda r: (load[r], r))
            load[owner] += p.numel()
    return out
