"""What int8 instead of a level's int4 saves, matrix by matrix, in nats of KL divergence for a token; and the embedding,
whose rows are looked up and not multiplied.

Shapes: R rows, C columns, D model, V vocab.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.base import QuantizedTensor
from convert.calibrate.boundary import Boundary
from convert.calibrate.compensate import prepare
from convert.calibrate.runner import Runner
from convert.calibrate.sensitivity import cost, row_cost
from convert.calibrate.statistics import Moments
from convert.calibrate.vocabulary import Vocabulary

FINE = "q8"


def gain(weight: Tensor, level: str, hessian: Tensor, squares: Tensor) -> float:
    """Of a product: weight [R, C], mean x x^T of its inputs, mean squares [R] of the gradients at its outputs."""
    factor = prepare(hessian)
    coarse, fine = (cost(weight, name, factor, hessian, squares) for name in (level, FINE))
    return coarse - fine


def head_moments(runner: Runner, boundary: Boundary, windows: int, plain: Boundary | None = None) -> Moments:
    """Of what enters the head, `boundary` being the stream after the last layer; `plain` is it in the model as it
    is."""
    norm = runner.final_norm()
    moments = Moments(runner.spec.width, None, plain is not None, runner.device)

    def entered(stream: Boundary, a: int, z: int) -> Tensor:
        return runner.end(norm, torch.from_numpy(stream.read(a, z)).to(runner.device)).flatten(0, -2)

    for a, z in runner.chunks(windows):
        x = entered(boundary, a, z)
        ones = torch.ones(len(x), device=runner.device)
        moments.add(x, None, ones, None if plain is None else entered(plain, a, z))
    return moments


class Lookup:
    """An embedding whose rows are rounded in blocks for what they do where they are looked up, and as the head."""

    def __init__(
        self, ids: NDArray[np.int64], fisher: Tensor, curvature: NDArray[np.float64], head: Tensor | None
    ) -> None:
        """fisher: sum of g g^T [D, D] at the rows. curvature: sums of p (1 - p) [V]. head: mean h h^T [D, D] of what
        enters the head, where that is the embedding too."""
        device = fisher.device
        self.tokens = ids.size
        self.fisher, self.head = fisher / ids.size, head
        self.counts = torch.from_numpy(np.bincount(ids.reshape(-1), minlength=len(curvature))).to(device)
        self.curvature = torch.from_numpy(curvature).to(device) if head is not None else None
        self._rounds = Vocabulary(self.fisher, head)

    def __call__(self, start: int, rows: Tensor, level: str) -> QuantizedTensor:
        """Rows [R, D] from row `start` on. Raises `TooLarge`."""
        part = slice(start, start + len(rows))
        return self._rounds(rows, self.counts[part], None if self.curvature is None else self.curvature[part], level)

    def gain(self, start: int, rows: Tensor, level: str) -> float:
        """What int8 saves for these rows."""
        return self._cost(start, rows, level) - self._cost(start, rows, FINE)

    def _cost(self, start: int, rows: Tensor, level: str) -> float:
        error = rows - torch.from_numpy(self(start, rows, level).dequantize()).to(rows.device)
        part = slice(start, start + len(rows))
        uses = [(self.fisher, self.counts[part] / self.tokens)]
        if self.head is not None and self.curvature is not None:
            uses.append((self.head, self.curvature[part] / self.tokens))
        return row_cost(error, uses)
