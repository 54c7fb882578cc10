"""Every runtime and format, behind one table. Nothing is imported before it is used."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from backends.base import Backend, Runtime, Support, recognise
from spec.errors import MissingDependency, UserError, nearest

REGISTRY: tuple[Backend, ...] = (
    Backend("torch", "backends.torch", "", "train", ("torch",), marks=("spec.yaml",), packages=("torch",)),
    Backend(
        "gguf", "backends.gguf", ".gguf", "gguf", ("gguf", "llama_cpp"), folder=False,
        packages=("gguf", "llama-cpp-python"), tool="llama-cli -m {name} -p 'Once upon a time'",
    ),
    Backend(
        "mlx", "backends.mlx", "", "mlx", (), ("mlx",), packages=("mlx", "mlx-lm"), hub="mlx",
        tool="mlx_lm.generate --model {name}{flags} --prompt 'Once upon a time'",
    ),
    Backend(
        "onnx", "backends.onnx", "", "onnx", ("onnx", "onnx_ir"), ("onnxruntime",), ("genai_config.json",),
        packages=("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai"),
    ),
    Backend(
        "tensorrt", "backends.tensorrt", "", "tensorrt", ("onnx", "onnx_ir"), ("tensorrt", "torch"),
        packages=("tensorrt", "onnx", "torch"),
    ),
    Backend("coreml", "backends.coreml", ".mlpackage", "coreml", ("coremltools",), packages=("coremltools",)),
    Backend(
        "hf", "backends.hf", "", "hf", (), ("torch", "transformers"), ("config.json",),
        packages=("transformers", "torch", "compressed-tensors"), hub="transformers",
    ),
)  # fmt: skip


def get(name: str) -> Backend:
    """A backend by name. Raises `UserError` with the nearest name."""
    for b in REGISTRY:
        if b.name == name:
            return b
    raise UserError(f"{name}: no such backend ({nearest(name, [b.name for b in REGISTRY])})")


def missing(backend: Backend, *, run: bool = True) -> list[str]:
    """Modules that converting to the backend, and with `run` also running it, needs and that are not installed."""
    wanted = (*backend.requires, *(backend.runs if run else ()))
    return [m for m in wanted if importlib.util.find_spec(m) is None]


def has(backend: Backend, name: str) -> bool:
    """Whether a backend has a `support`, `build`, `read` or `runtime` module."""
    try:
        return importlib.util.find_spec(f"{backend.module}.{name}") is not None
    except ModuleNotFoundError:
        return False


def versions(backend: Backend) -> dict[str, str]:
    """Versions of the distributions that a backend is made of, those that are installed."""
    out = {}
    for name in backend.packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return out


def devices(backend: Backend) -> list[str]:
    """Where an installed backend can run here, best first; empty where it cannot."""
    if missing(backend) or not has(backend, "runtime"):
        return []
    try:
        return list(part(backend, "runtime").devices())
    except Exception as e:  # a package that is there and does not import is that backend's trouble alone
        return [f"broken: {type(e).__name__}: {' '.join(str(e).split())[:120]}"]


def part(backend: Backend, name: str) -> Any:
    """A backend's `support`, `build`, `read` or `runtime` module. Raises `MissingDependency` in one line."""
    absent = [] if name == "support" else missing(backend, run=name == "runtime")
    if absent:
        raise MissingDependency(f"{backend.name} needs {', '.join(absent)}: pip install 'allotrope[{backend.extra}]'")
    return importlib.import_module(f"{backend.module}.{name}")


def support(name: str, spec: Any, level: str, **options: str) -> Support:
    """Whether backend `name` carries `spec` at a precision level; needs none of the backend's packages."""
    return part(get(name), "support").support(spec, level, **options)


def load(path: str | Path, backend: str | None = None, **options: Any) -> Runtime:
    """Open any artifact. Options are the backend's: threads, context, device, dtype, cache."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    found = get(backend) if backend else recognise(path, REGISTRY)
    if found is None:
        raise UserError(f"{path}: not an artifact of any backend ({', '.join(b.name for b in REGISTRY)})")
    check_options(found, options)
    return part(found, "runtime").load(path, **options)


def check_options(backend: Backend, options: Mapping[str, Any]) -> None:
    """Raises `UserError` for an option that the backend's runtime does not have."""
    if options.get("cache") is not None:
        _check_cache(backend, options["cache"])
    known = inspect.signature(part(backend, "runtime").load).parameters
    for name, value in options.items():
        if name not in known:
            raise UserError(f"{name}={value!r}: the {backend.name} backend has no such option (leave it out)")


def _check_cache(backend: Backend, asked: str) -> None:
    from backends.session import cache_types

    known = caches(backend)
    if not known:
        having = " and ".join(b.name for b in REGISTRY if caches(b))
        raise UserError(f"cache={asked!r}: {backend.name} keeps keys and values in the type that it computes in "
                        f"(leave it out; {having} have other types)")  # fmt: skip
    cache_types(asked, known)


def caches(backend: Backend) -> tuple[str, ...]:
    """Types that a backend's runtime can keep keys and values in, where it has a choice."""
    return tuple(getattr(part(backend, "support"), "CACHES", ())) if has(backend, "support") else ()
