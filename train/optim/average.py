"""An exponential moving average of the weights, sharded as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train import parallel
from train.optim.shares import as_shard, local


class Average:
    """`average += (1 - d) (weights - average)` after each step, in float32.

    The decay d of update t is min(decay, (1 + t) / (10 + t)), so that the first weights do not linger (TensorFlow's
    ExponentialMovingAverage with num_updates). The average begins as the weights of the first step.
    """

    def __init__(self, decoder: nn.Module, decay: float) -> None:
        self.decoder, self.decay, self.updates = decoder, decay, 0
        self.values: dict[str, Tensor] = {}

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The decoder's weights on this rank."""
        return {name: local(p) for name, p in self.decoder.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights."""
        weights, self.updates = self.weights, self.updates + 1
        if not self.values:
            self.begin()
            return
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.values.values()), [weights[name].float() for name in self.values], 1 - d)  # pyright: ignore[reportPrivateImportUsage]

    def begin(self) -> None:
        """Start from the weights as they are."""
        self.values = {name: t.float().clone() for name, t in self.weights.items()}

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; nothing where there is none yet."""
        parallel.settle(self.decoder)
        weights = self.weights
        for name, average in self.values.items():
            kept = weights[name].clone()
            weights[name].copy_(average)
            average.copy_(kept)

    def entries(self) -> dict[str, Tensor]:
        """The average by `name/ema`, sharded as the weights, and the count of updates."""
        if not self.values:
            return {}
        own = dict(self.decoder.named_parameters())
        values = {f"{name}/ema": as_shard(t, own[name]) for name, t in self.values.items()}
        return {**values, "ema/updates": torch.tensor(self.updates)}
