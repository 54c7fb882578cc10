"""Every runtime and format, behind one table. Nothing is imported before it is used."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from backends.base import Backend, Runtime, Support, recognise
from spec.errors import MissingDependency, UserError, nearest

REGISTRY: tuple[Backend, ...] = (
    Backend("torch", "backends.torch", "", "train", ("torch",), ("spec.yaml",)),
    Backend("gguf", "backends.gguf", ".gguf", "gguf", ("gguf", "llama_cpp")),
)


def get(name: str) -> Backend:
    """A backend by name. Raises `UserError` with the nearest name."""
    for b in REGISTRY:
        if b.name == name:
            return b
    raise UserError(f"{name}: no such backend ({nearest(name, [b.name for b in REGISTRY])})")


def missing(backend: Backend) -> list[str]:
    """Modules that the backend needs and that are not installed."""
    return [m for m in backend.requires if importlib.util.find_spec(m) is None]


def part(backend: Backend, name: str) -> Any:
    """A backend's `support`, `build` or `runtime` module. Raises `MissingDependency` in one line."""
    absent = missing(backend) if name != "support" else []
    if absent:
        raise MissingDependency(f"{backend.name} needs {', '.join(absent)}: pip install 'allotrope[{backend.extra}]'")
    return importlib.import_module(f"{backend.module}.{name}")


def support(name: str, spec: Any, level: str) -> Support:
    """Whether backend `name` carries `spec` at a precision level; needs none of the backend's packages."""
    return part(get(name), "support").support(spec, level)


def load(path: str | Path, backend: str | None = None, **options: Any) -> Runtime:
    """Open any artifact. Options are the backend's: threads, context, device, dtype."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    found = get(backend) if backend else recognise(path, REGISTRY)
    if found is None:
        raise UserError(f"{path}: not an artifact of any backend ({', '.join(b.name for b in REGISTRY)})")
    return part(found, "runtime").load(path, **options)
