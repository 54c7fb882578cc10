"""Hugging Face families: config.json to a spec and a table of weight names, by the rows that both are written by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
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
    known = f"\n{source}: families that are read: {', '.join(sorted(FAMILIES))}"
    if "text_config" in data or "vision_config" in data:
        raise UserError(f"{source}: model_type: {model_type!r} is multimodal, and folders of such models are not read; "
                        f"{_text_family(data)}{known}")  # fmt: skip
    near = min(FAMILIES, key=lambda name: len(_unplaced(data, FAMILIES[name])))
    hint = nearest(model_type, FAMILIES) if isinstance(model_type, str) else ""
    hint = f" ({hint})" if hint and not hint.startswith("known") else ""
    left = _unplaced(data, FAMILIES[near])
    keys = f"; of its keys, {near}, the nearest, has no place for {', '.join(left)}" if left else ""
    raise UserError(f"{source}: model_type: {model_type!r} is no family that is read{hint}{keys}{known}")


def _text_family(data: Mapping[str, Any]) -> str:
    """What is read of the text model in a multimodal one."""
    from convert.families.expert_table import UNREAD
    from convert.families.table import FAMILIES

    inner = data.get("text_config")
    names = [inner.get("model_type") if isinstance(inner, dict) else None, f"{data.get('model_type')}_text"]
    for name in (n for n in names if isinstance(n, str)):
        if name in FAMILIES:
            return f"the family of its text model is read from a folder of its own: {name}"
        if name in UNREAD:
            return f"nor is its text model, {name}: {UNREAD[name]}"
    stems = {n.removesuffix("_text"): n for n in FAMILIES}
    near = get_close_matches(next(n for n in names if isinstance(n, str)).removesuffix("_text"), stems, n=1)
    hint = f" (the nearest is {stems[near[0]]})" if near else ""
    return f"the family of its text model is none that is read{hint}"


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
