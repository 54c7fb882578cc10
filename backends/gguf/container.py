"""The head of a GGUF file, parsed without reading its tensors (format version 3).

The `gguf` package's reader maps the file and makes an object for every element of an array: seconds and hundreds of
megabytes for a large vocabulary. A converter only wants the keys and where the tensors lie.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from backends.gguf.types import BY_ID
from spec.errors import UserError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_DTYPES = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
           12: "<f8"}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Info:
    """A tensor in the file: type name, NumPy shape, absolute offset."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def row_bytes(self) -> int:
        return BY_TYPE[self.type].nbytes(self.shape[-1])

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])


BY_TYPE = {t.name: t for t in BY_ID.values()}


@dataclass
class Header:
    """Keys and tensors of a file; `text_at` says where the text of each string key lies (offset, bytes)."""

    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Info] = field(default_factory=dict)
    text_at: dict[str, tuple[int, int]] = field(default_factory=dict)
    data: int = 0

    @property
    def arch(self) -> str:
        return str(self.keys["general.architecture"])


def read_header(path: Path) -> Header:
    """Parse the head. Raises `UserError` where the file is no whole GGUF."""
    try:
        with path.open("rb") as f:
            out = _Parser(f).parse()
            end = f.seek(0, 2)
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, MemoryError, OverflowError):
        raise UserError(f"{path}: not a GGUF file, or its head is damaged") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    for t in out.tensors.values():
        if t.offset + t.rows * t.row_bytes > end:
            raise UserError(f"{path}: truncated: {t.name} ends beyond the file's {end} bytes")
    return out


class _Parser:
    def __init__(self, f: BinaryIO) -> None:
        self.f = f

    def parse(self) -> Header:
        out = Header()
        magic, version, tensors, keys = struct.unpack("<4sIQQ", self.f.read(24))
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("not GGUF")
        for _ in range(keys):
            name = self.text()
            kind = self.number("<I")
            if kind == _STRING:
                out.text_at[name] = (self.f.tell() + 8, 0)
            out.keys[name] = self.value(kind)
            if kind == _STRING:
                start = out.text_at[name][0]
                out.text_at[name] = (start, self.f.tell() - start)
        infos = list(self.infos(tensors))
        align = int(out.keys.get("general.alignment", 32))
        out.data = -(-self.f.tell() // align) * align
        out.tensors = {n: Info(n, BY_ID[t].name, s, out.data + o) for n, t, s, o in infos}
        return out

    def infos(self, count: int) -> Iterator[tuple[str, int, tuple[int, ...], int]]:
        for _ in range(count):
            name = self.text()
            dims = self.number("<I")
            shape = struct.unpack(f"<{dims}Q", self.f.read(8 * dims))[::-1]
            kind, offset = struct.unpack("<IQ", self.f.read(12))
            yield name, kind, shape, offset

    def number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.f.read(struct.calcsize(fmt)))[0]

    def text(self) -> str:
        n = self.number("<Q")
        data = self.f.read(n)
        if len(data) != n:
            raise ValueError("truncated")
        return data.decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(count)]
        dtype = np.dtype(_DTYPES[inner])
        data = self.f.read(count * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise ValueError("truncated")
        return np.frombuffer(data, dtype).tolist()


def read_rows(f: BinaryIO, t: Info, start: int, stop: int) -> NDArray[np.uint8]:
    """[stop - start, bytes] of a tensor by a positioned read (a vector is one row)."""
    f.seek(t.offset + start * t.row_bytes)
    data = f.read((stop - start) * t.row_bytes)
    return np.frombuffer(data, np.uint8).reshape(stop - start, t.row_bytes)
