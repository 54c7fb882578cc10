"""What is at hand to build and run engines: TensorRT, torch, a GPU; or one line that says what is missing.

`tensorrt` is imported by its full name and only here, so that this package never stands in for it.
"""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spec.errors import MissingDependency, UserError

NEEDED = "IKVCacheUpdateLayer"
"""TensorRT has had caches that are written in place since 10.15."""


@dataclass(frozen=True)
class Device:
    """The GPU that engines are built on and for."""

    trt: Any
    torch: Any
    name: str
    version: str
    """TensorRT's."""

    @property
    def timing(self) -> Path:
        """Where this GPU's measured kernels are kept between builds."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return home / "allotrope" / (re.sub(r"[^A-Za-z0-9.]+", "-", f"tensorrt-{self.version}-{self.name}") + ".timing")


def device(what: str) -> Device:
    """TensorRT and the GPU. Raises `MissingDependency` or `UserError` in one line that begins with `what`."""
    found = {}
    for module in ("tensorrt", "torch"):
        try:
            found[module] = importlib.import_module(module)
        except ModuleNotFoundError:
            raise MissingDependency(
                f"{what}: needs {module}: pip install 'allotrope[tensorrt]' on a machine with an NVIDIA GPU "
                "(--to onnx --profile portable writes the graph on any)"
            ) from None
        except Exception as e:  # a library that is broken or too old for the driver
            raise UserError(f"{what}: {module} cannot be imported: {' '.join(str(e).split())[:200]}") from None
    trt, torch = found["tensorrt"], found["torch"]
    if not torch.cuda.is_available():
        raise UserError(
            f"{what}: torch sees no NVIDIA GPU here, and an engine is built on and for one "
            "(--to onnx --profile portable writes the graph on any machine)"
        )
    if not hasattr(trt, NEEDED):
        raise UserError(f"{what}: TensorRT {trt.__version__} is too old: pip install 'tensorrt>=10.15'")
    return Device(trt, torch, torch.cuda.get_device_name(), str(trt.__version__))
