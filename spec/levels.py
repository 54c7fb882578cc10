"""The portable precision levels: the same numbers in every container. Native types are the backends' own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


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


LEVELS: Mapping[str, Level] = {
    level.name: level
    for level in (
        Level("f32", 32, None, "float32, bit for bit what a float32 checkpoint holds"),
        Level("bf16", 16, None, "bfloat16, rounded to nearest"),
        Level("f16", 16, None, "float16, rounded to nearest; weights beyond 65504 are refused"),
        Level("q8", 8, 32, "symmetric int8, a scale for 32 weights"),
        Level("q4", 4, 32, "symmetric int4, a scale for 32 weights; int8 where it pays most, at most 4.95 bits in all"),
        Level("q4-g128", 4, 128, "symmetric int4, a scale for 128 weights; int8 where it pays most, as q4"),
    )
}
"""Portable levels by name."""

CODES: Mapping[str, int] = {level.name: level.bits for level in LEVELS.values() if level.group}
"""Bits of a code at the levels that have codes and scales."""

GROUPS: Mapping[str, int] = {level.name: level.group for level in LEVELS.values() if level.group}
"""Weights that share a scale at these levels."""


def fits(level: str, width: int) -> bool:
    """Whether rows of `width` weights are whole groups at a level; rows that are not stay float16 on every target."""
    return width % GROUPS.get(level, 1) == 0


def takes(level: str, bits: int, group: int) -> bool:
    """Whether a level holds codes of `bits` bits with a scale for `group` weights as they are: codes fit into its own,
    and a scale is repeated where its groups are smaller."""
    return level in GROUPS and bits <= CODES[level] and group % GROUPS[level] == 0


def joined(levels: Iterable[str]) -> str:
    """The level that takes codes and scales of all these as they are: the widest codes, the smallest groups."""
    found = set(levels)
    return min((x for x in GROUPS if all(takes(x, CODES[y], GROUPS[y]) for y in found)), key=lambda x: LEVELS[x].stored)
