"""ggml's own quantizers, called in the shared library that llama-cpp-python ships."""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.types import TYPES
from spec.errors import MissingDependency, UserError

_ROWS = 16
"""Rows a task: small enough to share out, large enough that the call costs nothing."""


@lru_cache(maxsize=1)
def library() -> Any:
    """libggml-base. Raises `MissingDependency` without llama-cpp-python."""
    found = find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise MissingDependency("native ggml types need llama-cpp-python: pip install 'allotrope[gguf]'")
    name = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")
    lib = ctypes.CDLL(str(Path(found.origin).parent / "lib" / name))
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return lib


def quantize(
    values: NDArray[np.float32], name: str, threads: int = 1, weights: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """[rows, cols] float32 to [rows, bytes] of a ggml type. ggml's code is single-threaded and leaves the GIL, so
    rows are shared out to `threads`. weights: [cols], positive, of the squared errors (`importance.conditioned`)."""
    kind, lib = TYPES[name], library()
    given = None if weights is None else np.ascontiguousarray(weights, np.float32)
    pointer = None if given is None else given.ctypes.data
    src = np.ascontiguousarray(values, np.float32)
    rows, cols = src.shape
    assert given is None or given.shape == (cols,), f"{given.shape} weights for {cols} columns"
    assert cols % kind.block == 0, f"{cols} weights a row are no whole {name} blocks"
    assert given is not None or not lib.ggml_quantize_requires_imatrix(kind.id), f"{name} needs importance"
    out = np.empty((rows, kind.nbytes(cols)), np.uint8)
    lib.ggml_quantize_init(kind.id)  # fills the lattice tables of the iq types; threads would race for it

    def task(start: int) -> None:
        n = min(_ROWS, rows - start)
        done = lib.ggml_quantize_chunk(kind.id, src[start:].ctypes.data, out[start:].ctypes.data, 0, n, cols, pointer)
        assert done == out[start : start + n].nbytes, f"ggml wrote {done} bytes"
        if not lib.ggml_validate_row_data(kind.id, out[start:].ctypes.data, done):
            raise UserError(f"ggml found no {name} scale for these weights (use --quant q4, or f16)")

    starts = range(0, rows, _ROWS)
    if threads <= 1 or len(starts) == 1:
        for s in starts:
            task(s)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(task, starts))
    return out
