"""What is measured of the rows that enter a product: their mean squares and their second moments.

The Hessian of a product's squared error in one row of its weight is the second moment of its input, E[x x^T] (Hassibi
and Stork 1993, arXiv 2210.17323), the same for every row. Of stacked experts each has its own.

Shapes: n rows, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.base import Floats
from convert.calibrate import sizes
from convert.calibrate.runner import parts


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


class Moments:
    """Second moments of what enters a product, weighted row by row: of everything, or of each expert in a range.

    All in float32: the Hessian is sum w x x^T / sum w, and the cross moment is that of the same rows in the model as it
    is and in the rounded one, sum w x_plain x^T / sum w.
    """

    def __init__(
        self, width: int, experts: range | None, cross: bool, device: torch.device, of: int | None = None
    ) -> None:
        """experts: those that are counted, out of `of`."""
        self.experts, self.of = experts, of or 1
        count = 1 if experts is None else len(experts)
        self._sums = torch.zeros(count, width, width, device=device)
        self._crosses = torch.zeros(count, width, width, device=device) if cross else None
        self._weights = [0.0] * count
        self.counts = [0] * count
        """Rows of each."""

    def __call__(self, x: Tensor, counts: Tensor | None) -> None:
        """More rows [n, in], each of weight 1."""
        self.add(x.detach(), counts, torch.ones(len(x), device=x.device), None)

    def add(self, x: Tensor, counts: Tensor | None, weights: Tensor, plain: Tensor | None) -> None:
        """More rows [n, in] with their weights [n]; `plain` [n, in] are they in the model as it is."""
        rows, shares = parts(x, counts), parts(weights, counts)
        for n, e in enumerate(self.experts or range(1)):
            if not len(rows[e]):
                continue
            self.counts[n] += len(rows[e])
            self._weights[n] += float(shares[e].sum(dtype=torch.float64))
            weighted = rows[e] * shares[e][:, None]
            self._sums[n].addmm_(weighted.T, rows[e])
            if self._crosses is not None and plain is not None:
                self._crosses[n].addmm_(plain.T, weighted)

    def hessian(self, n: int) -> Tensor | None:
        """The n-th Hessian [in, in]; none where no row came that counts. Asked for once: it is made in place."""
        return self._sums[n].div_(self._weights[n]) if self._weights[n] > 0 else None

    def all(self) -> Iterator[tuple[int, Tensor]]:
        """(expert, Hessian) of those that are counted and saw a row; (0, Hessian) without experts."""
        for n, e in enumerate(self.experts or range(1)):
            if (hessian := self.hessian(n)) is not None:
                yield e, hessian

    def cross(self, n: int) -> Tensor | None:
        """The n-th cross moment [in (plain), in], likewise."""
        found = self._crosses is not None and self._weights[n] > 0
        return self._crosses[n].div_(self._weights[n]) if found and self._crosses is not None else None


def spans(experts: int, width: int) -> list[range]:
    """Experts whose Hessians are collected together."""
    together = max(1, sizes.HESSIANS // (4 * width * width))
    return [range(a, min(experts, a + together)) for a in range(0, experts, together)]
