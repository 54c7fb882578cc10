"""Hugging Face families: config.json to a spec and a table of weight names, by the rows that both are written by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.hf.carriers import Carrier
from convert.families.config import Config, Family
from spec.config import Spec
from spec.errors import UserError, nearest
from spec.load import parse

__all__ = ["Config", "Family", "Reading", "family", "read"]


@dataclass(frozen=True)
class Reading:
    """What a config.json says."""

    family: Family
    row: Carrier
    """The variant of its code."""
    spec: Spec


def family(data: Mapping[str, Any], source: str) -> Family:
    """The family of a config. Raises `UserError` that names the families there are, and what the nearest one could not
    place of this config."""
    from convert.families.expert_table import UNREAD
    from convert.families.table import FAMILIES

    model_type = data.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type in UNREAD:
        raise UserError(f"{source}: model_type: {model_type!r} is not read: {UNREAD[model_type]}")
    near = min(FAMILIES, key=lambda name: len(_unplaced(data, FAMILIES[name])))
    known = sorted(FAMILIES)
    hint = nearest(model_type, known) if isinstance(model_type, str) else ""
    hint = f"{hint}; " if hint and not hint.startswith("known") else ""
    left = _unplaced(data, FAMILIES[near])
    keys = f"; of its keys, {near}, the nearest, has no place for {', '.join(left)}" if left else ""
    raise UserError(f"{source}: model_type: {model_type!r} is no family that is read ({hint}known: {', '.join(known)})"
                    f"{keys}")  # fmt: skip


def read(data: Mapping[str, Any], source: str, name: str = "") -> Reading:
    """The spec that a config.json describes. Raises `UserError`, `SpecError` with everything that is wrong with it."""
    from convert.families import reader

    f = family(data, source)
    known = (f.architecture, *f.classes)
    named = data.get("architectures") or [f.architecture]
    if not (isinstance(named, list) and len(named) == 1 and named[0] in known):
        raise UserError(f"{source}: architectures: {named} is another function than {f.architecture}")
    c = Config(data, source, f)
    f.tidy(c)
    row = reader.choose(c)
    fields = reader.read(c, row)
    c.done()
    return Reading(f, row, parse({"name": name or f.name, **fields}, source))


def _unplaced(data: Mapping[str, Any], f: Family) -> list[str]:
    """Keys of a config that a family would not know."""
    from convert.families import reader

    c = Config(data, "", f)
    f.tidy(c)
    reader.read(c, reader.choose(c))
    return c.unplaced()
