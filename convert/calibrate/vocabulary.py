"""Rounding an embedding and a head, whose rows matter unequally and in different directions.

An error e of token v's row moves the residual stream wherever v stands, which costs e F e^T / 2 nats each time, with F
the Fisher information of the rows that were looked up: the mean outer product of the gradients, with labels sampled
from the model (arXiv 1412.1193). In the head the same error moves the logit of v, which costs
sum_t p_tv (1 - p_tv) e h_t h_t^T e^T / 2. Both are Hessians as `convert.calibrate.compensate` takes them; an embedding
that is the head too has the sum of both. Rows with like Hessians are rounded together (`convert.calibrate.kinds`).

Shapes: R rows, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from backends.base import QuantizedTensor
from convert.calibrate.compensate import SWEEPS, compensate, prepare
from convert.calibrate.kinds import Kinds
from convert.calibrate.sensitivity import row_cost
from convert.levels import CODES, GROUPS

UNSEEN = 1e-6
"""Added to every row's use: a token that the text lacks is rare, not impossible."""
OCTAVES = 4.0
"""Rows whose shares of the two uses differ by less than this power of two are rounded together."""
FARTHEST = 2
"""Beyond so many steps one of the uses is alone."""
TINY = 1e-30


class Vocabulary:
    """Rounds blocks of rows for all their uses. `shift` [D, D]: what makes up for inputs that are off, as
    `compensate.Factor` has it (a head alone)."""

    def __init__(self, uses: Sequence[Kinds], shift: Tensor | None = None, sweeps: int = SWEEPS) -> None:
        assert 1 <= len(uses) <= 2, "looked up, answered, or both"
        self.uses, self.shift, self.sweeps = uses, shift, sweeps

    def __call__(self, start: int, weight: Tensor, level: str) -> QuantizedTensor:
        """Rows [R, D] float32 from row `start` on. Raises `TooLarge`."""
        codes = np.empty(weight.shape, np.int8)
        scales = np.empty((len(weight), weight.shape[1] // GROUPS[level]), np.float32)
        for rows, hessian in self._alike(start, len(weight)):
            factor = prepare(hessian).moved(self.shift)
            q = compensate(weight[rows], factor, level, self.sweeps)
            index = rows.cpu().numpy()
            codes[index], scales[index] = q.codes, q.scales
        return QuantizedTensor(codes, scales, CODES[level], GROUPS[level])

    def cost(self, start: int, weight: Tensor, level: str) -> float:
        """Nats of KL divergence for a token that rounding these rows costs, with inputs as they are."""
        q = Vocabulary(self.uses, None, 1)(start, weight, level)
        error = weight - torch.from_numpy(q.dequantize()).to(weight.device)
        total = 0.0
        for use in self.uses:
            labels, counts = use.labels[start : start + len(weight)], use.uses[start : start + len(weight)]
            for k in labels.unique().tolist():
                mine = labels == k
                total += row_cost(error[mine], [(use.hessians[k], counts[mine])])
        return total

    def _alike(self, start: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows of the block, their Hessian)."""
        part = slice(start, start + count)
        keys = [use.labels[part] for use in self.uses]
        if len(self.uses) == 2:
            keys.append(self._steps(part))
        stacked = torch.stack(keys, 1)
        for key in stacked.unique(dim=0):
            rows = (stacked == key).all(1).nonzero()[:, 0]
            found = [use.hessians[k] for use, k in zip(self.uses, key.tolist(), strict=False)]
            if len(found) == 1:
                yield rows, found[0]
                continue
            first, second = (self._use(i, part)[rows].mean() for i in (0, 1))
            total = (first + second).clamp_min(TINY)
            yield rows, (first / total).float() * found[0] + (second / total).float() * found[1]

    def _use(self, i: int, part: slice) -> Tensor:
        return self.uses[i].uses[part].double() + UNSEEN

    def _steps(self, part: slice) -> Tensor:
        """[R] how much more the first use counts than the second, in steps."""
        costs = [
            self._use(i, part) * use.hessians.diagonal(dim1=1, dim2=2).sum(1).double()[use.labels[part]]
            for i, use in enumerate(self.uses)
        ]
        shares = (costs[0].clamp_min(TINY) / costs[1].clamp_min(TINY)).log2() / OCTAVES
        return shares.round().clamp(-FARTHEST, FARTHEST).long()
