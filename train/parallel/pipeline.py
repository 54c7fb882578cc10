"""A decoder in stages of consecutive layers, each on ranks of its own; torch's schedules order their passes.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from backends.torch.model import Decoder
from spec import cost
from spec.config import Spec
from spec.errors import UserError
from spec.params import params
from train.config import Parallel
from train.parallel.mesh import Ranks


def spans(spec: Spec, stages: int) -> list[range]:
    """The layers of each stage, balanced by multiply-adds a token; the head counts with the last stage.

    Raises `UserError` where a stage would have no layer.
    """
    if stages > spec.depth:
        raise UserError(f"parallel.pp: {stages} stages need as many layers, and depth is {spec.depth} (at most that)")
    if stages > 1 and spec.head.tied:
        raise UserError(
            f"parallel.pp: {stages} stages cannot share the tied embedding of the first with the last "
            "(head: {tied: false} in the spec, or parallel.pp 1)"
        )
    costs = [0.0] * spec.depth
    for p in params(spec):
        if p.name.startswith("layers."):
            costs[int(p.name.split(".")[1])] += p.size * cost.used(spec, p)
    costs[-1] += spec.vocab_size * spec.width
    return _balanced(costs, stages)


def _balanced(costs: Sequence[float], parts: int) -> list[range]:
    """Consecutive, nonempty parts whose largest sum is least (dynamic programming; n is a number of layers)."""
    sums = [0.0]
    for c in costs:
        sums.append(sums[-1] + c)
    n = len(costs)
    best = {(0, 0): (0.0, 0)}
    for k in range(1, parts + 1):
        for stop in range(k, n - (parts - k) + 1):
            best[k, stop] = min(
                (max(best[k - 1, start][0], sums[stop] - sums[start]), start)
                for start in range(k - 1, stop)
                if (k - 1, start) in best
            )
    found, stop = [], n
    for k in range(parts, 0, -1):
        start = best[k, stop][1]
        found.append(range(start, stop))
        stop = start
    return found[::-1]


def check_passes(p: Parallel, passes: int) -> None:
    """Raise `UserError` where a step's A forward passes are too few to fill the pipeline."""
    if p.pp > passes:
        raise UserError(
            f"parallel.pp: {p.pp} stages need at least as many forward passes a step, and there are {passes} "
            "(lower batch.micro, or raise batch.sequences)"
        )


class Stage:
    """One rank's stage of a pipeline: runs whole steps together with the other stages."""

    def __init__(self, decoder: Decoder, ranks: Ranks, schedule: str, dtype: torch.dtype) -> None:
        """`dtype` is that of the residual stream between stages."""
        assert ranks.mesh is not None, "a pipeline has several ranks"
        self._decoder, self._ranks, self._dtype = decoder, ranks, dtype
        self._group = ranks.mesh.get_group("pp")
        self._schedule_name = schedule
        self._schedules: dict[tuple[int, ...], Any] = {}

    def train(self, passes: int, ids: Tensor, scale: float, **more: Any) -> Tensor:
        """Forward and backward over `passes` pieces of ids [A B, T] and of every tensor in `more`.

        Returns this rank's losses' sum times `scale`: zero but on the last stage.
        """
        losses: list[Tensor] = []
        self._scale = scale
        more = {name: t for name, t in more.items() if t is not None}
        schedule = self._schedule(passes, ids)
        target = more["targets"] if self._decoder.ends else None
        schedule.step(*self._inputs(ids), target=target, losses=losses, return_outputs=False, **more)
        return torch.stack(losses).sum() if losses else torch.zeros((), device=ids.device)

    @torch.no_grad()
    def score(self, ids: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """One forward pass through all stages; `forward` is this stage's. Zero but on the last stage."""
        place, stages = self._ranks.place("pp"), self._ranks.degrees.pp
        if self._decoder.begins:
            x = ids
        else:
            x = torch.empty(self._shape(ids), dtype=self._dtype, device=ids.device)
            dist.recv(x, group=self._group, group_src=place - 1)
        y = forward(x)
        if place + 1 == stages:
            return y
        dist.send(y.to(self._dtype).contiguous(), group=self._group, group_dst=place + 1)
        return torch.zeros((), device=ids.device)

    def _inputs(self, ids: Tensor) -> tuple[Tensor, ...]:
        return (ids,) if self._decoder.begins else ()

    def _shape(self, ids: Tensor) -> tuple[int, ...]:
        return ids.shape[0], ids.shape[1] // self._ranks.degrees.tp, self._decoder.spec.width

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output * self._scale  # the head has computed it

    def _schedule(self, passes: int, ids: Tensor) -> Any:
        """The schedule for A passes of these shapes, made once: its buffers have fixed shapes."""
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

        key = (passes, *ids.shape)
        if key not in self._schedules:
            piece = ids[: len(ids) // passes]
            x = torch.empty(self._shape(piece), dtype=self._dtype, device="meta", requires_grad=True)
            loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
            stage = PipelineStage(
                self._decoder,
                self._ranks.place("pp"),
                self._ranks.degrees.pp,
                self._ranks.device,
                input_args=piece.to("meta") if self._decoder.begins else x,
                output_args=loss if self._decoder.ends else x,
                group=self._group,
            )
            kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[self._schedule_name]
            self._schedules[key] = kind(stage, passes, loss_fn=self._loss, scale_grads=False)
        return self._schedules[key]
