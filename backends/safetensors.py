"""Safetensors files as folders of several backends hold them: laid out before the first row arrives, written and read
at their final places.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data without holes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.placed import PlacedFile
from spec.errors import UserError

STORED: Mapping[str, str] = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<u4", "U32": "<u4", "I64": "<i8", "U8": "u1",
}  # fmt: skip
"""How the bytes of a dtype are handled in NumPy."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Hugging Face's names of one file, and of what says where the tensors of several are."""
WIDTHS = {name: np.dtype(kind).itemsize for name, kind in STORED.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file; a vector's rows are its elements, those of a stack of matrices are theirs."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[1:][-1:]) * WIDTHS[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * WIDTHS[self.dtype]


def narrow(x: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values rounded to nearest even at a float dtype, as stored. Raises `UserError` where one is too large for it, or
    no finite number to begin with."""
    if not np.isfinite(x).all():
        raise UserError(f"a value is {x[~np.isfinite(x)][0]}: the source is damaged")
    if dtype == "BF16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        out = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2")
        finite = bool(np.isfinite(widen(out, dtype)).all())
    else:
        with np.errstate(over="ignore"):
            out = x.astype(STORED[dtype])
        finite = bool(np.isfinite(out).all())
    if not finite:
        raise UserError(f"a value of {np.abs(x).max():.6g} is beyond {dtype.lower()}: use --quant f32")
    return out


def widen(x: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored values as float32, exactly."""
    if dtype == "BF16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def file_names(count: int) -> list[str]:
    """How Hugging Face names one file, or several."""
    return [WEIGHTS] if count == 1 else [
        f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)
    ]  # fmt: skip


def placed(groups: Iterable[Sequence[Tensor]], limit: int) -> dict[str, list[Tensor]]:
    """File names and their tensors, in the given order: as many in a file as `limit` bytes hold, at least one group; a
    group stays together."""
    files: list[list[Tensor]] = [[]]
    filled = 0
    for group in groups:
        size = sum(t.nbytes for t in group)
        if files[-1] and filled + size > limit:
            files.append([])
            filled = 0
        files[-1] += group
        filled += size
    return dict(zip(file_names(len(files)), files, strict=True))


def index_table(files: Mapping[str, Iterable[Tensor]]) -> dict[str, Any]:
    """What `INDEX` holds beside several files."""
    held = [(t, name) for name, tensors in files.items() for t in tensors]
    total = sum(t.nbytes for t, _ in held)
    return {"metadata": {"total_size": total}, "weight_map": {t.name: name for t, name in held}}


def header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and where each tensor begins. Wide dtypes come first, so that all are aligned."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    at, starts = 0, {}
    for t in sorted(tensors, key=lambda t: -WIDTHS[t.dtype]):
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        starts[t.name] = at
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: first + s for n, s in starts.items()}


class FileWriter:
    """One file with its header in place and its space claimed. Raises `UserError`."""

    def __init__(self, path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
        self.path = path
        lead, self._at = header(tensors, metadata)
        self.tensors = {t.name: t for t in tensors}
        self._file = PlacedFile(path, len(lead) + sum(t.nbytes for t in tensors))
        self._file.write(lead, 0)

    def rows(self, name: str, start: int, data: NDArray[Any]) -> None:
        """Rows start... of a tensor, in its stored dtype; elements start..., where the data are a vector."""
        t = self.tensors[name]
        assert data.dtype == np.dtype(STORED[t.dtype]), f"{name}: {data.dtype} for {t.dtype}"
        step = t.row_bytes if data.ndim > 1 else WIDTHS[t.dtype]
        self._file.write(data, self._at[name] + start * step)

    def columns(self, name: str, start: int, data: NDArray[Any]) -> None:
        """Columns start... of a matrix (of the matrices of a stack, one after another), given as rows: one write for
        each row of the file, nothing kept."""
        for at, row, rows in _strips(self.tensors[name], start, start + len(data)):
            for i, values in enumerate(np.ascontiguousarray(data[rows].T)):
                self._file.write(values, self._at[name] + at + i * row)

    def close(self) -> None:
        """Flush to disk."""
        self._file.close()

    def abort(self) -> None:
        """Close and delete."""
        self._file.abort()


def _strips(t: Tensor, start: int, stop: int) -> Iterator[tuple[int, int, slice]]:
    """For columns start..stop of a stack of matrices: where those of each begin, bytes from a row to the next, and
    which of the columns they are."""
    rows, cols = t.shape[-2:]
    for n in range(start // cols, (stop - 1) // cols + 1):
        left, right = max(start, n * cols), min(stop, (n + 1) * cols)
        yield (n * rows * cols + left - n * cols) * WIDTHS[t.dtype], t.row_bytes, slice(left - start, right - start)


class FileReader:
    """Rows of a file's tensors by positioned reads. Raises `UserError` for a file that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = int.from_bytes(f.read(8), "little")
                entries = json.loads(f.read(length)) if 2 <= length <= size - 8 else None
            self.metadata: dict[str, str] = entries.pop("__metadata__", {})  # type: ignore[union-attr]
            self.tensors = {n: Tensor(n, str(e["dtype"]), tuple(e["shape"])) for n, e in entries.items()}  # type: ignore[union-attr]
            spans = {n: (int(e["data_offsets"][0]), int(e["data_offsets"][1])) for n, e in entries.items()}  # type: ignore[union-attr]
            sizes = {n: t.nbytes for n, t in self.tensors.items()}
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{path}: not a safetensors file, or its head is damaged") from None
        for n, (start, stop) in spans.items():
            if stop - start != sizes[n]:
                raise UserError(f"{path}: {n}: {sizes[n]} bytes in a place of {stop - start}")
        end = 8 + length + max((stop for _, stop in spans.values()), default=0)
        if end != size:
            raise UserError(f"{path}: truncated or padded: its header needs {end} bytes, it has {size}")
        self._at = {n: 8 + length + start for n, (start, _) in spans.items()}

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop as stored."""
        t = self.tensors[name]
        out = np.empty((stop - start, *t.shape[1:][-1:]), STORED[t.dtype])
        with self.path.open("rb", buffering=0) as f:
            self._fill(
                f.fileno(), memoryview(out.view(np.uint8).reshape(-1).data), self._at[name] + start * t.row_bytes
            )
        return out

    def elements(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Elements start..stop of a tensor of any shape, as a vector."""
        t = self.tensors[name]
        out = np.empty(stop - start, STORED[t.dtype])
        with self.path.open("rb", buffering=0) as f:
            self._fill(f.fileno(), memoryview(out.view(np.uint8).data), self._at[name] + start * out.itemsize)
        return out

    def columns(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Columns start..stop of a matrix (of the matrices of a stack, one after another), as rows."""
        t = self.tensors[name]
        out = np.empty((stop - start, t.shape[-2]), STORED[t.dtype])
        with self.path.open("rb", buffering=0) as f:
            for at, row, rows in _strips(t, start, stop):
                part = np.empty((t.shape[-2], rows.stop - rows.start), out.dtype)
                for i, values in enumerate(part):
                    self._fill(f.fileno(), memoryview(values.view(np.uint8).data), self._at[name] + at + i * row)
                out[rows] = part.T
        return out

    def _fill(self, fd: int, into: memoryview, at: int) -> None:
        done = 0
        while done < len(into):
            got = os.preadv(fd, [into[done:]], at + done)
            if not got:
                raise UserError(f"{self.path}: became shorter while it was read")
            done += got
