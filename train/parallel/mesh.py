"""Ranks and their mesh. One process needs no process group; torchrun and Slurm start several."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from spec.errors import UserError
from train.config import Parallel
from train.parallel.device import BACKENDS, choose_device
from train.parallel.meeting import fresh_store

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PATIENCE = timedelta(days=7)
"""How long ranks wait for one that does something alone: fetches, tokenises, exports. One that died is noticed."""

DIMENSIONS = ("pp", "replicate", "dp", "tp")
"""The mesh, outermost first: neighbours share a layer, and pipeline stages talk least."""


@dataclass(frozen=True)
class Degrees:
    """Ranks along each dimension of the mesh."""

    pp: int = 1
    replicate: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1
    """Of the dp x tp ranks, those that divide a layer's experts; no dimension of its own."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.replicate * self.dp * self.tp

    @property
    def data(self) -> int:
        """Ranks that see different sequences."""
        return self.replicate * self.dp

    @property
    def readers(self) -> int:
        """Ranks that see the same ones."""
        return self.pp * self.tp


def degrees(p: Parallel, world: int) -> Degrees:
    """The degrees of a run on `world` ranks. Raises `UserError` where their product is another number."""
    rest = p.replicate * p.tp * p.pp
    found = Degrees(p.pp, p.replicate, p.dp or max(1, world // rest), p.tp, p.ep)
    if found.world != world:
        named = f"replicate {p.replicate} x dp {found.dp} x tp {p.tp} x pp {p.pp} = {found.world}"
        fix = f"parallel.dp {world // rest}, or " if world % rest == 0 else ""
        raise UserError(
            f"parallel: {named} rank(s), and there are {world} ({fix}torchrun --nproc-per-node {found.world})"
        )
    if (found.dp * found.tp) % p.ep:
        fix = " or ".join(str(n) for n in near_divisors(found.dp * found.tp, p.ep))
        raise UserError(f"parallel.ep: {p.ep} does not divide dp x tp = {found.dp} x {found.tp} (try {fix})")
    return found


def near_divisors(n: int, wanted: int) -> list[int]:
    """The divisors of n next to `wanted`, one on each side where there are."""
    all_of_them = [d for d in range(1, n + 1) if n % d == 0]
    below, above = [d for d in all_of_them if d < wanted], [d for d in all_of_them if d > wanted]
    return below[-1:] + above[:1]


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    world: int
    device: torch.device
    degrees: Degrees = Degrees()
    mesh: DeviceMesh | None = None
    """All of `DIMENSIONS`, those of one rank too; none for a single process."""
    control: Any = None
    """A patient gloo group of all ranks, for objects and for work beside the training."""

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def place(self, dimension: str) -> int:
        """This rank's coordinate along one dimension of the mesh."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(dimension)

    @property
    def data(self) -> int:
        """Which share of each batch this rank sees, of `degrees.data`."""
        return self.place("replicate") * self.degrees.dp + self.place("dp")

    def flat(self, ep: int) -> DeviceMesh:
        """A mesh with dp x tp in one dimension, `shard`, of which `ep` neighbours stand apart in another, `ep`.

        Every rank must take part.
        """
        from torch.distributed.device_mesh import init_device_mesh

        d, names = self.degrees, ("pp", "replicate", "shard", "ep")
        return init_device_mesh(self.device.type, (d.pp, d.replicate, d.dp * d.tp // ep, ep), mesh_dim_names=names)

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
        dist.all_gather_object(out, value, group=self.control)
        return out

    def agree(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        return self.gather(value if self.first else None)[0]


def world_size() -> int:
    """Ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def ranks(device: str, parallel: Parallel, *, grouped: bool = False) -> Iterator[Ranks]:
    """The process group of a torchrun launch (NCCL on CUDA, gloo elsewhere), or this process alone; `grouped` makes a
    group of one rank, too."""
    world = world_size()
    found = degrees(parallel, world)
    chosen = choose_device(device)
    if world == 1 and not grouped:
        yield Ranks(0, 1, chosen)
        return
    if chosen.type in BACKENDS:
        chosen = torch.device(chosen.type, int(os.environ.get("LOCAL_RANK", chosen.index or 0)))
        torch.accelerator.set_device_index(chosen.index)
    backend = f"cpu:gloo,{chosen.type}:{BACKENDS[chosen.type]}" if chosen.type in BACKENDS else "gloo"
    if world > 1 and (store := fresh_store()) is not None:
        dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=world)
    elif world > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    from torch.distributed.device_mesh import init_device_mesh

    shape = tuple(getattr(found, d) for d in DIMENSIONS)
    mesh = init_device_mesh(chosen.type, shape, mesh_dim_names=DIMENSIONS)
    try:
        control: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), world, chosen, found, mesh, control)
        dist.barrier(control)  # gloo may abort a rank whose peer has left while its own threads still end
    finally:
        dist.destroy_process_group()
