"""Safetensors files by positioned reads: rows of a tensor as float32, and nothing of the file kept in memory.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.sources.files import open_file, parse_json, present, read_json
from convert.sources.store import FLOATS, RAW, WIDTHS, Placed, pread, widen
from spec.errors import UserError

WEIGHTS = "model.safetensors"
MAX_HEADER = 64_000_000
"""Bytes. The format allows 100 MB; the largest model's shards stay below 1 MB."""
MAX_AXES, MAX_NAME = 8, 500
Reader = Callable[[int, Path, int], dict[str, Placed]]
"""The tensors of a file: (descriptor, path, number of the file)."""


class Tensors:
    """The tensors of a folder's weight files, one or several. Raises `UserError` for a file that is not whole.

    weights: the name of a single file; NAME.index.json names several. read: how a file is read, safetensors' way.
    """

    def __init__(self, folder: Path, weights: str = WEIGHTS, read: Reader | None = None) -> None:
        self.files = shards(folder, weights)
        self.entries: dict[str, Placed] = {}
        self._fds: list[int] = []
        self._finalizer = weakref.finalize(self, _close, self._fds)
        for n, (path, expected) in enumerate(self.files.items()):
            fd = open_file(path)
            self._fds.append(fd)
            entries = (read or header)(fd, path, n)
            twice = sorted(set(entries) & set(self.entries))
            if twice:
                raise UserError(f"{path}: {twice[0]} is in another shard too")
            missing = sorted(expected - set(entries))
            if missing:
                raise UserError(f"{path}: {weights}.index.json says it holds {missing[0]}, and it does not "
                                f"({len(missing)} such)")  # fmt: skip
            self.entries |= entries

    def close(self) -> None:
        """Close the files."""
        self._finalizer()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(prod(e.shape) * WIDTHS[e.dtype] for e in self.entries.values())

    def fetch(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32, exactly; the leading axes of a stacked tensor are flattened."""
        return widen(self.raw(name, start, stop), self.entries[name].dtype)

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """The same rows as stored."""
        e = self.entries[name]
        dtype = np.dtype(RAW[e.dtype]).newbyteorder("<")
        rows = np.empty((stop - start) * e.row, dtype)
        pread(self._fds[e.file], e.offset + start * e.row * dtype.itemsize, rows, list(self.files)[e.file])
        return rows.reshape(stop - start, e.row) if len(e.shape) > 1 else rows


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def shards(folder: Path, weights: str) -> dict[Path, frozenset[str]]:
    """The weight files of a folder and the tensors that an index promises in each."""
    single, index = folder / weights, folder / f"{weights}.index.json"
    if present(single):
        return {single: frozenset()}
    if not present(index):
        raise UserError(f"{folder}: no {single.name} and no {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: weight_map is no mapping of tensors to files")
    outside = sorted(v for v in set(weight_map.values()) if not _plain(v))
    if outside:
        raise UserError(f"{index}: {outside[0][:80]!r} lies outside the folder")
    promised: dict[Path, set[str]] = {}
    for tensor, name in sorted(weight_map.items(), key=lambda item: item[1]):
        promised.setdefault(folder / name, set()).add(tensor)
    absent = [p.name for p in promised if not present(p)]
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(promised)} shards are missing: {', '.join(absent[:20])}")
    return {path: frozenset(names) for path, names in promised.items()}


def _plain(name: str) -> bool:
    """Whether it names a file of the folder itself."""
    return name not in ("", ".", "..") and not set("/\\\0") & set(name)


def header(fd: int, path: Path, file: int) -> dict[str, Placed]:
    """The tensors of a safetensors file, none of which may overlap, leave a gap or lie beyond its end."""
    size = os.fstat(fd).st_size
    lead = os.pread(fd, 8, 0)
    if len(lead) < 8:
        raise UserError(f"{path}: {size} bytes are no safetensors file")
    length = int.from_bytes(lead, "little")
    if length > MAX_HEADER:
        raise UserError(f"{path}: not a safetensors file (its first 8 bytes ask for a header of {length} bytes)")
    if 8 + length > size:
        raise UserError(f"{path}: truncated: the header has {length} bytes and the file {size}; copy it again")
    try:
        found = parse_json(os.pread(fd, length, 8))
        if not isinstance(found, dict):
            raise ValueError("no mapping")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: corrupt header: {str(e) or type(e).__name__}") from None
    found.pop("__metadata__", None)
    data = 8 + length
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, Placed] = {}
    for name, item in found.items():
        start, stop, entry = _entry(path, name, item, file, data)
        entries[name] = entry
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start < end:
            raise UserError(f"{path}: corrupt header: {name} overlaps the tensor before it")
        if start > end:
            raise UserError(f"{path}: corrupt header: {start - end} bytes before {name} belong to no tensor")
        end = stop
    if data + end > size:
        raise UserError(f"{path}: truncated: its header needs {data + end} bytes, it has {size}; copy it again")
    if data + end < size:
        raise UserError(f"{path}: {size - data - end} bytes after the last tensor belong to none; copy it again")
    return entries


def metadata(path: Path) -> dict[str, str]:
    """What a file whose `header` is sound says of itself."""
    with path.open("rb") as f:
        found = parse_json(f.read(int.from_bytes(f.read(8), "little"))).get("__metadata__")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _whole(values: Any) -> list[int] | None:
    sound = isinstance(values, list) and len(values) <= MAX_AXES
    return values if sound and all(type(v) is int and 0 <= v < 1 << 63 for v in values) else None


def _entry(path: Path, name: str, item: Any, file: int, data: int) -> tuple[int, int, Placed]:
    fields = item if isinstance(item, dict) else {}
    dtype, shape, span = fields.get("dtype"), _whole(fields.get("shape")), _whole(fields.get("data_offsets"))
    if len(name) > MAX_NAME or not name.isprintable():
        raise UserError(f"{path}: corrupt header: {name[:40]!r}... is no name of a tensor")
    if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2 or span[0] > span[1]:
        raise UserError(f"{path}: corrupt header: {name} has no sound dtype, shape and data_offsets")
    if dtype not in WIDTHS:
        raise UserError(f"{path}: {name} has dtype {dtype[:40]}, which is not supported (F32, F16 and BF16 are)")
    need = prod(shape) * WIDTHS[dtype]
    if need != span[1] - span[0]:
        raise UserError(
            f"{path}: corrupt header: {name} {dtype} {shape} needs {need} bytes, its offsets span {span[1] - span[0]}"
        )
    return span[0], span[1], Placed(dtype, tuple(shape), dtype in FLOATS, file, data + span[0])
