"""Functions and classes in a file of the user's own, which the configuration names as `path/to/file.py:name`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spec.errors import UserError, nearest
from train.config.fields import file_of


def load(field: str, kind: str) -> Callable[..., Any]:
    """What `kind` names. Raises `UserError` where the file is missing, broken, or has nothing callable of that name."""
    file, name = Path(file_of(kind)), kind.rpartition(":")[2]
    if not file.is_file():
        raise UserError(f"{field}: {file}: no such file")
    spec = importlib.util.spec_from_file_location(f"train_{field.partition('.')[0]}_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look a module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever the user's code raises
        raise UserError(f"{field}: {place(e, file)}: {type(e).__name__}: {e}") from None
    found = getattr(module, name, None)
    if not callable(found):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == spec.name]
        raise UserError(f"{field}: {file} has no function or class {name} ({nearest(name, own) if own else 'nor any'})")
    return found


def place(error: Exception, file: Path) -> str:
    """The last line of the user's file that an error passed."""
    if isinstance(error, SyntaxError):
        return f"{file}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
    return f"{file}:{lines[-1]}" if lines else str(file)
