"""What rounding a matrix alone costs, in nats of KL divergence for a token: what a budget is spent by.

The KL divergence between a model and the same with one matrix off by e is to second order half of the Fisher
information's quadratic form, which factorises (K-FAC, arXiv 1503.05671): 1/2 sum_r g_r e_r H e_r^T, g_r the mean square
of the gradient at output r with labels sampled from the model, H the second moment of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convert.calibrate.compensate import Factor, compensate


def cost(weight: Tensor, level: str, factor: Factor, hessian: Tensor, squares: Tensor) -> float:
    """Expected KL a token where `weight` [R, C] alone is rounded at `level`, by `compensate` with `factor`.

    hessian [C, C]: the mean of x x^T over tokens. squares [R]: that of the squared gradients at the outputs.
    """
    q = compensate(weight, factor, level, sweeps=1)
    error = weight - torch.from_numpy(q.dequantize()).to(weight.device)
    each = ((error @ hessian.to(error.dtype)) * error).sum(1)
    return 0.5 * float((each.double() * squares.double().to(each.device)).sum())


def row_cost(error: Tensor, uses: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Expected KL a token where rows of an embedding or head are off by `error` [R, D]; each use of them is a Hessian
    [D, D] and how much of it each row gets [R] (`convert.calibrate.vocabulary` says which), both means over tokens."""
    return sum(0.5 * float((((error @ h.to(error.dtype)) * error).sum(1).double() * n.double()).sum()) for h, n in uses)
