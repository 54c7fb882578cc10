"""What every backend provides, and the plain data that passes between converters and backends.

A backend is a folder that `backends/__init__.py` lists. None imports another, and none is imported before it is needed.

    support.py   `levels()`, `support(spec, level, **options)`, `bits(level)`, `OPTIONS`; needs none of its packages
    build.py     `writer(...)`, `size(...)`, `stamp(path, receipt)`; for native levels `recipe(spec, level)` and `pack`;
                 `ready()`, where building needs more than packages. Where `support.IMPORTANCE` says that native levels
                 are rounded by what each input counts, `support` and `recipe` take `importance=bool`, `writer` mean
                 squares by canonical name, and its `hashes` are of the bytes of what it rounded (`Artifact.bytes_hash`)
    read.py      `open_artifact(path)`: an `Artifact`
    runtime.py   `load(path, *, threads, context, exact)`: a `Runtime`
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from spec.config import Spec
from spec.errors import UserError
from spec.levels import LEVELS

Floats = NDArray[np.float32]

PORTABLE = tuple(LEVELS)
"""Levels that mean the same on every backend."""


class NotComparable(UserError):
    """A check has nothing that it could compare; the message says why. It is reported as NOT_RUN."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Rows of a matrix on the portable grid: `weight[r, c] = codes[r, c] * scales[r, c // group]`.

    Symmetric, codes in -2^(bits-1) .. 2^(bits-1)-1. Scales are positive with at most 8 significant bits (exact in
    float16, bfloat16 and float32), where this program rounded; those of a source that had codes already (GGUF's Q4_0
    and Q8_0) are any float16.
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

    def grouped(self, group: int) -> QuantizedTensor:
        """The same numbers with a scale for `group` weights: scales are repeated, or where neighbours are equal joined.
        As it is where some of those differ: then `group` is no way to say it."""
        cols = self.shape[1]
        if group == self.group or cols % group:
            return self
        if self.group % group == 0:
            return QuantizedTensor(self.codes, np.repeat(self.scales, self.group // group, 1), self.bits, group)
        if group % self.group:
            return self
        apart = self.scales.reshape(len(self.scales), -1, group // self.group)
        first = apart[..., :1]
        if not (apart == first).all():
            return self
        return QuantizedTensor(self.codes, np.ascontiguousarray(first[..., 0]), self.bits, group)

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
    flags: str = ""
    """What the backend's own tool wants on its command line for this carrier."""

    @property
    def ok(self) -> bool:
        """Whether it is carried."""
        return not self.refusals


@dataclass(frozen=True)
class Option:
    """A choice that a backend's conversion offers (`--profile`, `--compute`)."""

    name: str
    choices: tuple[str, ...]
    default: str
    """One of the choices, or empty where it follows from the level."""
    about: str


@dataclass(frozen=True)
class Arithmetic:
    """How a stock runtime rounds while it computes: what the proof reproduces inside the oracle."""

    compute: str = "f32"
    """Dtype of the activations between operations: `f32`, `f16`, `bf16`."""
    cache: str = "f32"
    """Dtype of keys and values in the cache."""
    activations: str | None = None
    """How the input of a product with quantized weights is rounded (a key of `convert.verify.emulate.ROUNDINGS`)."""
    unrounded: frozenset[str] = frozenset()
    """Quantized weights whose products take their input as it is all the same, by canonical name."""
    tables: bool = False
    """Whether rotary tables are rounded to `compute` before they are used."""
    gains: bool = False
    """Whether a normed value is rounded to `compute` before its gain too."""
    emulated: bool = False
    """Whether an interpreter stands in for hardware that is not here: then a check that passes says EMULATED."""


@dataclass(frozen=True)
class Planned:
    """One canonical tensor as a writer will receive it."""

    name: str
    shape: tuple[int, ...]
    level: str
    """`f32`, `f16`, `bf16` (float32 blocks to be rounded to that), `q8`, `q4`, `q4-g128` (QuantizedTensor blocks), or a
    backend's native type by its own name (float32 blocks that the backend quantizes itself)."""
    wide: bool = False
    """Whether codes and scales are a source's own: then scales may have 11 significant bits, and be negative or 0."""


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
    templates: dict[str, str] = field(default_factory=dict)
    """Further chat templates by name (tool_use, rag)."""
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


class RowBlocks(Protocol):
    """Rows by slice: an array, or what makes them when they are asked for."""

    def __getitem__(self, rows: slice, /) -> Values: ...


class Artifact(Protocol):
    """An artifact opened for its weights: what a backend's `read.open_artifact(path)` returns."""

    @property
    def spec(self) -> Spec:
        """What the runtime's answers are compared with, on the weights that `rows` gives: the source's spec."""
        ...

    @property
    def source(self) -> Spec:
        """The spec that it was made from."""
        ...

    @property
    def level(self) -> str:
        """The level that it was converted at."""
        ...

    @property
    def receipt(self) -> dict[str, Any]: ...

    @property
    def session(self) -> int | None:
        """Tokens of the session whose rotary tables are fixed in it; none where the runtime chooses."""
        ...

    @property
    def arithmetic(self) -> Arithmetic:
        """How its stock runtime rounds here, at its stock settings."""
        ...

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """Tensors that are missing, too many, or of another type or shape than planned, and what is wrong with each;
        constants (rotary tables, slopes) too."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows of a canonical tensor as the file holds them: codes and scales where they are on the portable grid, else
        floats, with folds undone (in float64, where that is exact). A vector's rows are its elements."""
        ...

    def expected(self, name: str, level: str, start: int, values: Floats) -> RowBlocks:
        """What `rows` must give for these rows of the source at a level that is not on the portable grid: folds
        applied, rounded to the dtype of the file, through the format's own quantizer for a native level. `start` is
        their place. A format whose groups span rows has a method `rows_together(name, level) -> int` too, and gets
        whole groups only."""
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
    """What an artifact ends with: `.gguf`, or nothing for a folder of any name."""
    extra: str
    """The pip extra that installs what it needs."""
    requires: tuple[str, ...] = ()
    """Importable modules that converting to it needs."""
    runs: tuple[str, ...] = ()
    """Importable modules that running its artifacts needs besides."""
    marks: tuple[str, ...] = ()
    """Files whose presence in a folder marks it as this backend's artifact, where it is none of ours."""
    folder: bool = True
    """Whether an artifact is a folder."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions a report names."""
    hub: str = ""
    """The library that the Hugging Face hub names for its folders, whose clients read them by AutoTokenizer."""
    tool: str = ""
    """How its own tools run an artifact called {name}, for the model card; {flags} are the carrier's."""


def recognise(path: Path, backends: Sequence[Backend]) -> Backend | None:
    """The backend whose artifact `path` looks like. What we wrote says so itself (`backends.folder.MARK`)."""
    from backends.folder import read_mark

    for b in backends:
        if b.suffix and path.suffix == b.suffix and (path.is_dir() if b.folder else path.is_file()):
            return b
    if not path.is_dir():
        return None
    mark = read_mark(path)
    for b in backends:
        if b.name == mark.get("backend") or (not mark and b.marks and all((path / m).exists() for m in b.marks)):
            return b
    return None
