"""What int8 instead of a level's int4 saves, matrix by matrix, in nats of KL divergence for a token; and the embedding,
whose rows are looked up and not multiplied.

Shapes: R rows, C columns, D model, V vocab.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convert.calibrate import sizes
from convert.calibrate.boundary import Boundary
from convert.calibrate.compensate import Factor
from convert.calibrate.kinds import Kinds, Sums
from convert.calibrate.runner import Runner
from convert.calibrate.sensitivity import cost
from convert.calibrate.statistics import Moments

FINE = "q8"


def gain(weight: Tensor, level: str, factor: Factor, hessian: Tensor, squares: Tensor) -> float:
    """Of a product: weight [R, C], mean x x^T of its inputs and what it factorises to, mean squares [R] of the
    gradients at its outputs."""
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


def shares(runner: Runner, labels: Tensor, plain: Boundary, windows: int) -> Tensor:
    """How much each token counts for each kind of the head's rows, [windows * T, K] on the CPU, by the probabilities of
    the model as it is (`plain` after its last layer)."""
    sums, scores = Sums(labels.to(runner.device), runner.spec.width), runner.scores()
    rows = max(1, sizes.LOGITS // runner.spec.vocab_size)
    out = []
    for a, z in runner.chunks(windows):
        x = torch.from_numpy(plain.read(a, z)).flatten(0, -2).to(runner.device)
        out += [sums.shares(scores(part).exp()).cpu() for part in x.split(rows)]
    return torch.cat(out)


def answers(
    runner: Runner, labels: Tensor, curvature: NDArray[np.float64], counts: Tensor, stream: Boundary, windows: int
) -> Kinds:
    """The head's rows by kind, for inputs from `stream`, which count by `shares`."""
    norm, sums = runner.final_norm(), Sums(labels.to(runner.device), runner.spec.width)
    for a, z in runner.chunks(windows):
        x = torch.from_numpy(stream.read(a, z)).flatten(0, -2).to(runner.device)
        sums.answered(counts[a * runner.length : z * runner.length].to(runner.device), runner.end(norm, x))
    return sums.answer_kinds(torch.from_numpy(curvature).to(runner.device).float(), windows * runner.length)
