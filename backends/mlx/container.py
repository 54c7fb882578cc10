"""Safetensors files written and read by positioned calls: the header is known before the first weight arrives.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data without gaps.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.folder import write_json
from spec.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = 5 * 10**9
"""Bytes of a file, as mlx-lm splits them."""
DTYPES: Mapping[str, Any] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "U32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
}  # fmt: skip
"""How the bytes of each dtype are held in NumPy."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file; a vector's rows are its elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes


def sharded(tensors: Sequence[Tensor], limit: int = SHARD) -> dict[str, list[Tensor]]:
    """File names and their tensors, in the given order; within a file the widest dtypes first, so that all are
    aligned."""
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for t in tensors:
        if groups[-1] and filled + t.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(t)
        filled += t.nbytes
    names = [WEIGHTS] if len(groups) == 1 else [
        f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)
    ]  # fmt: skip
    return {n: sorted(g, key=lambda t: -DTYPES[t.dtype].itemsize) for n, g in zip(names, groups, strict=True)}


def header(tensors: Sequence[Tensor]) -> bytes:
    """The head of a file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    at = 0
    for t in tensors:
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Output:
    """Files under construction in a folder. Raises `UserError` where the disk does not take them."""

    def __init__(self, folder: Path, files: Mapping[str, Sequence[Tensor]]) -> None:
        self.folder, self.files = folder, files
        self._places: dict[str, tuple[int, Path, int, Tensor]] = {}
        self._fds: list[int] = []
        for name, tensors in files.items():
            path, head = folder / name, header(tensors)
            total = len(head) + sum(t.nbytes for t in tensors)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                self._fds.append(fd)
                _reserve(fd, total)
            except OSError as e:
                raise UserError(f"{path}: {e.strerror}: {total / 1e6:,.1f} MB are needed") from None
            self._pwrite(fd, path, memoryview(head), 0)
            at = len(head)
            for t in tensors:
                self._places[t.name] = fd, path, at, t
                at += t.nbytes

    def put(self, name: str, row: int, data: NDArray[Any]) -> None:
        """Rows of a tensor, from `row` on, in its own dtype."""
        fd, path, at, t = self._places[name]
        assert data.dtype == DTYPES[t.dtype], f"{name}: {data.dtype} for {t.dtype}"
        self._pwrite(fd, path, np.ascontiguousarray(data).data.cast("B"), at + row * t.row_bytes)

    def _pwrite(self, fd: int, path: Path, view: memoryview, at: int) -> None:
        try:
            while view:
                n = os.pwrite(fd, view, at)
                view, at = view[n:], at + n
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None

    def close(self) -> None:
        """Flush to disk, and the index of several files beside them."""
        for fd in self._fds:
            os.fsync(fd)
        self.shut()
        if len(self.files) > 1:
            total = sum(t.nbytes for tensors in self.files.values() for t in tensors)
            where = {t.name: name for name, tensors in self.files.items() for t in tensors}
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})

    def shut(self) -> None:
        """Close the files as they are."""
        while self._fds:
            with suppress(OSError):
                os.close(self._fds.pop())


def _reserve(fd: int, total: int) -> None:
    """Claim the disk space now, so that a full disk shows before an hour of work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, total)
    else:
        os.ftruncate(fd, total)


class Input:
    """The tensors of a folder. Raises `UserError` for files that are missing or not whole."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.paths = _files(folder)
        self._places: dict[str, tuple[int, Path, int]] = {}
        self._fds: list[int] = []
        self._finalizer = weakref.finalize(self, _close, self._fds)
        for path in self.paths:
            try:
                fd = os.open(path, os.O_RDONLY)
            except OSError as e:
                raise UserError(f"{path}: {e.strerror}") from None
            self._fds.append(fd)
            try:
                self._parse(fd, path)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                if isinstance(e, UserError):
                    raise
                raise UserError(f"{path}: not a safetensors file, or its head is damaged") from None

    def _parse(self, fd: int, path: Path) -> None:
        size = os.fstat(fd).st_size
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(length)
        for name, entry in json.loads(os.pread(fd, length, 8)).items():
            if name == "__metadata__":
                continue
            t = Tensor(name, entry["dtype"], tuple(int(n) for n in entry["shape"]))
            first, last = entry["data_offsets"]
            if t.dtype not in DTYPES or not t.shape or last - first != t.nbytes:
                raise UserError(f"{path}: {name}: a {entry['dtype']} of shape {entry['shape']} in {last - first} bytes")
            if 8 + length + last > size:
                raise UserError(f"{path}: truncated: {name} ends beyond the file's {size} bytes")
            self.tensors[name] = t
            self._places[name] = fd, path, 8 + length + first

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop as they are stored."""
        t = self.tensors[name]
        fd, path, at = self._places[name]
        out = np.empty((stop - start, *t.shape[1:]), DTYPES[t.dtype])
        view, at = out.data.cast("B"), at + start * t.row_bytes
        while view:
            n = os.preadv(fd, [view], at)
            if not n:
                raise UserError(f"{path}: became shorter while it was read")
            view, at = view[n:], at + n
        return out

    def close(self) -> None:
        """Close the files."""
        self._finalizer()


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.is_file():
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / Path(str(n)).name for n in names]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{index}: damaged") from None
