"""The learning rate as a function of the step, the tokens seen, and the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from train.config import TrainConfig

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
"""From 1 to 0 while `done` goes from 0 to 1: linear, Hägele et al. 2024, and Loshchilov & Hutter 2017."""


def warmup_of(c: TrainConfig, step: int, tokens: int) -> float:
    """Steps of warm-up; of one by tokens, in steps of the mean size so far."""
    by_tokens = c.schedule.warmup_tokens
    return c.warmup if by_tokens is None else step * by_tokens / max(1, tokens)


def factor(c: TrainConfig, step: int, tokens: int) -> float:
    """The share of the peak learning rate at step 1..steps, `tokens` seen with this step's.

    Warm-up of w steps is linear, step / (w + 1). A warm-up by tokens ends when they have been seen: w is then counted
    in steps of the mean size so far. After it, with x = (step - w) / (steps - w),

        cosine, linear    final + (1 - final) decay(x)
        wsd               1; over the last `decay` of all steps final + (1 - final) decay(y), y the share of them that
                          is done (Hu et al. 2024)
        inverse_sqrt      sqrt((w + 1) / step)  (Vaswani et al. 2017)
        constant          1
    """
    s, warmup = c.schedule, warmup_of(c, step, tokens)
    if step <= warmup:
        return step / (warmup + 1)
    if s.kind == "inverse_sqrt":
        return math.sqrt((warmup + 1) / step)
    if s.kind == "constant":
        return 1.0
    begins, shape = warmup, s.kind
    if s.kind == "wsd":
        assert s.decay is not None and s.decay_shape is not None, "wsd has them"
        begins, shape = (1 - s.decay) * c.steps, s.decay_shape
    done = min(1.0, max(0.0, (step - begins) / max(1, c.steps - begins)))
    assert s.final is not None, "a schedule that decays has it"
    return s.final + (1 - s.final) * DECAYS[shape](done)


def describe(c: TrainConfig) -> str:
    """The schedule in a line."""
    s, peak = c.schedule, c.optimizer.peak
    warmup = f"{c.warmup:,} steps" if s.warmup_tokens is None else f"{s.warmup_tokens:,} tokens"
    falls = "" if s.final is None else f" to {s.final * peak:g}"
    over = "" if s.decay is None else f" over the last {s.decay:.0%} ({s.decay_shape})"
    return f"{peak:g} after {warmup} of warm-up, {s.kind}{falls}{over}"
