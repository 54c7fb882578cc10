"""The weights that forward passes read: those of the optimizer, rounded as they will ship.

The rounding has the gradient of the identity (straight through; Bengio et al. 2013, arXiv 1308.3432). So nothing in the
model changes: for a forward and backward pass the parameters hold codes times scales, and the gradients that they get
are then applied to what they were before. Sharding, compiling, recomputing and accumulation of gradients see ordinary
parameters, and a step rounds each weight once, on the rank that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from convert.levels import CODES, GROUPS
from spec.config import Spec
from train import config, parallel
from train.optim.shares import local
from train.quant.grid import round_to_grid
from train.quant.levels import levels

FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16}


class Quantized:
    """The parameters of a decoder that are rounded, by level."""

    def __init__(self, decoder: nn.Module, c: config.TrainConfig, spec: Spec) -> None:
        self._decoder, self._rounds, self._levels = decoder, c.rounds, levels(c.quant, spec)
        self._kept: dict[str, Tensor] = {}

    @contextmanager
    def weights(self, step: int) -> Iterator[None]:
        """Inside the block, the parameters hold what ships of the weights after `step` steps."""
        if not self._rounds(step):
            yield
            return
        parallel.settle(self._decoder)
        own = {name: local(p) for name, p in self._decoder.named_parameters() if name in self._levels}
        self._keep(own)
        try:
            self._round(own)
            yield
        finally:
            parallel.settle(self._decoder)
            _copy(own.values(), [self._kept[name] for name in own])

    def _keep(self, own: Mapping[str, Tensor]) -> None:
        if self._kept.keys() != own.keys():
            self._kept = {name: torch.empty_like(t) for name, t in own.items()}
        _copy(self._kept.values(), own.values())

    def _round(self, own: Mapping[str, Tensor]) -> None:
        by_level: dict[str, list[Tensor]] = {}
        for name, t in own.items():
            by_level.setdefault(self._levels[name], []).append(t)
        for level, tensors in by_level.items():
            if level in CODES:
                round_to_grid(tensors, CODES[level], GROUPS[level])
            else:
                _copy(tensors, [t.to(FLOATS[level]) for t in tensors])


@torch.no_grad()
def _copy(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    torch._foreach_copy_(list(into), list(values))  # pyright: ignore[reportPrivateImportUsage]
