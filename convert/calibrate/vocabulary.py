"""Rounding an embedding and a head, whose rows matter unequally and in different directions.

An error e of token v's row moves the residual stream wherever v stands, which costs e F e^T / 2 nats each time, with F
the Fisher information of the rows that were looked up: the mean outer product of the gradients, with labels sampled
from the model (arXiv 1412.1193). In the head the same error moves the logit of v, which costs
sum_t p_tv (1 - p_tv) e h_t h_t^T e^T / 2. Both are Hessians as `convert.calibrate.compensate` takes them; an embedding
that is the head too has the sum of both. Rows with like Hessians are rounded together (`convert.calibrate.kinds`).

Shapes: D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from backends.base import QuantizedTensor
from convert.calibrate.compensate import SWEEPS, Factor, compensate, prepare
from convert.calibrate.kinds import Kinds
from convert.calibrate.sensitivity import row_cost
from convert.calibrate.sizes import ROWS
from convert.levels import CODES, GROUPS
from convert.quantize import TooLarge

UNSEEN = 1e-6
"""Added to every row's use: a token that the text lacks is rare, not impossible."""
OCTAVES = 4.0
"""Rows whose shares of the two uses differ by less than this power of two are rounded together."""
FARTHEST = 2
"""Beyond so many steps one of the uses is alone."""
TINY = 1e-30


class Vocabulary:
    """Rounds the rows of a vocabulary for all their uses. `shift` [D, D]: what makes up for inputs that are off, as
    `compensate.Factor` has it (a head alone)."""

    def __init__(self, uses: Sequence[Kinds], shift: Tensor | None = None, sweeps: int = SWEEPS) -> None:
        assert 1 <= len(uses) <= 2, "looked up, answered, or both"
        self.uses, self.shift, self.sweeps = uses, shift, sweeps

    def __call__(self, weight: Tensor, level: str) -> QuantizedTensor:
        """All rows [V, D] float32. Raises `TooLarge`."""
        codes = np.empty(weight.shape, np.int8)
        scales = np.empty((len(weight), weight.shape[1] // GROUPS[level]), np.float32)
        for rows, hessian in self._alike():
            factor = prepare(hessian).moved(self.shift)
            for part in rows.split(ROWS):
                q, index = self._rounded(weight, part, factor, level), part.cpu().numpy()
                codes[index], scales[index] = q.codes, q.scales
        return QuantizedTensor(codes, scales, CODES[level], GROUPS[level])

    def costs(self, weight: Tensor, levels: Sequence[str]) -> list[float]:
        """Nats of KL divergence for a token that rounding the rows [V, D] at each level costs, with inputs as they
        are."""
        out = [0.0] * len(levels)
        for rows, hessian in self._alike():
            factor = prepare(hessian)
            for part in rows.split(ROWS):
                for n, level in enumerate(levels):
                    q = self._rounded(weight, part, factor, level)
                    error = weight[part] - torch.from_numpy(q.dequantize()).to(weight.device)
                    out[n] += row_cost(error, [(u.hessians[u.labels[part[0]]], u.uses[part]) for u in self.uses])
        return out

    def _rounded(self, weight: Tensor, rows: Tensor, factor: Factor, level: str) -> QuantizedTensor:
        try:
            return compensate(weight[rows], factor, level, self.sweeps)
        except TooLarge as e:
            raise TooLarge(int(rows[e.row]), e.value, e.limit, e.level) from None

    def _alike(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of one kind in every use, their Hessian)."""
        keys = [use.labels for use in self.uses]
        if len(self.uses) == 2:
            keys = [*keys, self._steps()]
        kinds, which = torch.stack(keys, 1).unique(dim=0, return_inverse=True)
        for n, key in enumerate(kinds.tolist()):
            rows = (which == n).nonzero()[:, 0]
            found = [use.hessians[k] for use, k in zip(self.uses, key, strict=False)]
            if len(found) == 1:
                yield rows, found[0]
                continue
            first, second = (self._use(i)[rows].mean() for i in (0, 1))
            total = (first + second).clamp_min(TINY)
            yield rows, (first / total).float() * found[0] + (second / total).float() * found[1]

    def _use(self, i: int) -> Tensor:
        return self.uses[i].uses.double() + UNSEEN

    def _steps(self) -> Tensor:
        """[V] how much more the first use counts than the second, in steps."""
        costs = [
            self._use(i) * use.hessians.diagonal(dim1=1, dim2=2).sum(1).double()[use.labels]
            for i, use in enumerate(self.uses)
        ]
        shares = (costs[0].clamp_min(TINY) / costs[1].clamp_min(TINY)).log2() / OCTAVES
        return shares.round().clamp(-FARTHEST, FARTHEST).long()
