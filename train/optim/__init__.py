"""The optimizer, its learning rate, and what happens to gradients before it."""

from __future__ import annotations

from train.optim.build import build, clip, gradient_norm, learning_rate

__all__ = ["build", "clip", "gradient_norm", "learning_rate"]
