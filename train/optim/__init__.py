"""The optimizer, its learning rate, and what happens to gradients before it."""

from __future__ import annotations

from train.optim.build import Optimizer, build
from train.optim.clip import clip, gradient_norm
from train.optim.kinds import check, kind
from train.optim.schedule import describe, factor, warmup_of
from train.optim.state import load_state, state, wanted

__all__ = [
    "Optimizer",
    "build",
    "check",
    "clip",
    "describe",
    "factor",
    "gradient_norm",
    "kind",
    "load_state",
    "state",
    "wanted",
    "warmup_of",
]
