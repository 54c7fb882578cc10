"""What is measured of the rows that enter a product: their mean squares, and their Hessian.

The Hessian of a product's squared error in one row of its weight is the second moment of its input, E[x x^T] (Hassibi
and Stork 1993, arXiv 2210.17323), the same for every row. Of stacked experts each has its own.

Shapes: n rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.base import Floats
from convert.calibrate.runner import parts

HESSIANS = 1 << 30
"""Bytes of Hessians that are collected together, where one alone does not take more: of many experts some at a time."""


@dataclass
class Squares:
    """Sums of squares of each input channel, in float64."""

    sums: list[NDArray[np.float64]] = field(default_factory=list)
    """One [in], or one for each expert."""
    counts: list[int] = field(default_factory=list)
    stacked: bool = False

    def __call__(self, x: Tensor, counts: Tensor | None) -> None:
        """More rows [n, in]."""
        rows = parts(x, counts)
        if not self.sums:
            self.sums, self.counts = [np.zeros(x.shape[-1]) for _ in rows], [0] * len(rows)
            self.stacked = counts is not None
        for e, part in enumerate(rows):
            self.counts[e] += len(part)
            if len(part):
                self.sums[e] += part.square().sum(0, dtype=torch.float64).cpu().numpy()

    def means(self) -> Floats:
        """[in], or [E, in] of experts; zeros where no row came."""
        each = [(s / max(n, 1)).astype(np.float32) for s, n in zip(self.sums, self.counts, strict=True)]
        return np.stack(each) if self.stacked else each[0]


class Hessians:
    """Sums of x x^T, in float32: of everything, or of each expert in a range."""

    def __init__(self, width: int, experts: range | None, device: torch.device) -> None:
        self.experts = experts
        count = 1 if experts is None else len(experts)
        self.sums = torch.zeros(count, width, width, device=device)
        self.counts = [0] * count

    def __call__(self, x: Tensor, counts: Tensor | None) -> None:
        """More rows [n, in]."""
        rows = parts(x, counts)
        for n, e in enumerate(self.experts or range(1)):
            if len(rows[e]):
                self.counts[n] += len(rows[e])
                self.sums[n].addmm_(rows[e].T, rows[e])

    def mean(self, n: int) -> Tensor | None:
        """The n-th Hessian [in, in], in place of its sum; none where no row came."""
        return self.sums[n].div_(self.counts[n]) if self.counts[n] else None


def spans(experts: int, width: int) -> list[range]:
    """Experts whose Hessians are collected together."""
    together = max(1, HESSIANS // (4 * width * width))
    return [range(a, min(experts, a + together)) for a in range(0, experts, together)]
