"""What a router is trained for beside the model's loss, and what it is watched by.

Its losses are computed where it routes and their gradients join there, so that checkpointed, compiled, sharded and
staged blocks need to know nothing of them. What is counted travels as the gradient of a leaf: it adds up over forward
passes as gradients do, and a block that is computed again for its backward pass counts once.

Shapes: B rows, T tokens, E experts, k chosen ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.torch.loss import IGNORE

MORE = 3
"""Sums behind the E loads in a router's statistics: entropy, balance loss, z-loss."""


class Balance:
    """The weights of a router's losses, and `scale`: what the model's summed loss is multiplied by, too. A decoder's
    attribute `balance`, where the trainer puts one."""

    def __init__(self, balance: float, z: float, device: torch.device) -> None:
        self.balance, self.z = balance, z
        self.scale = torch.zeros((), device=device)

    def of(self, targets: Tensor, segments: Tensor | None, part: Callable[[Tensor], Tensor]) -> Routed:
        """For one forward pass with targets and segments [B, T]; `part` cuts out the tokens that this rank routes."""
        units = None
        if segments is not None:
            units = torch.zeros_like(segments)
            units[:, 1:] = (segments[:, 1:] != segments[:, :-1]).cumsum(1)
            units = part(units)
        return Routed(self, part(targets) != IGNORE, units, targets.shape[1])


class Routed:
    """The tokens of one forward pass (no dataclass: FSDP takes those apart).

    counted [B, T] bool: tokens that have a target. units [B, T]: the number of each token's document in its row, below
    `most`; none where a row is one.
    """

    def __init__(self, balance: Balance, counted: Tensor, units: Tensor | None, most: int) -> None:
        self.balance, self.counted, self.units, self.most = balance, counted, units, most

    def __call__(
        self, weights: Tensor, logits: Tensor, scores: Tensor, chosen: Tensor, leaf: Tensor, total: Any
    ) -> Tensor:
        """The weights [B, T, k] as they are; backward, the router's losses join the gradient of its logits [B, T, E].

        Of a document's n tokens and their k n choices, a share f_e falls on expert e; s are the scores made to sum to
        1. Its balance loss is E sum_e f_e (1/n) sum_t s_te: 1 where all are equal (Switch Transformer, Fedus et al.
        2021; DeepSeek-V3, eq. 17-20). It is weighted by n, so that the sum over documents, divided by all tokens,
        depends neither on how they are packed nor on accumulation nor on ranks. The z-loss is the sum over tokens of
        logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022). `total` sums over ranks that share a row.
        """
        b = self.balance
        mask = self.counted[..., None].to(scores.dtype)
        shares = scores / scores.sum(-1, keepdim=True)
        picked = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * mask
        balance = scores.shape[-1] * (shares * mask * self._fractions(picked, total)).sum()
        z = (logits.logsumexp(-1, keepdim=True).square() * mask).sum()
        with torch.no_grad():
            entropy = (torch.special.entr(shares) * mask).sum()
            statistics = torch.cat([picked.sum((0, 1)), torch.stack([entropy, balance, z])]).to(leaf.dtype)
        return _Join.apply(weights, b.balance * balance + b.z * z, leaf, statistics, b.scale)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _fractions(self, picked: Tensor, total: Any) -> Tensor:
        """f_e of each token's document: [B, 1, E] where a row is one, else [B, T, E]."""
        if self.units is None:
            loads = total(picked.sum(1, keepdim=True))
        else:
            units = self.units[..., None].expand_as(picked)
            rows = picked.new_zeros(picked.shape[0], self.most, picked.shape[-1])
            loads = total(rows.scatter_add(1, units, picked)).gather(1, units)
        return loads / loads.sum(-1, keepdim=True).clamp(min=1)


class _Join(torch.autograd.Function):
    """The first argument; backward, a loss joins with the gradient `scale`, and a leaf receives `statistics`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, leaf: Tensor, statistics: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(statistics, scale.to(loss.dtype))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        statistics, scale = ctx.saved_tensors
        return grad, scale, statistics, None, None
