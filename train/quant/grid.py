"""The portable rounding in torch: where the weights are, and bit for bit the codes and scales of `convert.quantize`.

Everything is done with correctly rounded operations, one after another and eagerly: a compiler would fuse some of them
and round less often. Sums over a group run from its first weight to its last, as NumPy's do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convert.quantize import GRIDS, TINY, ZERO_GROUP, Grid

CHUNK = {"cpu": 2**14}
"""Groups worked on together, by device type: on a CPU so few that the buffers stay in a core's cache; elsewhere 2^20,
so that a GPU's kernels stay large."""


def round_scale(scale: Tensor) -> Tensor:
    """The nearest positive scale of at most 8 significant bits that float16 holds exactly."""
    rounded = scale.bfloat16().float()
    fine = (scale * (1 / TINY)).round_() * TINY  # float16 subnormals have fewer than 8 bits
    return torch.where(rounded < 2.0**-17, fine, rounded).clamp_(min=TINY)


@torch.no_grad()
def round_to_grid(matrices: Sequence[Tensor], bits: int, group: int) -> None:
    """Replace the values of float32 matrices, whose rows are whole groups, by codes times scales."""
    groups = [m.view(-1, group) for m in matrices if m.numel()]
    if not groups:
        return
    search = _Search(GRIDS[bits], group, sum(len(g) for g in groups), groups[0].device)
    for pieces in _chunks(groups, search.size):
        search(pieces)


def _chunks(groups: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The rows of all matrices, `size` at a time: small ones share a chunk, large ones have several."""
    pieces: list[Tensor] = []
    room = size
    for g in groups:
        while len(g):
            pieces.append(g[:room])
            g, room = g[room:], room - len(pieces[-1])
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


class _Search:
    """The scale search of `convert.quantize`, laid out [group, n] so that every operation runs along n."""

    def __init__(self, grid: Grid, group: int, groups: int, device: torch.device) -> None:
        self.grid = grid
        self.size = min(groups, CHUNK.get(device.type, 2**20))
        self._buffers = torch.empty(3, group * self.size, device=device)
        # on the device: a quotient by a number of the CPU's may be a product with its reciprocal
        self._divisors = torch.tensor(grid.divisors, device=device)
        self._widest = torch.tensor(9.5, device=device)

    def __call__(self, pieces: Sequence[Tensor]) -> None:
        """Put some groups [n, group] on the grid, in place."""
        n, group = sum(len(p) for p in pieces), pieces[0].shape[1]
        x, y, q = (b[: group * n].view(group, n) for b in self._buffers)
        torch.cat([p.T for p in pieces], dim=1, out=x)
        scale = self._scale(_Chunk(x, y, q))
        self._codes(x, scale, y, q)
        torch.mul(q, scale, out=y)
        for p, values in zip(pieces, y.split([len(p) for p in pieces], dim=1), strict=True):
            p.copy_(values.T)

    def _scale(self, c: _Chunk) -> Tensor:
        amax = torch.abs(c.x, out=c.y).amax(0)
        unit = amax.clamp(min=TINY)  # errors in units of amax neither overflow nor underflow
        scales = round_scale(amax / self._divisors[:, None]).unbind()
        best, scale = self._error(c, scales[0], unit), scales[0]

        def consider(s: Tensor) -> None:
            nonlocal best, scale
            error = self._error(c, s, unit)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, s, scale)

        for s in scales[1:]:
            consider(s)
        for _ in range(self.grid.refine):
            consider(round_scale(torch.maximum(self._least_squares(c, scale), amax / self._widest)))
        return scale.masked_fill(amax == 0, ZERO_GROUP)

    def _error(self, c: _Chunk, s: Tensor, unit: Tensor) -> Tensor:
        """Sums of squared errors of the codes of scale s."""
        self._codes(c.x, s, c.y, c.q)
        c.y.sub_(c.q)
        relative = s / unit
        return _sum(c.y.mul_(c.y)).mul_(relative.mul_(relative))

    def _codes(self, x: Tensor, s: Tensor, y: Tensor, q: Tensor) -> None:
        """y = x / s and q = the nearest codes."""
        torch.div(x, s, out=y)
        torch.round(y, out=q).clamp_(self.grid.low, self.grid.high)

    def _least_squares(self, c: _Chunk, s: Tensor) -> Tensor:
        """The scale that fits the codes of scale s best: sum(x q) / sum(q q)."""
        self._codes(c.x, s, c.y, c.q)
        top, bottom = _sum(c.y.mul_(c.q)), _sum(torch.mul(c.q, c.q, out=c.y))
        return torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1.0) * s, s)


@dataclass(frozen=True)
class _Chunk:
    """Weights [group, n], and two buffers of their shape."""

    x: Tensor
    y: Tensor
    q: Tensor


def _sum(y: Tensor) -> Tensor:
    """[group, n] -> [n], from the first row to the last."""
    total = y[0].clone()
    for row in y[1:]:
        total += row
    return total
