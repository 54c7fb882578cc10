"""Kinds of values that several sections share. Not strict as in a spec: values come from the command line too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from spec.errors import Problem

Size = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def unused(where: str, section: BaseModel, names: tuple[str, ...], rule: str, fix: str = "") -> list[Problem]:
    """A problem for each of these fields that is not at its default: nothing that is set is left unread in silence."""
    fields = {name: type(section).model_fields[name].default for name in names}
    values = {name: getattr(section, name) for name in names}
    return [
        Problem(f"{where}.{name}", value, rule, fix or f"leave it at {fields[name]}")
        for name, value in values.items()
        if value != fields[name]
    ]


def file_of(kind: str) -> str:
    """The file of a choice `path/to/file.py:name` of the user's own, or nothing."""
    file, _, name = kind.rpartition(":")
    return file if file.endswith(".py") and name.isidentifier() else ""


def absolute(path: str) -> str:
    """A local path from the root, since a run may be resumed from another folder; nothing and `hf:` stay."""
    return path if not path or path.startswith("hf:") else str(Path(path).expanduser().absolute())
