"""Compensation in both directions: what a row's errors do to the answers, rows that are not rounded yet undo too.

Where the gradients at a product's outputs are alike, errors of its rows cancel or add up: to second order an error E
costs tr(G E H E^T) / 2, H the second moment of the inputs and G that of the gradients (K-FAC, arXiv 1503.05671).
Rounding for both is what `convert.calibrate.compensate` does, once more from row to row (YAQA, arXiv 2505.22988),
blocks of rows at a time: inside a block rows count as independent.

Shapes: R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from backends.base import QuantizedTensor
from convert.calibrate.compensate import SWEEPS, Factor, compensate, inverse_factor
from convert.levels import CODES, GROUPS
from convert.quantize import TooLarge

DAMPING = 0.05
"""Added to the diagonal of G, in units of its mean."""


def compensate_both(
    weight: Tensor, factor: Factor, outputs: Tensor, level: str, together: int, sweeps: int = SWEEPS
) -> QuantizedTensor:
    """Rows [R, C] float32 at a level with codes, `together` at a time; outputs [R, R]: the mean of g g^T, of any scale.

    Raises `TooLarge`.
    """
    wide = outputs.double()
    mean = wide.diagonal().mean()
    if not bool(torch.isfinite(mean)) or mean <= 0:
        return compensate(weight, factor, level, sweeps)
    _, upper, order = inverse_factor(wide / mean, DAMPING)
    plain = replace(factor, shift=None)
    start = weight.float()
    target = start if factor.shift is None else start + start @ factor.shift
    target = (target if bool(torch.isfinite(target).all()) else start)[order]
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty((len(weight), weight.shape[1] // GROUPS[level]), np.float32)
    for a in range(0, len(weight), together):
        z = min(a + together, len(weight))
        rows = order[a:z]
        try:
            q = compensate(target[a:z], plain, level, sweeps)
        except TooLarge:  # by what was added, or as it is
            target[a:z] = start[rows]
            q = _placed(target[a:z], plain, level, sweeps, rows)
        index = rows.cpu().numpy()
        codes[index], scales[index] = q.codes, q.scales
        if z < len(weight):
            errors = (target[a:z] - torch.from_numpy(q.dequantize()).to(target.device)).double()
            later = torch.linalg.solve_triangular(upper[a:z, a:z], upper[a:z, z:], upper=True)
            target[z:] -= (later.T @ errors).float()
    return QuantizedTensor(codes, scales, CODES[level], GROUPS[level])


def _placed(weight: Tensor, factor: Factor, level: str, sweeps: int, rows: Tensor) -> QuantizedTensor:
    try:
        return compensate(weight, factor, level, sweeps)
    except TooLarge as e:
        raise TooLarge(int(rows[e.row]), e.value, e.limit, e.level) from None
