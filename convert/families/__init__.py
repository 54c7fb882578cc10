"""Hugging Face families: each is a mapping from config.json to a spec and one table of weight names."""

from __future__ import annotations

import importlib

from convert.families.config import Family
from spec.errors import UserError, nearest

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama"}
"""model_type to the module that has its `Family` in `FAMILIES`."""


def family(model_type: object, source: str) -> Family:
    """The family of a config's model_type. Raises `UserError` that names the families there are."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = sorted(FAMILIES)
        hint = nearest(model_type, known) if isinstance(model_type, str) else "known: " + ", ".join(known)
        every = "" if hint.startswith("known") else f"; known: {', '.join(known)}"
        raise UserError(f"{source}: model_type: {model_type!r} is no family that is read yet ({hint}{every})")
    return importlib.import_module(f"convert.families.{FAMILIES[model_type]}").FAMILIES[model_type]
