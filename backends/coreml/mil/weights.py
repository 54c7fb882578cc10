"""Core ML's weight file: blobs behind headers of 64 bytes, read a few rows at a time.

Layout (coremltools' MILBlob): a file header, then for every blob a header (sentinel, type, bytes, offset of the data,
padding bits) at the offset that the program names, and the data. Elements of less than a byte are packed from the
lowest bit on, row by row without gaps.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec.errors import UserError

_HEADER = struct.Struct("<IIQQQ")
_SENTINEL = 0xDEADBEEF

Array = NDArray[Any]

WIDTHS = {
    "FLOAT32": 32, "FLOAT16": 16, "INT32": 32, "UINT32": 32, "INT16": 16, "UINT16": 16, "INT8": 8, "UINT8": 8,
    "INT4": 4, "UINT6": 6, "UINT4": 4, "UINT3": 3, "UINT2": 2, "UINT1": 1,
}  # fmt: skip
"""Bits of an element, by the data type's name in the program."""
_WHOLE: dict[str, str] = {
    "FLOAT32": "<f4", "FLOAT16": "<f2", "INT32": "<i4", "UINT32": "<u4", "INT16": "<i2", "UINT16": "<u2",
    "INT8": "i1", "UINT8": "u1",
}  # fmt: skip


def unpack(data: bytes, dtype: str, count: int, skip: int = 0) -> Array:
    """`count` elements of less than a byte, behind `skip` bits: int8 or uint8."""
    width = WIDTHS[dtype]
    raw = np.frombuffer(data, np.uint8)
    if width == 4 and skip in (0, 4):
        values = np.empty(2 * len(raw), np.uint8)
        values[0::2], values[1::2] = raw & 15, raw >> 4
        values = values[skip // 4 :][:count]
    else:
        bits = np.unpackbits(raw, bitorder="little")[skip : skip + width * count].reshape(count, width)
        values = bits @ (1 << np.arange(width)).astype(np.uint8)
    return ((values ^ 8).astype(np.int8) - 8).astype(np.int8) if dtype == "INT4" else values


def decode(data: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    """A whole tensor from its bytes."""
    if dtype in _WHOLE:
        return np.frombuffer(data, _WHOLE[dtype], prod(shape)).reshape(shape)
    return unpack(data, dtype, prod(shape)).reshape(shape)


@dataclass(frozen=True)
class Blob:
    """A tensor in the weight file."""

    file: Path
    offset: int
    """Of its header."""
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def _place(self) -> tuple[int, int]:
        """Where the data begins, and its bytes. Raises `UserError` for a damaged file."""
        try:
            with self.file.open("rb") as f:
                f.seek(self.offset)
                header = f.read(_HEADER.size)
        except OSError as e:
            raise UserError(f"{self.file}: {e.strerror}") from None
        if len(header) < _HEADER.size:
            raise UserError(f"{self.file}: ends before its weights do")
        sentinel, _, size, start, _ = _HEADER.unpack(header)
        need = -(-prod(self.shape) * WIDTHS[self.dtype] // 8)
        if sentinel != _SENTINEL or size < need:
            raise UserError(f"{self.file}: no {self.dtype} tensor {list(self.shape)} at byte {self.offset}")
        return start, need

    def read(self) -> Array:
        """All of it."""
        start, size = self._place
        return decode(self._bytes(start, size), self.dtype, self.shape)

    def rows(self, first: int, last: int) -> Array:
        """Rows first..last of the leading axis, by one positioned read."""
        start, _ = self._place
        inner = prod(self.shape[1:])
        width = WIDTHS[self.dtype] * inner
        lo, hi = first * width, last * width
        data = self._bytes(start + lo // 8, -(-hi // 8) - lo // 8)
        shape = (last - first, *self.shape[1:])
        if self.dtype in _WHOLE:
            return decode(data, self.dtype, shape)
        return unpack(data, self.dtype, prod(shape), lo % 8).reshape(shape)

    def _bytes(self, start: int, size: int) -> bytes:
        with self.file.open("rb") as f:
            f.seek(start)
            data = f.read(size)
        if len(data) < size:
            raise UserError(f"{self.file}: ends before its weights do")
        return data
