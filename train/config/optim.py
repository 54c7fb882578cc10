"""The optimizer, what happens to gradients before it, and the learning rate over the steps."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from spec.config import Model, Positive, Probability
from train.config.fields import Count, Fraction, NonNegative, Size


class Optimizer(Model):
    """AdamW (Loshchilov & Hutter 2019), and what happens to the gradients before it."""

    lr: Positive = 1.5e-3
    """Peak learning rate."""
    betas: Annotated[tuple[Probability, Probability], Parameter(negative="")] = (0.9, 0.99)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of the matrices."""
    decay_embeddings: bool = False
    """Whether embeddings decay too (a tied head is an embedding)."""
    decay_norms: bool = False
    """Whether norm gains, biases and attention sinks decay too."""
    clip: Positive | None = 1.0
    """Largest global norm of the gradients; none = no clipping."""
    max_skipped: Size = 10
    """The run ends after this many steps in a row whose loss or gradients are not finite."""


class Schedule(Model):
    """The learning rate over the steps: linear warm-up, then half a cosine."""

    warmup: Count | None = None
    """Steps of warm-up; none = a twentieth of all steps."""
    final: Fraction = 0.05
    """Learning rate of the last step, as a share of the peak."""
