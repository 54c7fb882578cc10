"""What is minimised."""

from __future__ import annotations

from spec.config import Model


class Loss(Model):
    """The loss of a token."""


class Experts(Model):
    """What keeps a mixture's router in balance. Nothing for specs without experts."""
