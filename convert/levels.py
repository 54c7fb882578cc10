"""The levels that a user can name: the portable ones (`spec.levels`), and the backends' own types."""

from __future__ import annotations

from collections.abc import Sequence

from spec.errors import UserError, nearest
from spec.levels import CODES, GROUPS, LEVELS, Level, fits, takes

__all__ = ["CODES", "GROUPS", "LEVELS", "Level", "check", "fits", "takes"]


def check(name: str, known: Sequence[str], backend: str = "", where: str = "") -> str:
    """`name` in lower case if a backend knows it. `where`: the words that named it. Raises `UserError` with the nearest
    level and all that there are."""
    level = name.lower()
    if level in known:
        return level
    hint = nearest(level, known)
    every = "" if hint.startswith("known") else f"; known: {', '.join(sorted(known, key=list(known).index))}"
    what = f"no level of {backend}" if backend else "no such level"
    raise UserError(f"{where or f'--quant {name}'}: {what} ({hint}{every})")
