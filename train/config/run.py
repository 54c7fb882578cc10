"""What a run does beside training: scoring, saving, watching."""

from __future__ import annotations

from spec.config import Model
from train.config.fields import Size


class Validation(Model):
    """When the held-out documents are scored."""

    every: Size | None = None
    """Steps between two scores; none = a fifth of all steps, at least 20. The last step is always scored."""
    tokens: Size = 32768
    """Tokens scored, spread evenly over the held-out documents."""


class Checkpoint(Model):
    """When the run is saved."""

    every: Size = 100
    """Steps between two checkpoints. The last step is always saved."""
    keep: Size = 2
    """Checkpoints kept, the newest."""


class Watch(Model):
    """What the run tells of itself, and what it does when the loss goes wrong."""
