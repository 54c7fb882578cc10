"""The one door to `backends.onnx`: the portable graph that engines are built from, with caches of fixed length.

It lies in a folder of the artifact, beside the engine: the weights can be read back from it, and an engine for another
GPU can be built from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends.base import Floats, Planned
from backends.onnx.kernels import Kernel, kernel
from backends.onnx.layout import MODEL, decode, encode, layout
from backends.onnx.support import HOLDS, session
from spec.config import Attention, Spec

if TYPE_CHECKING:
    from backends.onnx.build import GraphWriter
    from backends.onnx.read import GraphReader

__all__ = ["FOLDER", "HOLDS", "MODEL", "exact", "nbytes", "reader", "rounded", "session", "writer", "written_out"]

FOLDER = "onnx"
"""Where the graph lies in the artifact."""


def writer(spec: Spec, planned: Sequence[Planned], out: Path, compute: str) -> GraphWriter:
    """A writer of the graph and its weights into folder `out`: `write`, `close()`, `abort()`."""
    from backends.onnx.build import GraphWriter

    # the look-up of a dequantized table folds into one kernel in TensorRT, and it has no uint8 operators for codes
    # it has no Unique, and runs a loop over experts from the host: all experts run
    return GraphWriter(
        spec, planned, out, profile="portable", compute=compute, cache="static", rows_first=False, loops=False
    )


def reader(artifact: Path, spec: Spec) -> GraphReader:
    """The graph of an artifact, for its weights: `rows`, `problems(planned, compute)`."""
    from backends.onnx.read import GraphReader

    return GraphReader(artifact / FOLDER, spec, "portable")


def written_out(a: Attention, compute: str) -> bool:
    """Whether a layer's attention scores are a tensor: what no fused kernel of TensorRT's computes."""
    return compute == "f32" or kernel(a, "portable", compute) is Kernel.DECOMPOSED


def nbytes(spec: Spec, planned: Sequence[Planned], compute: str) -> int:
    """Bytes of the weights and constants."""
    return layout(spec, planned, "portable", compute).nbytes


def exact(artifact: Path, compute: str) -> bytes:
    """The serialized graph of an artifact, its 16-bit arithmetic widened to float32, on the same weights."""
    from backends.onnx.exact import exact_model

    return exact_model(artifact / FOLDER, compute)


def rounded(values: Floats, level: str) -> Floats:
    """Float32 values as a float level holds them."""
    return decode(encode(values, level), level).reshape(values.shape)
