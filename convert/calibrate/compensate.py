"""Rounding with compensation: what one weight loses, weights that are not rounded yet make up for.

For inputs of second moment H a row of the weight that is off by e costs e H e^T. Columns are rounded one after another,
those with the largest inputs first, and each one's error is spread over the later ones by the Cholesky factor of H^-1
(GPTQ, arXiv 2210.17323; the same as LDLQ, arXiv 2307.13304). Scales are found before, group by group ("static groups"),
so that the order of columns is free. Then codes and scales are polished: each in turn takes the grid point that costs
least, the others as they are; that never raises the cost.

The weight that is rounded is not the model's own but the one that gives for the rounded model's inputs, as nearly as a
linear map can, what the model's own gives for its own: W E[x_plain x^T] H^-1 (least squares; the asymmetric calibration
of GPTAQ, arXiv 2504.02692, has the same minimum).

Shapes: R rows (outputs), C columns (inputs), G groups of a row. Matrices are worked on transposed, so that a column's
rows lie together.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from backends.base import QuantizedTensor
from convert.levels import CODES, GROUPS
from convert.quantize import GRIDS, TINY, TooLarge, quantize

DAMPING = 0.01
"""Added to the Hessian's diagonal, in units of its mean: the codes must not depend on directions without inputs."""
RIDGE = 0.03
"""Likewise, for the weight that makes up for the inputs' errors."""
BLOCK = 64
"""Columns whose errors are spread one by one; over the columns behind them they are spread together."""
SWEEPS = 3
"""Rounds of polishing at most."""
TINY_COST = 1e-30


@dataclass(frozen=True, eq=False)
class Factor:
    """What rounding needs of a Hessian; for every matrix, or block of rows, with these inputs."""

    hessian: Tensor
    """[C, C] float32, damped."""
    order: Tensor
    """[C] columns in the order in which they are rounded."""
    spread: Tensor
    """[C, C] float32 in that order, upper triangle: by how much column j's error moves a later column k."""
    importance: Tensor
    """[C] float32, positive: what weights the squared errors where scales are searched."""
    shift: Tensor | None = None
    """[C, C] float32: weight + weight @ shift is what is rounded."""

    def moved(self, shift: Tensor | None) -> Factor:
        """The same with another shift."""
        return replace(self, shift=shift)


def prepare(hessian: Tensor, cross: Tensor | None = None, damping: float = DAMPING) -> Factor:
    """The factorisation, in float64, of a Hessian E[x x^T] [C, C] (of any scale; dead columns and less than full rank
    are no matter). `cross` [C, C]: E[x_plain x^T], in the Hessian's unit."""
    wide = hessian.double()
    wide = (wide + wide.T).div_(2)
    mean = wide.diagonal().mean()
    if not bool(torch.isfinite(mean)) or mean <= 0:
        wide, mean, cross = torch.eye(len(wide), dtype=torch.float64, device=wide.device), torch.ones_like(mean), None
    wide = wide.div_(mean)  # in place here and below: with 14,336 inputs one of these takes 1.6 GB
    shift = None if cross is None else _shift(wide, cross.double() / mean)
    damped, upper, order = inverse_factor(wide, damping)
    del wide
    steps = upper.diagonal().clone()
    conditional = torch.empty_like(steps)
    conditional[order] = steps**-2  # what is left of a column's cost when later ones make up for its error
    importance = (conditional * damped.diagonal()).sqrt()
    return Factor(
        damped.float(),
        order,
        upper.div_(steps[:, None]).float(),
        importance.float().clamp_min(TINY_COST),
        shift,
    )


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """(damped Hessian, upper Cholesky factor of its inverse in the order of rounding, that order)."""
    while True:
        damped = _ridged(hessian, damping)
        order = damped.diagonal().argsort(descending=True, stable=True)
        found, failed = torch.linalg.cholesky_ex(damped[order[:, None], order])
        if not failed:
            found = torch.cholesky_inverse(found)
            found, failed = torch.linalg.cholesky_ex(found, upper=True)
            if not failed:
                return damped, found, order
        damping = max(10 * damping, 1e-6)  # float32 sums of many tokens may be slightly indefinite


def _shift(hessian: Tensor, cross: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(_ridged(hessian, RIDGE))
    if failed:
        return torch.zeros_like(hessian, dtype=torch.float32)
    return torch.cholesky_solve(cross.sub_(hessian).T, lower).T.float()


def _ridged(hessian: Tensor, by: float) -> Tensor:
    """With so much more on the diagonal."""
    out = hessian.clone()
    out.diagonal().add_(by)
    return out


def compensate(weight: Tensor, factor: Factor, level: str, sweeps: int = SWEEPS) -> QuantizedTensor:
    """Rows [R, C] float32 at a level with codes; C is whole groups. Rows don't depend on one another.

    A weight that is on the grid already stays what it is, if there is no `shift`. Raises `TooLarge`.
    """
    bits, group = CODES[level], GROUPS[level]
    weight = weight.float()
    target, scales = weight, _scales(weight, bits, group, factor)
    if factor.shift is not None:
        shifted = weight + weight @ factor.shift
        with suppress(TooLarge):  # then the weight as it is
            if bool(torch.isfinite(shifted).all()):
                target, scales = shifted, _scales(shifted, bits, group, factor)
    codes = _spread(target, scales, bits, group, factor)
    codes, scales = polish(target, codes, scales, factor.hessian, level, sweeps)
    return QuantizedTensor(
        codes.T.to(torch.int8).contiguous().cpu().numpy(), scales.T.contiguous().cpu().numpy(), bits, group
    )


def _scales(target: Tensor, bits: int, group: int, factor: Factor) -> Tensor:
    """[G, R], by the search of `convert.quantize` with the importance of each column."""
    weights = factor.importance / factor.importance.mean()
    found = quantize(target.cpu().numpy(), bits, group, weights.clamp_min(1e-6).cpu().numpy())
    return torch.from_numpy(np.ascontiguousarray(found.scales.T)).to(target.device)


def _spread(target: Tensor, scales: Tensor, bits: int, group: int, factor: Factor) -> Tensor:
    """Codes [C, R], as float32, each for what the errors of the columns before it left to do."""
    grid, order, spread = GRIDS[bits], factor.order, factor.spread
    rest = target.T[order]
    ordered = scales[order // group]
    codes = torch.empty_like(rest)
    for a in range(0, len(rest), BLOCK):
        z = min(a + BLOCK, len(rest))
        errors = torch.empty_like(rest[a:z])
        for j in range(a, z):
            q = torch.div(rest[j], ordered[j]).round_().clamp_(grid.low, grid.high)
            codes[j] = q
            torch.addcmul(rest[j], q, ordered[j], value=-1, out=errors[j - a])
            if j + 1 < z:
                rest[j + 1 : z].addr_(spread[j, j + 1 : z], errors[j - a], alpha=-1)
        if z < len(rest):
            rest[z:].addmm_(spread[a:z, z:].T, errors, alpha=-1)
    out = torch.empty_like(codes)
    out[order] = codes
    return out


def polish(
    target: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor, level: str, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Coordinate descent on e H e^T over codes [C, R], then over scales [G, R], for target [R, C]; new ones of both."""
    bits, group = CODES[level], GROUPS[level]
    grid, codes, scales = GRIDS[bits], codes.clone(), scales.clone()
    diagonal = hessian.diagonal().clamp_min(TINY_COST)
    errors = target.T - codes * scales.repeat_interleave(group, 0)
    pull = hessian @ errors  # minus half the gradient
    for _ in range(sweeps):
        changed = False
        for a in range(0, len(codes), BLOCK):
            z = min(a + BLOCK, len(codes))
            part, moves = pull[a:z].clone(), torch.empty_like(pull[a:z])
            for j in range(a, z):
                s = scales[j // group]
                wanted = codes[j] + part[j - a] / (diagonal[j] * s)
                q = wanted.round_().clamp_(grid.low, grid.high)
                torch.mul(q - codes[j], s, out=moves[j - a])
                codes[j] = q
                part.addr_(hessian[a:z, j], moves[j - a], alpha=-1)
            if bool(moves.any()):
                changed = True
                pull.addmm_(hessian[:, a:z], moves, alpha=-1)
        changed |= _rescale(codes, scales, pull, hessian, group, grid.largest)
        if not changed:
            break
    return codes, scales


def _rescale(codes: Tensor, scales: Tensor, pull: Tensor, hessian: Tensor, group: int, largest: float) -> bool:
    """The best scale of each group in turn, rounded, where that costs less; in place. Whether one changed."""
    changed = False
    for k in range(len(scales)):
        columns = slice(k * group, (k + 1) * group)
        q = codes[columns]
        slope = (q * pull[columns]).sum(0)
        curve = ((hessian[columns, columns] @ q) * q).sum(0)
        best = round_scales(scales[k] + slope / curve.clamp_min(TINY_COST), largest)
        move = best - scales[k]
        gain = move * (2 * slope - move * curve)
        move = torch.where((gain > 0) & (curve > TINY_COST), move, 0.0)
        if bool(move.any()):
            changed = True
            scales[k] += move
            pull.addmm_(hessian[:, columns], q * move, alpha=-1)
    return changed


def round_scales(scales: Tensor, largest: float) -> Tensor:
    """`convert.quantize.round_scale` on any device, at most `largest`."""
    rounded = scales.clamp(TINY, largest).bfloat16().float()
    subnormal = (scales * 2.0**24).round().clamp_min(1.0) * 2.0**-24  # of float16, which has fewer than 8 bits there
    return torch.where(rounded < 2.0**-17, subnormal, rounded).clamp(TINY, largest)
