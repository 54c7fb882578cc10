"""What a calibration will take: tokens, time, memory, disk, by formulas and one measured product. Needs no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backends.base import Planned
from convert.calibrate.sample import Sample, sample
from convert.calibrate.settings import TOKENS, Settings
from convert.calibrate.sizes import CHUNK, HESSIANS, KINDS, LOGITS, ROWS
from convert.levels import GROUPS
from convert.sources import Source
from spec.config import Spec
from spec.cost import flops
from spec.params import params

PASSES = 8
"""Forward passes that the run amounts to: one measures, two differentiate, the others lead to each product in turn, in
the model as it is and in the rounded one."""
MARGIN = 1.5
"""What norms, softmax, copies and the disk take beside products."""
KEPT = 24
"""Widest rows that differentiating a layer keeps for each token (measured; 8 where it only runs)."""
ENTERED = ("attn.q.weight", "attn.o.weight", ".up.weight", ".down.weight")
"""One product for each input of a layer."""
BASE = 400 << 20
"""Bytes of the interpreter and torch."""


@dataclass(frozen=True)
class Expected:
    """What a calibration will take."""

    tokens: int
    text: str
    seconds: float
    """On this machine's processors as they are now, honest to a factor of about 2."""
    memory: int
    """Bytes at most."""
    disk: int
    """Bytes in the work folder at most."""


def expected(source: Source, settings: Settings, planned: Sequence[Planned]) -> Expected:
    """Reads the text, and no weight. Raises `UserError` where there is nothing in it to calibrate on."""
    made = sample(
        source.spec, source.tokenizer, settings.text, settings.tokens or TOKENS[settings.effort], settings.seed
    )
    widths = [p.shape for p in planned if p.level in GROUPS]
    work = made.tokens * _products(source.spec, made, bool(widths)) + sum(_solving(shape) for shape in widths)
    cores = len(os.sched_getaffinity(0))
    share = min(settings.threads or cores, cores) / cores
    seconds = MARGIN * work / (share * _rate()) + 10 * source.weights / 1e9 + 2
    return Expected(
        made.tokens,
        made.name,
        seconds,
        memory(source.spec, made, rounds=bool(widths)),
        disk(source.spec, made, rounds=bool(widths)),
    )


def memory(spec: Spec, made: Sample, rounds: bool) -> int:
    """Bytes at most: the largest layer, as much again for its codes and copies on the way, the moments of its widest
    group with room to solve, and the activations of the windows that run together; or the embedding's or head's share,
    with what tells its rows' kinds apart, and their Hessians."""
    layers = [0] * spec.depth
    widest: dict[str, int] = {}
    for p in params(spec):
        if p.name.startswith("layers."):
            layers[int(p.name.split(".")[1])] += 4 * p.size
            if p.matrix:
                widest[p.name] = p.shape[-1]
    width = max(widest.values())
    together = max(CHUNK, made.ids.shape[1])
    chunk = 4 * together * (KEPT if rounds else 8) * max(width, 2 * spec.width)
    rows = 4 * min(spec.vocab_size, made.tokens) * spec.width
    table, kinds = 4 * spec.vocab_size * spec.width, min(HESSIANS, KINDS * 4 * spec.width**2)
    head = max(5 * table, table + 5 * kinds) + 6 * 4 * LOGITS if rounds else rows
    moments = max(HESSIANS if ".experts." in "".join(widest) else 0, 12 * 4 * width * width) if rounds else 0
    solving = 12 * ROWS * spec.width * 4
    return BASE + chunk + max((2 if rounds else 1) * max(layers) + moments, head, rows + solving)


def disk(spec: Spec, made: Sample, rounds: bool) -> int:
    """Bytes at most: codes, the residual stream of every token before each layer and beside it, what enters the
    products of one layer, and how much each token counts for the head's kinds."""
    stream = 4 * made.tokens * spec.width
    if not rounds:
        return 3 * stream
    sizes = sum(p.size for p in params(spec) if p.matrix)
    entered = [0] * spec.depth
    for p in params(spec):
        if p.name.endswith(ENTERED) and p.role == "linear":
            entered[int(p.name.split(".")[1])] += p.shape[-1]
    return sizes * 9 // 8 + (spec.depth + 4) * stream + 4 * made.tokens * (max(entered) + KINDS)


def _products(spec: Spec, made: Sample, rounds: bool) -> int:
    """Operations a token."""
    forward = flops(spec, made.ids.shape[1])
    if not rounds:
        return forward
    moments = sum(4 * p.shape[-1] ** 2 for p in params(spec) if p.role == "linear")
    return PASSES * forward + moments


def _solving(shape: Sequence[int]) -> int:
    """Operations that a matrix's codes take: its Hessian factored and inverted, its errors spread."""
    rows, width = shape
    return 2 * width**3 + 2 * rows * width**2


def _rate() -> float:
    """Operations a second of all cores."""
    a = np.ones((768, 768), np.float32)
    np.dot(a, a)
    start = time.perf_counter()
    for _ in range(3):
        np.dot(a, a)
    return 3 * 2 * 768**3 / (time.perf_counter() - start)
