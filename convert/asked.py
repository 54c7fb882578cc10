"""A recipe in words: the options of the command line, and recipe files.

level: q4
overrides:
  head: q8
  layers.*.attn.v: q8
bits: 4.7          # or size: 2GB
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.recipe import Recipe
from spec.errors import UserError, nearest

KEYS = ("level", "overrides", "bits", "size")
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def asked(
    quant: str | None = None,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    bits: float | None = None,
    size: str | None = None,
) -> Recipe | None:
    """What options and a recipe file ask for together: options go before the file, overrides behind its own. The level
    is empty where nothing names it; none where nothing is asked for. Raises `UserError`."""
    found = Recipe("") if file is None else read(file)
    words = tuple(_override(text) for text in overrides)
    budget = (found.bits, found.size)
    if bits is not None or size is not None:
        budget = (None if bits is None else _bits(bits, "--bits"), None if size is None else _size(size, "--size"))
    if None not in budget:
        raise UserError("--bits and --size: two budgets (give one)")
    whole = Recipe(quant or found.level, (*found.overrides, *words), *budget)
    return None if whole == Recipe("") else whole


def read(file: Path) -> Recipe:
    """A recipe file. Raises `UserError`, a line for each problem."""
    from spec.load import read_file, read_yaml

    try:
        text = read_file(file)
    except UserError as e:
        raise UserError(f"--recipe {e}") from None
    return from_dict(read_yaml(text, str(file), "a recipe"), str(file))


def from_dict(data: Mapping[str, Any], where: str) -> Recipe:
    """A recipe from plain data. Raises `UserError`, a line for each problem."""
    problems = [f"{key}: is no key of a recipe ({nearest(str(key), KEYS)})" for key in data if key not in KEYS]
    level, overrides = data.get("level") or "", data.get("overrides") or {}
    if not isinstance(level, str):
        problems.append(f"level: {level!r} is no name")
    if not isinstance(overrides, dict):
        problems.append("overrides: maps globs to levels, as in {head: q8}")
        overrides = {}
    wrong = [(glob, name) for glob, name in overrides.items() if not (isinstance(glob, str) and isinstance(name, str))]
    problems += [f"overrides: {glob!r}: {name!r}: a glob and a level are words" for glob, name in wrong]
    budget: dict[str, Any] = {}
    for key, parse in (("bits", _bits), ("size", _size)):
        try:
            budget[key] = None if data.get(key) is None else parse(data[key], f"{key}:")
        except UserError as e:
            problems.append(str(e))
    if problems:
        raise UserError("\n".join(f"{where}: {p}" for p in problems))
    return Recipe(str(level), tuple(overrides.items()), **budget)


def _override(text: str) -> tuple[str, str]:
    glob, equals, level = (part.strip() for part in text.rpartition("="))
    if not (glob and equals and level):
        raise UserError(f"--override {text}: is no GLOB=LEVEL, as in head=q8 or 'layers.*.attn.v=q8'")
    return glob, level


def _bits(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise UserError(f"{where} {value}: is no number of bits for a weight, as in 4.5")
    return float(value)


def _size(value: Any, where: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)", str(value).strip().lower())
    unit = UNITS.get(found[2].removesuffix("b") + "b" if found[2] not in ("", "b") else "") if found else None
    if found is None or unit is None or isinstance(value, bool) or float(found[1]) * unit < 1:
        raise UserError(f"{where} {value}: is no size, as in 2GB, 700MB or 1.5GiB")
    return int(float(found[1]) * unit)
