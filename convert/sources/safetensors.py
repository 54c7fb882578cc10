"""Safetensors files by positioned reads: rows of a tensor as float32, and nothing of the file kept in memory.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data. A memory map
would count as resident memory, so rows are read with preadv into the buffer that they are returned in.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""
DTYPES: Mapping[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""Dtypes that weights come in, and how their bytes are read."""
WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
          "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: int
    """Number of the shard."""
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, from the start of the file."""

    @property
    def row(self) -> int:
        """Elements of a row, leading axes but the last flattened; a vector's rows have one."""
        return self.shape[-1] if len(self.shape) > 1 else 1


class Tensors:
    """The tensors of a folder's safetensors files, one or several. Raises `UserError` for a file that is not whole."""

    def __init__(self, folder: Path) -> None:
        self.files = _shards(folder)
        self.entries: dict[str, Entry] = {}
        self._fds: list[int] = []
        self._finalizer = weakref.finalize(self, _close, self._fds)
        for n, (path, expected) in enumerate(self.files.items()):
            try:
                fd = os.open(path, os.O_RDONLY)
            except OSError as e:
                raise UserError(f"{path}: {e.strerror}") from None
            self._fds.append(fd)
            entries = _header(fd, path, n)
            twice = sorted(set(entries) & set(self.entries))
            if twice:
                raise UserError(f"{path}: {twice[0]} is in another shard too")
            missing = sorted(expected - set(entries))
            if missing:
                raise UserError(f"{path}: {INDEX} says it holds {missing[0]}, and it does not ({len(missing)} such)")
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
        e = self.entries[name]
        dtype = np.dtype(DTYPES[e.dtype]).newbyteorder("<")
        raw = np.empty((stop - start) * e.row, dtype)
        self._read(e, start * e.row * dtype.itemsize, raw)
        if e.dtype == "BF16":
            wide = np.empty(raw.shape, np.uint32)
            np.left_shift(raw, np.uint32(16), out=wide, dtype=np.uint32, casting="unsafe")
            values = wide.view(np.float32)
        else:
            values = raw.astype(np.float32, copy=False)
        return values.reshape(stop - start, e.row) if len(e.shape) > 1 else values

    def _read(self, e: Entry, skip: int, into: NDArray[Any]) -> None:
        view, at = memoryview(into.data).cast("B"), e.offset + skip
        done = 0
        while done < len(view):
            got = os.preadv(self._fds[e.file], [view[done:]], at + done)
            if not got:
                raise UserError(f"{list(self.files)[e.file]}: became shorter while it was read")
            done += got


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _shards(folder: Path) -> dict[Path, frozenset[str]]:
    """The weight files of a folder and the tensors that an index promises in each."""
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        return {single: frozenset()}
    if not index.is_file():
        other = next((p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pth"))), None)
        hint = f"; {other} is a pickle: save it as safetensors (transformers' save_pretrained does)" if other else ""
        raise UserError(f"{folder}: no {WEIGHTS} and no {INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: weight_map is no mapping of tensors to files")
    shards = {folder / str(name): frozenset(k for k, v in weight_map.items() if v == name)
              for name in sorted(set(weight_map.values()))}  # fmt: skip
    outside = [p.name for p in shards if p.parent != folder]
    if outside:
        raise UserError(f"{index}: {outside[0]} lies outside the folder")
    absent = [p.name for p in shards if not p.is_file()]
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(shards)} shards are missing: {', '.join(absent)}")
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a `UserError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON: {str(e) or type(e).__name__}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object")
    return data


def _header(fd: int, path: Path, file: int) -> dict[str, Entry]:
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
        header = json.loads(os.pread(fd, length, 8).decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("no mapping")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: corrupt header: {str(e) or type(e).__name__}") from None
    header.pop("__metadata__", None)
    data = 8 + length
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, Entry] = {}
    for name, item in header.items():
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key appears twice")
    return out


def _whole(values: Any) -> list[int] | None:
    return values if isinstance(values, list) and all(type(v) is int and v >= 0 for v in values) else None


def _entry(path: Path, name: str, item: Any, file: int, data: int) -> tuple[int, int, Entry]:
    fields = item if isinstance(item, dict) else {}
    dtype, shape, span = fields.get("dtype"), _whole(fields.get("shape")), _whole(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or span is None or len(span) != 2 or span[0] > span[1]:
        raise UserError(f"{path}: corrupt header: {name} has no sound dtype, shape and data_offsets")
    if dtype not in WIDTHS:
        raise UserError(f"{path}: {name} has dtype {dtype}, which is not supported (F32, F16 and BF16 are)")
    need = prod(shape) * WIDTHS[dtype]
    if need != span[1] - span[0]:
        raise UserError(
            f"{path}: corrupt header: {name} {dtype} {shape} needs {need} bytes, its offsets span {span[1] - span[0]}"
        )
    return span[0], span[1], Entry(file, dtype, tuple(shape), data + span[0])
