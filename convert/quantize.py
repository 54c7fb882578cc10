"""The portable rounding: float32 rows to symmetric int8 or int4 groups that every container holds exactly.

weight = code * scale, one positive scale for `group` weights of a row. Scales have at most 8 significant bits and lie
within float16, so the same numbers are exact in float16, bfloat16 and float32, and so is -2^(bits-1) * scale, which
containers with unsigned codes store as their bias. Codes are the nearest ones to the *rounded* scale.

The scale of a group is searched: several quotients amax / c (so the largest weights may clip where the others gain
more) and the least-squares scale of the best one's codes; the smallest sum of squared errors wins. Everything is done
group by group with correctly rounded operations in a fixed order: the result depends on nothing else, not on how rows
are cut into blocks, nor on threads or processors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.base import Floats, QuantizedTensor
from spec.errors import UserError

TINY = 2.0**-24
"""Smallest positive float16."""
ZERO_GROUP = 2.0**-14
"""Scale of a group of zeros (any would do; this is float16's smallest normal number)."""
CHUNK = 4096
"""Groups worked on together: small enough that the buffers stay in a core's cache."""


@dataclass(frozen=True)
class Grid:
    """What one bit width searches."""

    low: int
    high: int
    divisors: tuple[float, ...]
    """Candidate scales are amax / divisor. The integers make a tensor that is on the grid stay there."""
    refine: int
    """Least-squares steps after them."""
    largest: float
    """Largest scale: low * scale is exact in float16 up to here."""


# Four bits: 0.4 % above the error of a search over a hundred scales, for Gaussian and for heavy-tailed weights.
GRIDS = {
    4: Grid(-8, 7, (7.0, 6.0, 7.25, 7.5, 7.75, 8.0, 8.25, 8.5, 8.75, 9.0), 1, 8160.0),
    8: Grid(-128, 127, (127.0, 126.0, 128.0), 0, 510.0),
}


class TooLarge(UserError):
    """A weight beyond what a level can hold; `row` counts from the start of the block."""

    def __init__(self, row: int, value: float, limit: float, level: str) -> None:
        self.row, self.value, self.limit, self.level = row, value, limit, level
        super().__init__(self.at("", 0))

    def at(self, name: str, start: int) -> str:
        """The message, for a block that begins at row `start` of tensor `name`."""
        place = f"{name}: row {start + self.row}" if name else f"row {start + self.row}"
        fits = "f16" if self.level.startswith("q") and self.value <= 65504 else "f32"
        fix = f"--override '{name.removesuffix('.weight')}={fits}'" if name else f"--quant {fits}"
        return f"{place}: a weight of {self.value:.6g} is beyond {self.level} (at most {self.limit:.6g}): use {fix}"


def round_floats(block: Floats, level: str) -> Floats:
    """Finite float32 rounded to nearest even at `f16` or `bf16`, as float32; `f32` as it is. Raises `TooLarge`."""
    if level == "f32":
        return block
    if level == "f16":
        with np.errstate(over="ignore"):
            out, limit = block.astype(np.float16).astype(np.float32), 65504.0
    else:
        bits = np.ascontiguousarray(block).view(np.uint32)
        out = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        limit = float(np.float32(2.0**127 * (2 - 2.0**-7)))
    finite = np.isfinite(out)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise TooLarge(row, float(np.abs(block[row]).max()), limit, level)
    return out


def round_scale(scale: Floats) -> Floats:
    """The nearest positive scale of at most 8 significant bits that float16 holds exactly."""
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    small = rounded < 2.0**-17  # float16 subnormals have fewer than 8 bits there
    if small.any():
        rounded = np.where(small, np.rint(scale * np.float32(1 / TINY)) * np.float32(TINY), rounded)
    return np.maximum(rounded, np.float32(TINY))


def quantize(block: Floats, bits: int, group: int = 32, weights: Floats | None = None) -> QuantizedTensor:
    """Rows [r, c] of a matrix on the portable grid; c is a multiple of `group`, and every value is finite.

    `weights` [c], positive, are the importances of the input channels: they weight the squared errors. Raises
    `TooLarge` where a weight is too large for a float16 scale, or no number.
    """
    grid = GRIDS[bits]
    rows, cols = block.shape
    assert cols % group == 0, f"{cols} columns are no whole groups of {group}"
    grouped = np.ascontiguousarray(block, np.float32).reshape(-1, group)
    codes = np.empty(grouped.shape, np.int8)
    scales = np.empty(len(grouped), np.float32)
    importance = None if weights is None else np.ascontiguousarray(weights, np.float32).reshape(-1, group)
    search = _Search(grid, group)
    with np.errstate(invalid="ignore", over="ignore"):  # of what is no number, which is refused below
        for a in range(0, len(grouped), CHUNK):
            z = min(a + CHUNK, len(grouped))
            w = None if importance is None else importance[np.arange(a, z) % len(importance)].T
            q, scales[a:z] = search(grouped[a:z], w)
            codes[a:z] = q.T
    too_large = np.flatnonzero(scales > grid.largest)
    if len(too_large):
        row = int(too_large[0]) * group // cols
        raise TooLarge(row, float(np.abs(block[row]).max()), grid.largest * grid.high, f"q{bits}")
    return QuantizedTensor(codes.reshape(rows, cols), scales.reshape(rows, cols // group), bits, group)


class _Search:
    """Scale search over chunks of groups, laid out [group, n] so that every operation runs along n."""

    def __init__(self, grid: Grid, group: int) -> None:
        self.grid = grid
        self.low, self.high = np.float32(grid.low), np.float32(grid.high)
        self.x, self.y, self.q = (np.empty((group, CHUNK), np.float32) for _ in range(3))

    def __call__(self, rows: Floats, w: Floats | None) -> tuple[Floats, Floats]:
        """Codes [group, n], as float32 in a buffer that the next call overwrites, and scales [n]."""
        n = len(rows)
        x, y, q = (buffer[:, :n] for buffer in (self.x, self.y, self.q))
        np.copyto(x, rows.T)
        amax = np.abs(x, out=y).max(axis=0)
        best = np.full(n, np.inf, np.float32)
        scale = np.full(n, ZERO_GROUP, np.float32)
        unit = np.maximum(amax, np.float32(TINY))  # errors in units of amax neither overflow nor underflow

        def consider(s: Floats) -> None:
            self._codes(x, s, y, q)
            np.subtract(y, q, out=y)
            np.multiply(y, y, out=y)
            if w is not None:
                np.multiply(y, w, out=y)
            error = np.add.reduce(y, axis=0)
            relative = s / unit
            error *= relative * relative
            better = error < best
            np.copyto(best, error, where=better)
            np.copyto(scale, s, where=better)

        for divisor in self.grid.divisors:
            consider(round_scale(amax / np.float32(divisor)))
        for _ in range(self.grid.refine):
            consider(round_scale(np.maximum(self._least_squares(x, scale, y, q, w), amax / np.float32(9.5))))
        scale[amax == 0] = ZERO_GROUP
        scale[~np.isfinite(amax)] = np.inf
        self._codes(x, scale, y, q)
        return q, scale

    def _codes(self, x: Floats, s: Floats, y: Floats, q: Floats) -> None:
        """y = x / s and q = the nearest codes."""
        np.divide(x, s, out=y)
        np.rint(y, out=q)
        np.clip(q, self.low, self.high, out=q)

    def _least_squares(self, x: Floats, s: Floats, y: Floats, q: Floats, w: Floats | None) -> Floats:
        """The scale that fits the codes of scale s best: sum(w x q) / sum(w q q)."""
        self._codes(x, s, y, q)
        y *= q
        if w is not None:
            y *= w
        top = np.add.reduce(y, axis=0)
        np.multiply(q, q, out=y)
        if w is not None:
            y *= w
        bottom = np.add.reduce(y, axis=0)
        fit = top / np.where(bottom > 0, bottom, np.float32(1)) * s
        return np.where(bottom > 0, fit, s)


def error(block: Floats, q: QuantizedTensor) -> tuple[float, float]:
    """(sum of squared errors, sum of squares) of a rounded block, in float64."""
    difference = block.astype(np.float64) - q.dequantize()
    return float(np.sum(difference**2)), float(np.sum(block.astype(np.float64) ** 2))
