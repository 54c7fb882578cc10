"""Rounding an embedding, which has no product whose inputs could be measured: what its errors do to the answers can.

An error e of token v's row moves the residual stream wherever v stands, which costs counts[v] * e F e^T / 2 nats, with
F the Fisher information of the rows that were looked up: the mean outer product of the gradients, with labels sampled
from the model (arXiv 1412.1193). Where the embedding is the head too, the same error moves the logit of v, which costs
sum_t p_tv (1 - p_tv) * e H e^T / 2, with H the second moment of what enters the head. Both are Hessians as
`convert.calibrate.compensate` takes them; rows differ in the two terms' shares alone, so rows of like shares are
rounded together.

Shapes: R rows, D model.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from backends.base import QuantizedTensor
from convert.calibrate.compensate import Factor, compensate, prepare
from convert.levels import CODES, GROUPS

UNSEEN = 0.5
"""Added to every count: a token that the text lacks is rare, not impossible."""
OCTAVES = 2.0
"""Rows whose shares differ by less than this power of two are rounded together."""
FARTHEST = 4
"""Beyond so many steps one of the terms is alone."""


class Vocabulary:
    """Rounds blocks of an embedding's rows; what is factorised is kept for the next block.

    fisher, head: [D, D], means over tokens (head: only where the embedding is the head too).
    """

    def __init__(self, fisher: Tensor, head: Tensor | None = None) -> None:
        self.fisher, self.head = fisher.double(), None if head is None else head.double()
        self._factors: dict[int, Factor] = {}

    def __call__(self, weight: Tensor, counts: Tensor, curvature: Tensor | None, level: str) -> QuantizedTensor:
        """Rows [R, D] float32; counts [R] how often each token stands in the text; curvature [R] sums of p (1 - p)
        over the same text. Raises `TooLarge`."""
        cols = weight.shape[1]
        codes = np.empty(weight.shape, np.int8)
        scales = np.empty((len(weight), cols // GROUPS[level]), np.float32)
        for step, rows in self._alike(counts, curvature):
            q = compensate(weight[rows], self._factor(step), level)
            index = rows.cpu().numpy()
            codes[index], scales[index] = q.codes, q.scales
        return QuantizedTensor(codes, scales, CODES[level], GROUPS[level])

    def _alike(self, counts: Tensor, curvature: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """(share's step, rows of it), from more head to more embedding."""
        if self.head is None or curvature is None:
            yield 0, torch.arange(len(counts), device=counts.device)
            return
        use = (counts.double() + UNSEEN) * self.fisher.trace()
        answer = (curvature.double() + TINY) * self.head.trace()
        share = (use.clamp_min(TINY) / answer.clamp_min(TINY)).log2() / OCTAVES
        steps = share.round().clamp(-FARTHEST, FARTHEST).long()
        for step in steps.unique(sorted=True).tolist():
            yield step, (steps == step).nonzero()[:, 0]

    def _factor(self, step: int) -> Factor:
        if step not in self._factors:
            hessian = self.fisher
            if self.head is not None:
                use, answer = (h / h.trace().clamp_min(TINY) for h in (self.fisher, self.head))
                hessian = answer + 2.0 ** (OCTAVES * step) * use
            self._factors[step] = prepare(hessian)
        return self._factors[step]


TINY = 1e-30
