"""What torch carries: every feature of the language, at every floating precision. Needs no torch."""

from __future__ import annotations

from backends.base import Support
from spec.config import Spec

LEVELS = ("f32", "bf16", "f16")


def levels() -> tuple[str, ...]:
    """Precision levels of a checkpoint folder."""
    return LEVELS


def support(spec: Spec, level: str) -> Support:
    """Whether torch carries `spec` at `level`."""
    if level in LEVELS:
        return Support("torch", carrier="checkpoint")
    return Support("torch", refusals=(f"level: {level} is no precision of a torch checkpoint ({', '.join(LEVELS)})",))
