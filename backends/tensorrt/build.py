"""Writing the folder: the portable graph first, row by row, then the engine that TensorRT builds of it.

`model.engine` is for one kind of GPU and one version of TensorRT, which the mark names; `onnx/` is the portable graph
with its weights; the tokenizer's files lie beside them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backends import narrow
from backends.base import Floats, Planned, Tokenizer, Values
from backends.folder import MARK, read_mark, stamp, write_json, write_mark, write_tokenizer
from backends.tensorrt import graph
from backends.tensorrt.device import Device, device
from backends.tensorrt.engine import build, limits
from backends.tensorrt.support import computed_in, recipe, support
from spec.config import Spec
from spec.errors import UserError
from spec.levels import GROUPS

__all__ = ["TensorRTWriter", "pack", "recipe", "size", "stamp", "writer"]

ENGINE = "model.engine"
KERNELS = 8_000_000
"""Bytes of an engine besides its weights, roughly (measured on small models: 4 to 8 MB)."""


class TensorRTWriter:
    """A `backends.base.Writer`."""

    def __init__(
        self,
        spec: Spec,
        planned: Sequence[Planned],
        tokenizer: Tokenizer | None,
        out: Path,
        level: str,
        compute: str,
        here: Device,
    ) -> None:
        self.spec, self.tokenizer, self.out, self.level, self.compute = spec, tokenizer, out, level, compute
        self._here = here
        try:
            self._graph = graph.writer(spec, planned, out / graph.FOLDER, compute)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor."""
        self._graph.write(name, start, values)

    def close(self, receipt: dict[str, Any]) -> None:
        """Build the engine, then what lies beside it, and at last the mark."""
        self._graph.close()
        bounds = limits(self.spec, self.compute)
        plan = build(self._here.trt, self.out / graph.FOLDER / graph.MODEL, bounds, timing=self._here.timing)
        try:
            with (self.out / ENGINE).open("wb") as f:
                f.write(plan)
                f.flush()
                os.fsync(f.fileno())
            write_tokenizer(self.out, self.tokenizer, self.spec.context)
            write_mark(self.out, "tensorrt", self.spec, self.level, {"compute": self.compute}, receipt)
            made_for = {"gpu": self._here.name, "tensorrt": self._here.version}
            write_json(self.out / MARK, read_mark(self.out) | {"engine": made_for})
        except OSError as e:
            raise UserError(f"{e.filename or self.out}: {e.strerror or e}") from None

    def abort(self) -> None:
        """Delete everything."""
        self._graph.abort()
        shutil.rmtree(self.out, ignore_errors=True)


def writer(
    spec: Spec,
    planned: Sequence[Planned],
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    level: str,
    metadata: dict[str, Any],
    threads: int,
    compute: str = "",
) -> TensorRTWriter:
    """A folder with an engine for the GPU of this machine. `metadata` and `threads` are not needed here.

    Raises `MissingDependency` without TensorRT and `UserError` without a GPU, before anything is written. The weights
    go through in blocks until `close`; then TensorRT holds the graph's weights, what it packs of them, and the engine
    in memory (see docs/tensorrt.md).
    """
    refusals = support(spec, level, compute=compute).refusals
    if refusals:
        raise UserError("\n".join(refusals))
    here = device("--to tensorrt")
    return TensorRTWriter(spec, planned, tokenizer, out, level, computed_in(level, compute), here)


def pack(block: Floats, level: str) -> narrow.Narrow:
    """Rows at one of TensorRT's own levels."""
    return narrow.quantize(block, level)


def ready() -> None:
    """Raises `UserError` in one line where no engine can be built: TensorRT or the GPU is missing."""
    device("--to tensorrt")


def size(spec: Spec, planned: Sequence[Planned], tokenizer: Tokenizer | None, *, compute: str = "") -> int:
    """Bytes of the folder, roughly: the weights once in the graph and once in the engine, and the engine's kernels."""
    matrices = {p.level for p in planned if len(p.shape) > 1}
    level = next((name for name in (*GROUPS, *narrow.LEVELS, "f16", "bf16") if name in matrices), "f32")
    words = len(str(tokenizer.json)) if tokenizer is not None else 0
    return 2 * graph.nbytes(spec, planned, computed_in(level, compute)) + KERNELS + 30_000 * spec.depth + words
