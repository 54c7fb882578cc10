"""The head of a GGUF file, parsed without reading its tensors (format version 3).

The `gguf` package's reader maps the file and makes an object for every element of an array: seconds and hundreds of
megabytes for a large vocabulary. A converter only wants the keys and where the tensors lie.
"""

from __future__ import annotations

import re
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

MAX_HEAD = 1 << 29
"""Bytes of a file's head that are read at most: the largest vocabularies and their merges take 30 MB."""
MAX_ITEMS = 1 << 24
"""Tensors, keys, or elements of an array at most."""


class Damaged(ValueError):
    """What is wrong with a head, in a few words."""


@dataclass(frozen=True)
class Info:
    """A tensor in the file: type name, NumPy shape, absolute offset, and the file where there are several."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    file: Path = Path()

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
    """Parse the head. Raises `UserError` where the file is no whole GGUF; nothing is allocated that it has not."""
    out = parse(path)
    if not isinstance(out.keys.get("general.architecture"), str):
        raise UserError(f"{path}: a GGUF file without general.architecture: not a model, or not the first of its files")
    return out


def parse(path: Path) -> Header:
    """Parse a head that need not be a model's. Raises `UserError`."""
    try:
        with path.open("rb") as f:
            end = f.seek(0, 2)
            f.seek(0)
            out = _Parser(f, end, path).parse()
    except Damaged as e:
        raise UserError(f"{path}: not a GGUF file, or its head is damaged: {e}") from None
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, MemoryError, OverflowError):
        raise UserError(f"{path}: not a GGUF file, or its head is damaged") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    last = out.data
    for t in sorted(out.tensors.values(), key=lambda t: t.offset):
        if t.offset < last:
            raise UserError(f"{path}: damaged: {t.name} begins inside the tensor before it")
        last = t.offset + t.rows * t.row_bytes
        if last > end:
            raise UserError(f"{path}: truncated: {t.name} ends beyond the file's {end} bytes")
    return out


def read_split(path: Path) -> Header:
    """The head of a model in one file, or in several named `...-00001-of-0000N.gguf`, of which `path` is any.

    Keys are the first file's; tensors are those of all. Raises `UserError` where one is missing or another model's.
    """
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    files = [path]
    if name is not None:
        files = [path.with_name(f"{name[1]}-{i:05d}-of-{name[3]}.gguf") for i in range(1, int(name[3]) + 1)]
        absent = [f.name for f in files if not f.is_file()]
        if absent or not files:
            raise UserError(f"{path}: {len(absent)} of {name[3]} files are missing: {', '.join(absent[:3])}")
    out = read_header(files[0])
    promised = out.keys.get("split.count", 1)
    if promised not in (0, len(files)):
        raise UserError(f"{files[0]}: one of {promised} files (split.count), and it is named as one of {len(files)}")
    for n, file in enumerate(files[1:], 1):
        part = parse(file)
        if part.keys.get("split.no") != n or part.keys.get("split.count") != len(files):
            raise UserError(f"{file}: split.no and split.count do not say that it is file {n + 1} of {len(files)}")
        twice = sorted(set(out.tensors) & set(part.tensors))
        if twice:
            raise UserError(f"{file}: {twice[0]} is in another file too")
        out.tensors |= part.tensors
    total = out.keys.get("split.tensors.count", len(out.tensors))
    if len(files) > 1 and total != len(out.tensors):
        raise UserError(f"{path}: {len(out.tensors)} tensors in all files, split.tensors.count says {total}")
    return out


class _Parser:
    """Everything that a file says of its own sizes is compared with what is left of it before it is read."""

    def __init__(self, f: BinaryIO, size: int, path: Path) -> None:
        self.f, self.path = f, path
        self.left = min(size, MAX_HEAD)

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise Damaged(f"{n} bytes are announced where {self.left} are left")
        self.left -= n
        data = self.f.read(n)
        if len(data) != n:
            raise Damaged("it ends early")
        return data

    def count(self, n: int, least: int, what: str) -> int:
        """A number of things of at least so many bytes."""
        if n > MAX_ITEMS or n * least > self.left:
            raise Damaged(f"{n} {what}")
        return n

    def parse(self) -> Header:
        out = Header()
        magic, version, tensors, keys = struct.unpack("<4sIQQ", self.take(24))
        if magic != b"GGUF":
            raise Damaged(f"it begins with {magic!r}")
        if version not in (2, 3):
            big = version and not version & 0xFFFF
            raise Damaged("big-endian, which is not read" if big else f"version {version} (2 and 3 are read)")
        for _ in range(self.count(keys, 13, "keys")):
            name = self.text()
            if name in out.keys:
                raise Damaged(f"key {name[:60]} is there twice")
            kind = self.number("<I")
            if kind == _STRING:
                out.text_at[name] = (self.f.tell() + 8, 0)
            out.keys[name] = self.value(kind)
            if kind == _STRING:
                start = out.text_at[name][0]
                out.text_at[name] = (start, self.f.tell() - start)
        infos = list(self.infos(self.count(tensors, 24, "tensors")))
        align = out.keys.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1) or align > 1 << 20:
            raise Damaged(f"general.alignment of {align}")
        out.data = -(-self.f.tell() // align) * align
        out.tensors = {n: Info(n, t, s, out.data + o, self.path) for n, t, s, o in infos}
        if len(out.tensors) != len(infos):
            raise Damaged("a tensor is there twice")
        return out

    def infos(self, count: int) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
        for _ in range(count):
            name = self.text()
            dims = self.number("<I")
            if not 1 <= dims <= 4:
                raise Damaged(f"{name[:60]} has {dims} dimensions")
            shape = struct.unpack(f"<{dims}Q", self.take(8 * dims))[::-1]
            kind, offset = struct.unpack("<IQ", self.take(12))
            if kind not in BY_ID:
                raise Damaged(f"{name[:60]} is of type {kind}, which is not read")
            t = BY_ID[kind]
            if prod(shape) >= 1 << 48 or 0 in shape or shape[-1] % t.block:
                raise Damaged(f"{name[:60]} of shape {list(shape)} as {t.name}")
            yield name, t.name, shape, offset

    def number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise Damaged(f"a value of type {kind}")
            return self.number(_SCALARS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        if inner not in (_STRING, *_DTYPES):
            raise Damaged(f"an array of arrays or of type {inner}")
        if inner == _STRING:
            return [self.text() for _ in range(self.count(count, 8, "strings"))]
        dtype = np.dtype(_DTYPES[inner])
        self.count(count, dtype.itemsize, "numbers")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def read_rows(f: BinaryIO, t: Info, start: int, stop: int) -> NDArray[np.uint8]:
    """[stop - start, bytes] of a tensor by a positioned read (a vector is one row)."""
    f.seek(t.offset + start * t.row_bytes)
    data = f.read((stop - start) * t.row_bytes)
    if len(data) != (stop - start) * t.row_bytes:
        raise UserError(f"{t.file}: became shorter while {t.name} was read")
    return np.frombuffer(data, np.uint8).reshape(stop - start, t.row_bytes)
