"""A loss of your own: python -m train --loss.kind examples/loss.py:focal

A loss takes a chunk of logits [N, V] in float32 and its targets [N], and returns the sum over the targets that count
(-100 marks those that don't). The trainer divides by the number of targets of the whole step. Everything but the sum is
up to you; that the function keeps to it is checked before the first step.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy weighted by (1 - p)^2: tokens that the model knows already count less (Lin et al. 2017)."""
    losses = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).sum()
