"""Writing a GGUF file: the whole layout is known before the first weight arrives, so rows go to their final place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Planned, QuantizedTensor, Tokenizer, Values
from backends.gguf import metadata as meta
from backends.gguf.fit import Fit, choose
from backends.gguf.importance import Importance, Lookup, conditioned, even
from backends.gguf.names import Piece, Slot, slots
from backends.gguf.pack import pack
from backends.gguf.recipe import recipe
from backends.gguf.tokenizer import display_name, tokenizer_metadata
from backends.gguf.twin import twin
from backends.gguf.types import TYPES, fitting, joined
from backends.placed import PlacedFile
from spec.config import Spec
from spec.errors import UserError
from spec.load import dump
from spec.params import params

__all__ = ["GGUFWriter", "even", "layout", "recipe", "size", "stamp", "twin", "writer"]

log = logging.getLogger(__name__)

ALIGNMENT = 32
EXACT = ("f32", "f16", "bf16")
"""Types whose rounding weighs nothing."""
SPEC_KEY = "allotrope.spec"
RECEIPT_KEY = "allotrope.receipt"


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of the file with its type and its place behind the header."""

    slot: Slot
    type: str
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        return prod(self.slot.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


def layout(spec: Spec, fit: Fit, planned: Sequence[Planned]) -> list[Stored]:
    """Types and offsets of every tensor. Vectors stay float32; matrices whose rows do not fit a type take its
    fallback."""
    levels = {p.name: p.level for p in planned}
    out, offset = [], 0
    for s in slots(spec, fit):
        kind, cols = s.type or "f32", s.shape[-1]
        if s.matrix and not s.type:
            kind = fitting(joined([levels[n] for n in ([p.name for p in s.pieces] or [s.like])]), cols)
        stored = Stored(s, kind, offset, TYPES[kind].nbytes(cols))
        out.append(stored)
        offset += -(-stored.nbytes // ALIGNMENT) * ALIGNMENT
    return out


def carrier(spec: Spec) -> Fit:
    """The carrier. Raises `UserError` with everything that stands in the way."""
    fit = choose(spec)
    if fit.refusals:
        from backends.gguf.support import support

        raise UserError("\n".join(support(spec, "f32").refusals))
    return fit


def _header(
    spec: Spec, fit: Fit, tensors: Sequence[Stored], tokenizer: Tokenizer | None, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Every key of the file but the receipt, which comes last."""
    arch = fit.carrier.arch
    matrices = [t.type for t in tensors if t.slot.matrix]
    common = max(set(matrices), key=matrices.count)
    out: dict[str, Any] = {
        "general.type": "model",
        "general.name": display_name(spec.name, tokenizer),
        "general.alignment": ALIGNMENT,
        "general.quantization_version": 2,
        "general.file_type": meta.FILE_TYPES.get(common, 1024),
    }
    for key, value in metadata.items():
        out[key if "." in key else f"general.{key}"] = value
    out |= {f"{arch}.{k}": v for k, v in meta.architecture(spec, fit).items()}
    out |= tokenizer_metadata(tokenizer, spec.vocab_size)
    out[SPEC_KEY] = dump(spec)
    return out


def _room(tensors: Sequence[Stored]) -> int:
    """Bytes kept for the receipt: it names every tensor with a hash, and grows once parity is measured."""
    return 16384 + 320 * len(tensors)


def _add(w: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    match value:
        case bool():
            w.add_bool(key, value)
        case int():
            w.add_uint32(key, value)
        case float():
            w.add_float32(key, value)
        case str():
            w.add_key_value(key, value, GGUFValueType.STRING)
        case bytes():
            w.add_key_value(key, value, GGUFValueType.ARRAY)
        case _:
            w.add_key_value(key, list(value), GGUFValueType.ARRAY)


def _write_header(path: Path, arch: str, keys: dict[str, Any], tensors: Sequence[Stored]) -> tuple[int, int]:
    """Header, metadata and tensor infos. Returns where the receipt's text ends and where tensor data begins."""
    import gguf

    w = gguf.GGUFWriter(None, arch)
    for key, value in keys.items():
        _add(w, key, value)
    for t in tensors:
        dims = t.slot.shape
        kind = gguf.GGMLQuantizationType(TYPES[t.type].id)
        w.add_tensor_info(t.slot.name, dims, np.dtype(np.float32), t.nbytes, raw_dtype=kind)
    try:
        w.write_header_to_file(path)
        w.write_kv_data_to_file()
        assert w.fout is not None
        receipt_end = w.fout[0].tell()
        w.write_ti_data_to_file()
        end = w.fout[0].tell()
    finally:
        w.close()
    return receipt_end, -(-end // ALIGNMENT) * ALIGNMENT


class GGUFWriter:
    """A `backends.base.Writer`: rows of canonical tensors in any order, each once, to their final offsets."""

    def __init__(
        self,
        spec: Spec,
        fit: Fit,
        tensors: Sequence[Stored],
        keys: dict[str, Any],
        out: Path,
        threads: int,
        importance: Lookup | None = None,
    ) -> None:
        self.path, self.threads, self._importance = out, threads, importance
        self._hashed: dict[str, tuple[hashlib._Hash, int]] = {}
        self._weights: tuple[str, Importance | None] = ("", None)
        self._places: dict[str, list[tuple[Stored, Piece]]] = {}
        for t in tensors:
            for p in t.slot.pieces:
                self._places.setdefault(p.name, []).append((t, p))
        self._shapes = {p.name: p.shape for p in params(spec)}
        self._missing = {name: shape[0] for name, shape in self._shapes.items()}
        self._room = _room(tensors)
        try:
            self._receipt_end, self._data = _write_header(
                out, fit.carrier.arch, keys | {RECEIPT_KEY: " " * self._room}, tensors
            )
        except OSError as e:
            out.unlink(missing_ok=True)
            raise UserError(f"{out}: {e.strerror}") from None
        last = tensors[-1]
        self._file = PlacedFile(out, self._data + last.offset + -(-last.nbytes // ALIGNMENT) * ALIGNMENT)
        try:
            for t in tensors:
                self._fill(t)
        except BaseException:
            self.abort()
            raise

    def _fill(self, t: Stored) -> None:
        """What no canonical tensor provides: constants, and neutral biases and gains."""
        s = t.slot
        if s.value is not None:
            self._put(t, 0, np.ascontiguousarray(s.value, "<f4").view(np.uint8).reshape(1, -1))
        elif s.matrix and not s.pieces:
            zeros = np.zeros((1, t.row_bytes), np.uint8)
            for row in range(t.rows):
                self._put(t, row, zeros)
        elif not s.matrix and sum(len(p.to) for p in s.pieces) < int(np.prod(s.shape)):
            self._put(t, 0, np.full(int(np.prod(s.shape)), s.fill, "<f4").view(np.uint8).reshape(1, -1))

    def _put(self, t: Stored, row: int, data: NDArray[np.uint8]) -> None:
        self._file.write(data, self._data + t.offset + row * t.row_bytes)

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor."""
        count = values.shape[0]
        assert name in self._missing, f"{name} is no tensor of this file"
        packed: dict[str, NDArray[np.uint8]] = {}
        for t, p in self._places[name]:
            lo, hi = max(start, p.skip), min(start + count, p.skip + len(p.to))
            if lo >= hi:
                continue
            mine = values[lo - start : hi - start]
            to = p.to[lo - p.skip : hi - p.skip]
            if t.slot.matrix:
                key = t.type if hi - lo == count else ""
                data = packed.get(key) if key else None
                if data is None:
                    weights = self._weighed(t, name)
                    data = pack(mine, t.type, self.threads, name, weights, lo)
                    packed[key] = data
                if t is self._places[name][0][0] and t.type not in EXACT and not isinstance(mine, QuantizedTensor):
                    self._hash(name, lo, data)
                self._scatter(t, to, data)
            else:
                assert not isinstance(mine, QuantizedTensor), f"{name} is a vector"
                self._vector(t, p, to, mine)
        self._missing[name] -= count

    def _weighed(self, t: Stored, name: str) -> Importance | None:
        """Importance of a tensor that ggml rounds, where there is some."""
        if self._importance is None or t.type in EXACT:
            return None
        if self._weights[0] != name:
            found = self._importance(name)
            self._weights = name, None if found is None else conditioned(found, self._shapes[name])
        return self._weights[1]

    def _hash(self, name: str, start: int, data: NDArray[np.uint8]) -> None:
        digest, rows = self._hashed.setdefault(name, (hashlib.sha256(), 0))
        if start == rows:
            digest.update(np.ascontiguousarray(data).data)
            self._hashed[name] = digest, rows + len(data)

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the bytes, in canonical rows, of every matrix that ggml rounded and whose rows came in order."""
        return {n: d.hexdigest() for n, (d, rows) in self._hashed.items() if rows == self._shapes[n][0]}

    def _vector(self, t: Stored, p: Piece, to: NDArray[np.intp], values: NDArray[np.float32]) -> None:
        x = np.ascontiguousarray(values, np.float32)
        if p.times != 1.0 or p.add:  # in float64, rounded once
            x = (x.astype(np.float64) * p.times + p.add).astype(np.float32)
        flat = Stored(t.slot, t.type, t.offset, 4)
        self._scatter(flat, to, x.astype("<f4").view(np.uint8).reshape(-1, 4))

    def _scatter(self, t: Stored, to: NDArray[np.intp], data: NDArray[np.uint8]) -> None:
        """Rows of bytes to rows `to` of the file, neighbours in one call."""
        order = np.argsort(to, kind="stable")
        to, data = to[order], data[order] if (np.diff(order) != 1).any() else data
        for run in np.split(np.arange(len(to)), np.flatnonzero(np.diff(to) != 1) + 1):
            self._put(t, int(to[run[0]]), data[run[0] : run[-1] + 1])

    def close(self, receipt: dict[str, Any]) -> None:
        """Write the receipt and flush to disk."""
        lost = {n: r for n, r in self._missing.items() if r}
        assert not lost, f"rows missing (or written twice): {lost}"
        self._file.write(_padded(receipt, self._room), self._receipt_end - self._room)
        self._file.close()

    def abort(self) -> None:
        """Close and delete."""
        self._file.abort()


def write_plain(
    path: Path,
    arch: str,
    keys: dict[str, Any],
    tensors: Sequence[Stored],
    rows: Callable[[str, tuple[int, ...]], Iterator[NDArray[np.float32]]],
) -> None:
    """A whole float32 file from ready rows, in order; `rows` takes a tensor's name and shape."""
    _, data = _write_header(path, arch, keys, tensors)
    with path.open("r+b") as f:
        for t in tensors:
            f.seek(data + t.offset)
            for block in rows(t.slot.name, t.slot.shape):
                f.write(np.ascontiguousarray(block, "<f4").tobytes())
        f.truncate(max(f.tell(), data + tensors[-1].offset + -(-tensors[-1].nbytes // ALIGNMENT) * ALIGNMENT))


def _padded(receipt: dict[str, Any], room: int) -> bytes:
    text = json.dumps(receipt, sort_keys=True, ensure_ascii=True).encode()
    assert len(text) <= room, f"a receipt of {len(text)} bytes in a room of {room}"
    return text.ljust(room)


def stamp(path: Path, receipt: dict[str, Any]) -> None:
    """Replace the receipt of a finished file in place (after parity was measured); nothing else moves."""
    from backends.gguf.container import read_header

    header = read_header(path)
    start, length = header.text_at[RECEIPT_KEY]
    with path.open("r+b") as f:
        f.seek(start)
        f.write(_padded(receipt, length))
        f.flush()
        os.fsync(f.fileno())


def writer(
    spec: Spec,
    planned: Sequence[Planned],
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    level: str = "",
    metadata: dict[str, Any],
    threads: int,
    importance: Lookup | None = None,
) -> GGUFWriter:
    """A writer for `out`, with header, metadata and constants already in place.

    level: the conversion's, which the receipt names. metadata: further keys (`general.` is put before those without a
    dot). importance: mean squares of the inputs of matrices that ggml rounds. Raises `UserError` where no llama.cpp
    architecture carries the spec, the tokenizer has no llama.cpp equivalent, or the disk is full.
    """
    return writer_for(
        carrier(spec), spec, planned, tokenizer, out, metadata=metadata, threads=threads, importance=importance
    )


def writer_for(
    fit: Fit,
    spec: Spec,
    planned: Sequence[Planned],
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    metadata: dict[str, Any],
    threads: int,
    importance: Lookup | None = None,
) -> GGUFWriter:
    """`writer` with a carrier of one's own choice."""
    assert not fit.refusals, fit.refusals
    tensors = layout(spec, fit, planned)
    keys = _header(spec, fit, tensors, tokenizer, metadata)
    log.info("GGUF: %s, %d tensors", fit.carrier.arch, len(tensors))
    return GGUFWriter(spec, fit, tensors, keys, out, threads, importance)


def joined_matrices(spec: Spec, level: str, tokenizer: Tokenizer | None) -> list[tuple[str, ...]]:
    """Canonical matrices that the file stores as one, which has one type."""
    found = (tuple(dict.fromkeys(p.name for p in s.pieces)) for s in slots(spec, carrier(spec)) if s.matrix)
    return [names for names in found if len(names) > 1]


def size(spec: Spec, planned: Sequence[Planned], tokenizer: Tokenizer | None) -> int:
    """Bytes of the file (within a few kilobytes for the metadata that a conversion adds)."""
    fit = carrier(spec)
    tensors = layout(spec, fit, planned)
    keys = _header(spec, fit, tensors, tokenizer, {})
    names = sum(len(t.slot.name) + 8 + 4 + 8 * len(t.slot.shape) + 12 for t in tensors)
    head = 24 + names + _room(tensors) + sum(len(k) + 12 + _value_bytes(v) for k, v in keys.items())
    last = tensors[-1]
    return -(-head // ALIGNMENT) * ALIGNMENT + last.offset + -(-last.nbytes // ALIGNMENT) * ALIGNMENT


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return 8 + len(value.encode())
    if isinstance(value, list | tuple):
        return 12 + sum(8 + len(v.encode()) if isinstance(v, str) else 4 for v in value)
    return 4
