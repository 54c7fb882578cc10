"""The portable precision levels: the same numbers in every container. Native types are the backends' own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spec.errors import UserError, nearest


@dataclass(frozen=True)
class Level:
    """How one tensor is stored."""

    name: str
    bits: int
    """Bits of a code, or of a float."""
    group: int | None = None
    """Weights that share a 16-bit scale; none for floats."""
    about: str = ""

    @property
    def stored(self) -> float:
        """Bits per weight, scales counted."""
        return self.bits + (16 / self.group if self.group else 0)


LEVELS = {
    level.name: level
    for level in (
        Level("f32", 32, None, "float32, bit for bit what a float32 checkpoint holds"),
        Level("bf16", 16, None, "bfloat16, rounded to nearest"),
        Level("f16", 16, None, "float16, rounded to nearest; weights beyond 65504 are refused"),
        Level("q8", 8, 32, "symmetric int8, a scale for 32 weights"),
        Level("q4", 4, 32, "symmetric int4, a scale for 32 weights; int8 where it pays most, at most 4.95 bits in all"),
    )
}
"""Portable levels by name."""


def check(name: str, known: Sequence[str], backend: str = "") -> str:
    """`name` in lower case if a backend knows it. Raises `UserError` with the nearest level and all that there are."""
    level = name.lower()
    if level in known:
        return level
    hint = nearest(level, known)
    every = "" if hint.startswith("known") else f"; known: {', '.join(sorted(known, key=list(known).index))}"
    what = f"no level of {backend}" if backend else "no such level"
    raise UserError(f"--quant {name}: {what} ({hint}{every})")
