"""Checkpoints whose weights were trained through the grid of a level, as their safetensors files have them.

NAME          float32, codes times scales
NAME.scales   float32, [rows, columns / group]
metadata      `recipe`: what the run was for, JSON as a recipe file has it; `levels`: JSON, NAME to its level, of this
              file's matrices
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from spec.errors import UserError
from spec.levels import GROUPS

SCALES = ".scales"


def described(recipe: Mapping[str, Any] | None, levels: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata; nothing without a recipe."""
    return {} if recipe is None else {"recipe": json.dumps(recipe), "levels": json.dumps(levels)}


def read(files: Iterable[tuple[object, Mapping[str, str]]]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The recipe and the levels that the metadata of a checkpoint's files say; none of an ordinary one. `files`: each
    with its name. Raises `UserError` where they are damaged, or are not of one recipe."""
    found: list[dict[str, Any]] = []
    levels: dict[str, str] = {}
    for name, metadata in files:
        if "levels" not in metadata:
            found.append({})
            continue
        try:
            own, recipe = json.loads(metadata["levels"]), json.loads(metadata["recipe"])
            if not (isinstance(recipe, dict) and all(level in GROUPS for level in own.values())):
                raise ValueError("no levels")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{name}: its metadata (recipe, levels) names no levels that are known") from None
        found.append(recipe)
        levels |= own
    if any(r != found[0] for r in found):
        raise UserError(f"{', '.join(str(n) for n, _ in files)}: trained for different recipes: not of one checkpoint")
    return found[0] or None, levels


__all__ = ["SCALES", "described", "read"]
