"""One optimizer out of a library's, or two: groups by role, whole matrices or shards, an average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spec.config import MoE, Spec
from spec.params import Param, params
from train import config
from train.optim.average import Average
from train.optim.kinds import KINDS, Kind, kind
from train.optim.shares import Local, Owned, owners


@dataclass
class Part:
    """A library's optimizer and the parameters that it has, group by group."""

    inner: torch.optim.Optimizer
    groups: list[list[Local]]
    kind: Kind

    @property
    def shares(self) -> Iterator[Local]:
        """All its parameters, in an order that is the same on every rank."""
        return (share for group in self.groups for share in group)


class Optimizer:
    """What the trainer steps."""

    def __init__(self, parts: Sequence[Part], average: Average | None) -> None:
        self.parts, self.average = tuple(parts), average

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The library's groups, with the decoder's own parameters; for reading."""
        return [
            {**inner, "params": [share.parameter for share in group]}
            for part in self.parts
            for inner, group in zip(part.inner.param_groups, part.groups, strict=True)
        ]

    def scale(self, factor: float) -> None:
        """Set every group's learning rate to this share of its peak."""
        for part in self.parts:
            for group in part.inner.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(group["peak"] * factor)
                else:
                    group["lr"] = group["peak"] * factor

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter that has a gradient; every rank takes part."""
        for part in self.parts:
            for share in part.shares:
                share.take()
        for part in self.parts:
            part.inner.step()
        for part in self.parts:
            for share in part.shares:
                share.give()
        if self.average is not None:
            self.average.update()

    @torch.no_grad()
    def begin(self) -> None:
        """Let the library make its state without a step: it works on zeros, and what it had is spoiled."""
        for part in self.parts:
            for share in part.shares:
                share.blank()
            part.inner.step()
            for share in part.shares:
                share.give()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for part in self.parts:
            for share in part.shares:
                share.parameter.grad = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the decoder has the averaged weights, if an average is kept; its own come back bit for bit."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()


def build(decoder: nn.Module, spec: Spec, chosen: config.Optimizer) -> Optimizer:
    """The optimizer of a decoder's parameters, sharded or not; it takes on the learning rate of the peak.

    Raises `MissingDependency` where the optimizer's library is not installed, and `UserError` for a broken file of the
    user's.
    """
    own = {p.name: p for p in params(spec)}
    trained = [(name, p) for name, p in decoder.named_parameters() if p.requires_grad]
    main, rest = kind(chosen), KINDS["adamw"]
    owner = owners((n, p) for n, p in trained if main.whole and (not main.hidden or _hidden(own[n])))
    groups: dict[tuple[bool, float, float], list[Local]] = {}
    for name, p in trained:
        takes = not main.hidden or _hidden(own[name])
        experts = _experts(spec, own[name]) if main.whole and takes else 1
        share = Owned(name, p, owner[name], experts) if name in owner else Local(name, p, experts)
        decay = chosen.weight_decay or 0.0
        key = takes, _peak(chosen, own[name], takes), decay if _decays(chosen, own[name]) else 0.0
        groups.setdefault(key, []).append(share)
    parts = [
        _part(used, {k[1:]: g for k, g in groups.items() if k[0] is takes}, chosen)
        for takes, used in ((True, main), (False, rest))
    ]
    average = None if chosen.ema is None else Average(decoder, chosen.ema)
    return Optimizer([p for p in parts if p is not None], average)


def _part(used: Kind, groups: dict[tuple[float, float], list[Local]], chosen: config.Optimizer) -> Part | None:
    if not groups:
        return None
    asked: list[dict[str, Any]] = [
        {"params": [t for s in shares for t in s.pieces], "lr": lr, "weight_decay": decay, "peak": lr}
        for (lr, decay), shares in groups.items()
    ]
    part = Part(used.make(asked, chosen), list(groups.values()), used)
    for share in part.shares:
        share.give()
    return part


def _hidden(p: Param) -> bool:
    """Whether it is a matrix between the embedding and the head."""
    return p.role in ("linear", "experts") and not p.name.startswith("head.")


def _experts(spec: Spec, p: Param) -> int:
    """How many matrices lie in its rows."""
    if p.role != "experts":
        return 1
    m = spec.layers[int(p.name.split(".")[1])].mlp
    assert isinstance(m, MoE)
    return m.experts


def _decays(o: config.Optimizer, p: Param) -> bool:
    if p.role == "embedding":
        return o.decay_embeddings
    return o.decay_norms if p.role in ("gain", "bias", "sinks") else True


def _peak(o: config.Optimizer, p: Param, takes: bool) -> float:
    if p.role == "embedding" and o.embedding_lr is not None:
        return o.embedding_lr
    return o.peak if takes or o.rest_lr is None else o.rest_lr
