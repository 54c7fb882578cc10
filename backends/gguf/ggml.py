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
from spec.errors import MissingDependency

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
    return lib


def quantize(values: NDArray[np.float32], name: str, threads: int = 1) -> NDArray[np.uint8]:
    """[rows, cols] float32 to [rows, bytes] of a ggml type. ggml's code is single-threaded and leaves the GIL, so
    rows are shared out to `threads`."""
    kind, lib = TYPES[name], library()
    src = np.ascontiguousarray(values, np.float32)
    rows, cols = src.shape
    assert cols % kind.block == 0, f"{cols} weights a row are no whole {name} blocks"
    out = np.empty((rows, kind.nbytes(cols)), np.uint8)
    lib.ggml_quantize_init(kind.id)  # fills the lattice tables of the iq types; threads would race for it

    def task(start: int) -> None:
        n = min(_ROWS, rows - start)
        done = lib.ggml_quantize_chunk(kind.id, src[start:].ctypes.data, out[start:].ctypes.data, 0, n, cols, None)
        assert done == out[start : start + n].nbytes, f"ggml wrote {done} bytes"

    starts = range(0, rows, _ROWS)
    if threads <= 1 or len(starts) == 1:
        for s in starts:
            task(s)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(task, starts))
    return out
