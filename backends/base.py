"""What every backend provides, and the plain data that passes between converters and backends.

A backend is a folder with `support.py`, `build.py` and `runtime.py`; `backends/__init__.py` lists them. None of them
imports another, and none is imported before it is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from spec.errors import UserError

Floats = NDArray[np.float32]


class NotComparable(UserError):
    """A check has nothing that it could compare; the message says why. It is reported as NOT_RUN."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Rows of a matrix on the portable grid: `weight[r, c] = codes[r, c] * scales[r, c // group]`.

    Symmetric, scales positive with at most 8 significant bits (exact in float16, bfloat16 and float32), codes in
    -2^(bits-1) .. 2^(bits-1)-1.
    """

    codes: NDArray[np.int8]
    """[rows, cols]"""
    scales: Floats
    """[rows, cols / group]"""
    bits: int
    """8 or 4"""
    group: int = 32

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)"""
        return self.codes.shape[0], self.codes.shape[1]

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> QuantizedTensor:
        """A selection of rows; the q/k row permutation of interleaving formats commutes with the grid."""
        return QuantizedTensor(self.codes[rows], self.scales[rows], self.bits, self.group)

    def dequantize(self) -> Floats:
        """[rows, cols], exact in float32."""
        rows, cols = self.shape
        grouped = self.codes.reshape(rows, cols // self.group, self.group).astype(np.float32)
        return (grouped * self.scales[..., None]).reshape(rows, cols)


Values = Floats | QuantizedTensor
"""A block of rows on its way to a backend: float32, or on the portable grid."""


class ContentHash:
    """SHA-256 of a tensor's values in canonical row order, independent of the container and of the block size.

    Two hashes run side by side, one over codes and one over scales (floats: one over their float32 bytes), so that
    cutting the rows elsewhere changes nothing.
    """

    def __init__(self) -> None:
        self._codes, self._scales = hashlib.sha256(), hashlib.sha256()

    def update(self, values: Values) -> None:
        """The next rows."""
        if isinstance(values, QuantizedTensor):
            self._codes.update(np.ascontiguousarray(values.codes).data)
            self._scales.update(np.ascontiguousarray(values.scales, dtype="<f4").data)
        else:
            self._codes.update(np.ascontiguousarray(values, dtype="<f4").data)

    def hexdigest(self) -> str:
        """The hash of all rows so far."""
        return hashlib.sha256(self._codes.digest() + self._scales.digest()).hexdigest()


def content_hash(blocks: Iterator[Values] | Sequence[Values]) -> str:
    """The `ContentHash` of a tensor's row blocks."""
    whole = ContentHash()
    for b in blocks:
        whole.update(b)
    return whole.hexdigest()


@dataclass(frozen=True)
class Support:
    """Whether and how a backend carries a spec at a precision level. Never warn and diverge: what is not here exactly
    is refused."""

    backend: str
    carrier: str = ""
    """What carries it: a llama.cpp architecture, an mlx-lm model type, ..."""
    folds: tuple[str, ...] = ()
    """Exact rewrites on the way, one sentence each."""
    refusals: tuple[str, ...] = ()
    """Why not: each names the field, its value, and the nearest thing that works. Empty means carried."""
    notes: tuple[str, ...] = ()
    """What a user should know though nothing is lost (a matrix that stays f16 and why)."""

    @property
    def ok(self) -> bool:
        """Whether it is carried."""
        return not self.refusals


@dataclass(frozen=True)
class Planned:
    """One canonical tensor as a writer will receive it."""

    name: str
    shape: tuple[int, ...]
    level: str
    """`f32`, `f16`, `bf16` (float32 blocks to be rounded to that), `q8`, `q4` (QuantizedTensor blocks), or a backend's
    native type by its own name (float32 blocks that the backend quantizes itself)."""


@dataclass
class Tokenizer:
    """A tokenizer as converters and trainers pass it on: the Hugging Face `tokenizer.json` and what surrounds it."""

    json: dict[str, Any]
    """The parsed tokenizer.json."""
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    extra_eos: tuple[str, ...] = ()
    """Further tokens that end generation (eot, eom), from generation_config.json."""
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None
    sentencepiece: bytes | None = None
    """tokenizer.model where the source has one; scores and byte fallback come from it."""


class Writer(Protocol):
    """Takes tensors in row blocks, in any order, each row exactly once, and leaves a whole file only at `close`."""

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor (a vector is one row block starting at 0)."""
        ...

    def close(self, receipt: dict[str, Any]) -> None:
        """Write what remains (the receipt goes into the metadata) and flush to disk; the caller renames."""
        ...

    def abort(self) -> None:
        """Close handles and delete everything written."""
        ...


class Runtime(Protocol):
    """One face for every artifact: all that `evals` and `parity_tests` know."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context(self) -> int: ...

    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """[B, T] token ids -> [B, T, V] float32, no cache kept. Raises UserError beyond the context."""
        ...

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Start a new sequence: [T] ids -> [V] logits after the last token."""
        ...

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Continue it by one or more tokens: [T] ids -> [T, V] logits."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text to ids with the artifact's own tokenizer, special tokens and BOS policy included."""
        ...

    def decode(self, ids: Sequence[int]) -> bytes:
        """Ids to bytes (special tokens left out)."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end generation."""
        ...

    def info(self) -> dict[str, Any]:
        """`backend`, `device`, `precision`, and whatever else a report should name."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class Backend:
    """An entry of the registry."""

    name: str
    module: str
    """Dotted package; its `support`, `build` and `runtime` modules are imported when used."""
    suffix: str
    """What an artifact ends with: `.gguf`, or nothing for a folder."""
    extra: str
    """The pip extra that installs what it needs."""
    requires: tuple[str, ...] = ()
    """Importable modules it needs to run."""
    marks: tuple[str, ...] = field(default=())
    """Files whose presence in a folder marks it as this backend's artifact."""


def recognise(path: Path, backends: Sequence[Backend]) -> Backend | None:
    """The backend whose artifact `path` looks like."""
    for b in backends:
        if b.suffix and path.is_file() and path.suffix == b.suffix:
            return b
        if path.is_dir() and b.marks and all((path / m).exists() for m in b.marks):
            return b
    return None
