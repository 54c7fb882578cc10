"""Rows of a vocabulary by kind: which ones share a Hessian.

Every token has contexts of its own. In the head an error e of its row costs sum_t p_tv (1 - p_tv) (h_t e)^2 / 2, so
that only what enters the head where the token is likely counts for it; and the Fisher information of an embedding's row
is that of the places where the token stands. One Hessian for every row would be too many, one for all too coarse: rows
of the head whose contexts point the same way share one, and each of the most frequent tokens has its own in the
embedding (in both cases drawn a little towards what holds for all).

Shapes: V vocab, D model, K kinds, N rows of activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.calibrate.sizes import HESSIANS, KINDS

ROUNDS = 8
"""Of k-means."""
PRIOR = 256.0
"""Tokens' worth of what holds for all rows that joins each kind of an embedding."""
SHARE = 0.1
"""Share of what holds for all rows in each kind of a head."""


@dataclass(frozen=True, eq=False)
class Kinds:
    """A use of a vocabulary's rows."""

    labels: Tensor
    """[V] int64, the kind of each row."""
    hessians: Tensor
    """[K, D, D] float32, means."""
    uses: Tensor
    """[V] how much use there is of each row, for one token of text."""


def most(width: int) -> int:
    """How many Hessians [D, D] there may be."""
    return max(1, min(KINDS, HESSIANS // (4 * width * width)))


def by_context(sums: Tensor, curvature: Tensor, count: int) -> Tensor:
    """[V] labels: spherical k-means of the rows' mean contexts, sums [V, D] of p (1 - p) h over curvature [V] of
    p (1 - p), less what they have in common; each row counts by its curvature. Deterministic."""
    weights = curvature.clamp_min(1e-12).float()
    centred = F.normalize(sums / weights[:, None] - sums.sum(0) / weights.sum(), dim=1)
    centres = centred[weights.argsort(descending=True, stable=True)[:count]].clone()
    labels = torch.zeros(len(sums), dtype=torch.int64, device=sums.device)
    for _ in range(ROUNDS):
        labels = (centred @ centres.T).argmax(1)
        for k in range(len(centres)):
            mine = labels == k
            if bool(mine.any()):
                centres[k] = F.normalize((centred[mine] * weights[mine, None]).sum(0), dim=0)
    return labels


def by_frequency(counts: Tensor, count: int) -> Tensor:
    """[V] labels: the most frequent tokens alone, and all others together as kind 0."""
    labels = torch.zeros(len(counts), dtype=torch.int64, device=counts.device)
    top = counts.argsort(descending=True, stable=True)[: count - 1]
    labels[top] = torch.arange(1, len(top) + 1, device=counts.device)
    return labels


class Sums:
    """Second moments by kind."""

    def __init__(self, labels: Tensor, width: int) -> None:
        self.labels, self.count = labels, int(labels.max()) + 1
        self.moments = torch.zeros(self.count, width, width, device=labels.device)
        self.weights = torch.zeros(self.count, dtype=torch.float64, device=labels.device)

    def looked_up(self, ids: Tensor, gradients: Tensor) -> None:
        """ids [N], the gradients [N, D] at the rows that were looked up."""
        found = self.labels[ids]
        for k in found.unique().tolist():
            rows = gradients[found == k]
            self.weights[k] += len(rows)
            self.moments[k].addmm_(rows.T, rows)

    def shares(self, p: Tensor) -> Tensor:
        """How much tokens count for each kind of a head's rows [N, K]: sums of p (1 - p) of probabilities p [N, V]."""
        return (p * (1 - p)) @ F.one_hot(self.labels, self.count).to(p.dtype)

    def answered(self, shares: Tensor, x: Tensor) -> None:
        """What enters the head, x [N, D], with how much it counts for each kind [N, K]."""
        self.weights += shares.sum(0, dtype=torch.float64)
        for k in range(self.count):
            self.moments[k].addmm_((x * shares[:, k : k + 1]).T, x)

    def lookup_kinds(self, counts: Tensor) -> Kinds:
        """Of an embedding; counts [V] of each token in the text."""
        total = self.moments.sum(0) / self.weights.sum()
        weights = self.weights.float()[:, None, None]
        return Kinds(self.labels, (self.moments + PRIOR * total) / (weights + PRIOR), counts / counts.sum())

    def answer_kinds(self, curvature: Tensor, tokens: int) -> Kinds:
        """Of a head; curvature [V], sums of p (1 - p) over so many tokens."""
        total = self.moments.sum(0) / self.weights.sum().clamp_min(1e-30)
        each = self.moments / self.weights.float().clamp_min(1e-30)[:, None, None]
        return Kinds(self.labels, (1 - SHARE) * each + SHARE * total, curvature / tokens)
