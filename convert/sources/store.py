"""What a source reads its tensors from: names, shapes, and rows as float32, whatever file or layer they come out of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from spec.errors import UserError

WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
          "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
"""Bytes of an element, by safetensors' names of dtypes."""
RAW: Mapping[str, type[np.generic]] = {
    "F64": np.float64, "I64": np.int64, "U64": np.uint64, "F32": np.float32, "I32": np.int32, "U32": np.uint32,
    "F16": np.float16, "BF16": np.uint16, "I16": np.int16, "U16": np.uint16, "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8, "F8_E8M0": np.uint8, "I8": np.int8, "U8": np.uint8, "BOOL": np.uint8,
}  # fmt: skip
"""How their bytes are read."""
FLOATS = ("F32", "F16", "BF16")
"""Dtypes that weights come in by themselves."""


@dataclass(frozen=True)
class Entry:
    """A tensor. One that a layer decodes is `readable` whatever its dtype."""

    dtype: str
    shape: tuple[int, ...]
    readable: bool = True

    @property
    def row(self) -> int:
        """Elements of a row, leading axes but the last flattened; a vector's rows have one."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Rows, leading axes but the last flattened; a scalar has one."""
        return prod(self.shape[:-1]) if len(self.shape) > 1 else prod(self.shape)


@dataclass(frozen=True)
class Placed(Entry):
    """A tensor of little-endian rows, one after another in a file."""

    file: int = 0
    """Number of the file."""
    offset: int = 0
    """Of the first byte, from the start of the file."""


class Store(Protocol):
    """Tensors by their names outside."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What there is."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        ...

    def fetch(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32, exactly; the leading axes of a stacked tensor are flattened."""
        ...

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """The same rows in the dtype that `RAW` has for them."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def pread(fd: int, offset: int, into: NDArray[Any], path: object) -> None:
    """Fill an array from a place in a file. A memory map would count as resident memory."""
    view, done = memoryview(into.data).cast("B"), 0
    while done < len(view):
        try:
            got = os.preadv(fd, [view[done:]], offset + done)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None
        if not got:
            raise UserError(f"{path}: became shorter while it was read")
        done += got


def widen(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Floats of 32 bits or fewer as float32, exactly."""
    if dtype == "BF16":
        wide = np.empty(raw.shape, np.uint32)
        np.left_shift(raw, np.uint32(16), out=wide, dtype=np.uint32, casting="unsafe")
        return wide.view(np.float32)
    if dtype in TABLES:
        return TABLES[dtype][raw]
    assert dtype in ("F32", "F16"), f"{dtype} is not read as float32"
    return raw.astype(np.float32, copy=False)


def _e4m3() -> NDArray[np.float32]:
    """OCP 8-bit floats, E4M3: bias 7, no infinities, 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    normal = np.ldexp(1 + fraction / 8, exponent - 7)
    value = np.where(exponent == 0, np.ldexp(fraction / 8, -6), normal) * np.where(code & 128, -1, 1)
    value[(code & 127) == 127] = np.nan
    return value.astype(np.float32)


def _e8m0() -> NDArray[np.float32]:
    """OCP scale exponents: 2^(code - 127), 0xff is NaN."""
    value = np.ldexp(1.0, np.arange(256) - 127)
    value[255] = np.nan
    return value.astype(np.float32)


TABLES: Mapping[str, NDArray[np.float32]] = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),  # a float16's upper half
    "F8_E8M0": _e8m0(),
}
