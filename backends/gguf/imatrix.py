"""llama.cpp's importance matrices: its GGUF files (`llama-imatrix`), the older `.dat` files, and ours to read there.

A GGUF one has for each matrix NAME of a model `NAME.in_sum2` [matrices, cols], sums of the squares of what the matrix
was multiplied with, and `NAME.counts` [matrices, 1], of how many tokens they are: one matrix, or every expert of a
stack. A `.dat` has means times a number of calls, experts without a token as ones, and no counts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats
from backends.gguf.container import Info, parse, read_rows
from backends.gguf.fit import choose
from backends.gguf.names import Slot, slots
from spec.config import Spec
from spec.errors import UserError

KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
SUMS, COUNTS = ".in_sum2", ".counts"

SAME_INPUT = (
    ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    ("ffn_gate", "ffn_up"),
    ("ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps"),
    ("ffn_gate_shexp", "ffn_up_shexp"),
)
"""Matrices that are multiplied with the same vector: where an architecture fuses some of them and another does not,
one stands for the other."""


@dataclass(frozen=True)
class Entry:
    """Where the numbers of one matrix lie."""

    file: Path
    offset: int
    values: int
    """float32 numbers"""
    counts: Info | None = None
    calls: int = 1
    """What the sums of a `.dat` are divided by."""


@dataclass
class IMatrix:
    """A file, open for reading by llama.cpp's names; numbers are read when they are asked for."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    chunks: int = 0
    chunk_size: int = 0

    def counts(self, name: str) -> NDArray[np.int64] | None:
        """Tokens of each matrix; none where the file does not tell."""
        info = self.entries[name].counts
        if info is None:
            return None
        with info.file.open("rb") as f:
            found = read_rows(f, info, 0, info.rows).view("<f4").reshape(-1)
        self._check(name, found)
        return np.rint(found).astype(np.int64)

    def means(self, name: str) -> Floats:
        """Mean squares [matrices, cols] as llama.cpp computes them from the file; zeros where a count is 0. Raises
        `UserError` for numbers that are none."""
        e = self.entries[name]
        with e.file.open("rb") as f:
            f.seek(e.offset)
            sums = np.frombuffer(f.read(4 * e.values), "<f4").astype(np.float32)
        self._check(name, sums)
        counts = self.counts(name)
        if counts is None:
            return (sums / np.float32(max(1, e.calls)))[None]
        if e.values % len(counts):
            raise UserError(f"{self.path}: {name}: {e.values} sums of {len(counts)} counts")
        return means(sums.reshape(len(counts), -1), counts)

    def _check(self, name: str, values: NDArray[np.float32]) -> None:
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise UserError(f"{self.path}: {name}: holds what is no sum of squares (NaN, infinite or negative): "
                            "it was measured on a damaged model")  # fmt: skip


def means(sums: NDArray[np.float32], counts: NDArray[np.int64]) -> Floats:
    """Sums [matrices, cols] divided by counts [matrices], in float32 as llama.cpp does it; zeros for a count of 0."""
    divisor = np.maximum(counts, 1).astype(np.float32)[:, None]
    return np.where(counts[:, None] > 0, sums / divisor, np.float32(0))


def sums(mean: NDArray[np.floating], counts: NDArray[np.int64]) -> Floats:
    """What a file holds for means [matrices, cols] of so many tokens each."""
    return (np.asarray(mean, np.float64) * counts[:, None]).astype(np.float32)


def read(path: Path) -> IMatrix:
    """Open a file of either kind. Raises `UserError` where it is none, or damaged."""
    try:
        with path.open("rb") as f:
            gguf = f.read(4) == b"GGUF"
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    out = _read_gguf(path) if gguf else _read_dat(path)
    if not out.entries:
        raise UserError(f"{path}: an importance matrix without entries")
    return out


def _read_gguf(path: Path) -> IMatrix:
    head = parse(path)
    absent = [k for k in KEYS if k not in head.keys]
    if absent:
        kind = head.keys.get("general.type") or head.keys.get("general.architecture") or "unknown"
        raise UserError(f"{path}: no importance matrix: it has no {absent[0]} (general.type is {kind}; llama-imatrix "
                        "writes one, and convert --imatrix-out)")  # fmt: skip
    out = IMatrix(path, {}, [str(d) for d in head.keys[KEYS[0]]], int(head.keys[KEYS[1]]), int(head.keys[KEYS[2]]))
    for name, info in head.tensors.items():
        stem = name.removesuffix(SUMS)
        if stem == name:
            if name.removesuffix(COUNTS) + SUMS not in head.tensors:
                raise UserError(f"{path}: {name}: belongs to no sums")
            continue
        counts = head.tensors.get(stem + COUNTS)
        if counts is None:
            raise UserError(f"{path}: {name}: has no counts beside it")
        if (info.type, counts.type) != ("f32", "f32"):
            raise UserError(f"{path}: {stem}: is stored as {info.type} and {counts.type}; sums and counts are f32")
        out.entries[stem] = Entry(path, info.offset, prod(info.shape), counts)
    return out


def _read_dat(path: Path) -> IMatrix:
    out, end = IMatrix(path), path.stat().st_size
    with path.open("rb") as f:

        def integer(least: int, most: int) -> int:
            (n,) = struct.unpack("<i", f.read(4))
            if not least <= n <= most:
                raise ValueError(n)
            return n

        try:
            for _ in range(integer(1, 1 << 20)):
                name = f.read(integer(1, 256)).decode()
                calls, values = integer(0, 1 << 30), integer(1, 1 << 30)
                out.entries[name] = Entry(path, f.tell(), values, calls=calls)
                f.seek(4 * values, 1)
                if f.tell() > end:
                    raise ValueError(name)
            if f.tell() < end:
                out.chunks = integer(0, 1 << 30)
            if f.tell() < end:
                out.datasets = [f.read(integer(0, 1 << 16)).decode()]
        except (struct.error, ValueError):
            raise UserError(f"{path}: no importance matrix, or a damaged one: llama-imatrix writes one, and convert "
                            "--imatrix-out") from None  # fmt: skip
    return out


def matched(spec: Spec, found: IMatrix) -> dict[str, str]:
    """Canonical matrix to the entry that tells of its inputs, in canonical order; those without one are left out.

    Raises `UserError` where nothing matches, and where an entry has another width or other experts than the model, as
    llama.cpp does.
    """
    out: dict[str, str] = {}
    for s in _weighed(spec):
        entry = next((n for n in _names(s.name) if n in found.entries), None)
        if entry is None:
            continue
        experts = s.shape[0] if len(s.shape) == 3 else 1
        want, got = experts * s.shape[-1], found.entries[entry].values
        if got != want:
            if s.name == "token_embd.weight":
                continue
            raise UserError(f"{found.path}: {entry}: {got} numbers, where the model has {experts} x {s.shape[-1]} "
                            "(was it measured on another model?)")  # fmt: skip
        out |= {p.name: entry for p in s.pieces}
    if not out:
        some = ", ".join(list(found.entries)[:3])
        raise UserError(f"{found.path}: no entry is of a matrix of this model ({some}, ...)")
    return out


def _weighed(spec: Spec) -> list[Slot]:
    return [s for s in slots(spec, choose(spec)) if s.matrix and not s.type and s.pieces]


def _names(name: str) -> list[str]:
    """A matrix's own name, then those that have the same input."""
    stem = name.removesuffix(".weight")
    prefix, _, tail = stem.rpartition(".")
    others = next((group for group in SAME_INPUT if tail in group), ())
    return [name, *(f"{prefix}.{other}.weight" for other in others if other != tail)]


def write(
    path: Path,
    spec: Spec,
    importance: Callable[[str], Floats | None],
    counts: Callable[[str], NDArray[np.int64] | None],
    *,
    datasets: tuple[str, ...],
    tokens: int,
    chunk: int,
) -> int:
    """Write a GGUF file of mean squares by canonical name ([cols] or [experts, cols]), of so many tokens each; entries
    are in llama.cpp's order. Returns how many there are.

    Like `llama-imatrix`, it has the matrices of the layers, and not the head. datasets, tokens, chunk: what was read,
    how much, in pieces of how many tokens. Raises `UserError` where the disk refuses; the caller renames.
    """
    import gguf

    w = gguf.GGUFWriter(None, "")
    w.kv_data[0].pop("general.architecture", None)  # a model's
    w.add_string("general.type", "imatrix")
    w.add_array(KEYS[0], list(datasets))
    w.add_uint32(KEYS[1], -(-tokens // chunk))
    w.add_uint32(KEYS[2], chunk)
    entries = 0
    for s in sorted(_weighed(spec), key=lambda s: s.name):
        mean = importance(s.pieces[0].name) if s.name.startswith("blk.") else None
        count = None if mean is None else counts(s.pieces[0].name)
        if mean is None or count is None:
            continue
        w.add_tensor(s.name + SUMS, sums(np.atleast_2d(mean), count))
        w.add_tensor(s.name + COUNTS, count.astype(np.float32)[:, None])
        entries += 1
    try:
        w.write_header_to_file(path)
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    finally:
        w.close()
    return entries
