"""How to open a GGUF file for verification."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import ContentHash, Planned, QuantizedTensor, Runtime, Values
from backends.gguf.build import RECEIPT_KEY, Stored, layout, recipe
from backends.gguf.container import Info, read_header, read_rows
from backends.gguf.names import Piece
from backends.gguf.pack import pack, unpack
from backends.gguf.runtime import load
from backends.gguf.twin import shipped_fit, twin, twin_spec
from convert.levels import LEVELS
from convert.quantize import quantize
from convert.recipe import plan
from convert.verify import numeric
from convert.verify.emulate import Typed, activation_type
from convert.verify.packing import BITS, compare_values, difference
from convert.verify.run import Twin
from spec.config import LongRopeScaling, Rope, Spec
from spec.errors import UserError
from spec.params import params

Array = NDArray[Any]


def versions() -> dict[str, str]:
    """Of the libraries that the verdict depends on."""
    import gguf
    import llama_cpp

    names = {"llama-cpp-python": llama_cpp, "gguf": gguf, "numpy": np}
    return {n: str(getattr(module, "__version__", "")) for n, module in names.items()}


def receipt(path: Path) -> dict[str, Any]:
    """The receipt in the metadata; empty where there is none."""
    text = str(read_header(path).keys.get(RECEIPT_KEY, "")).strip()
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def level_of(path: Path) -> str:
    """The level that the receipt declares. Raises `UserError` where it declares none."""
    found = receipt(path)
    level = found.get("level") or found.get("quant")
    if not isinstance(level, str):
        raise UserError(f"{path}: has no receipt of ours that says its level (give --level)")
    return level


def open_artifact(path: Path, spec: Spec, level: str, threads: int | None) -> Shipped:
    """Open a file that should carry `spec`. Raises `UserError` where it is no whole GGUF."""
    return Shipped(path, spec, level, threads)


class Shipped:
    """A GGUF file; see `convert.verify.run.Shipped`."""

    def __init__(self, path: Path, spec: Spec, level: str, threads: int | None) -> None:
        self.path, self.spec, self.level, self.threads = path, spec, level, threads
        self._weights = FileWeights(path, spec, level)

    @property
    def precision(self) -> str:
        """The float16 KV cache is there whatever the weights are."""
        return numeric.coarsest(["f16", *(activation_type(t) for t in self._weights.types())])

    @property
    def session(self) -> int | None:
        """Length of the sessions whose rotary tables are in the file."""
        return self._weights.session

    def weights(self, name: str) -> Any:
        """Dequantized weights as the graph uses them, a few rows at a time."""
        return self._weights(name)

    def stored(self) -> Packed:
        """The file's weights in canonical names."""
        return Packed(self.path, self.spec, self.level, self.threads)

    emulated = False

    def emulate(self, ids: Array, length: int) -> numeric.Emulation:
        """llama.cpp's roundings on a CPU."""
        return numeric.emulate(self.spec, self.weights, ids, length)

    def load(self, context: int) -> Runtime:
        """llama.cpp as anyone would run it on a CPU, whose roundings are the ones that are emulated."""
        return load(self.path, threads=self.threads, context=context, gpu=False)

    def twin(self, folder: Path) -> Twin:
        """The shipped metadata over a few layers in float32, in llama.cpp without any rounding but float32's."""
        small, spec = twin(self.path, folder / "twin.gguf"), twin_spec(self.spec)
        what = f"float32 twin of {spec.depth} of {self.spec.depth} layers against float64"
        runtime = load(small, threads=self.threads, exact=True, context=_twin_context(spec))
        weights = FileWeights(small, spec, "f32")
        return Twin(spec, weights, runtime, what, weights.session or runtime.context, tables=True)


def _twin_context(spec: Spec) -> int | None:
    """A session long enough for the long rotary tables where there are two sets: the artifact's own, short session
    uses the others."""
    positions = [b.attention.position for b in spec.layers]
    scalings = [p.scaling for p in positions if isinstance(p, Rope) and isinstance(p.scaling, LongRopeScaling)]
    longest = max((s.original_context for s in scalings), default=0)
    return longest + 64 if longest > 0 and longest + 64 <= spec.context else None


class FileWeights:
    """Canonical name to weights as the shipped graph computes with them.

    Folds are undone in float64, which is exact: a gain stored as 1 + w in float32 gives the w whose 1 + w it is.
    """

    def __init__(self, path: Path, spec: Spec, level: str) -> None:
        self._path, self._header = path, read_header(path)
        fit = shipped_fit(self._header.arch, spec)
        self._places = _places(layout(spec, fit, _planned(spec, level)))
        self.session = fit.rotary.session
        self._shapes = {p.name: p.shape for p in params(spec)}

    def types(self) -> set[str]:
        """ggml types of the matrices, as the file has them."""
        return {self._info(t).type for places in self._places.values() for t, _ in places if t.slot.matrix}

    def _info(self, t: Stored) -> Info:
        if t.slot.name not in self._header.tensors:
            raise UserError(f"{self._path}: {t.slot.name} is not in the file")
        return self._header.tensors[t.slot.name]

    def __call__(self, name: str) -> Any:
        t, piece = self._places[name][-1]  # an embedding that is stored as the head too: both are the same
        info = self._info(t)
        rows = FileRows(self._path, info, piece, self._shapes[name])
        return Typed(rows, activation_type(info.type)) if t.slot.matrix else rows[:]


@dataclass(frozen=True, eq=False)
class FileRows:
    """Rows of one canonical tensor as an array-like, decoded when asked for."""

    path: Path
    info: Info
    piece: Piece
    shape: tuple[int, ...]

    def __getitem__(self, rows: Any) -> Array:
        index = np.arange(self.shape[0])[rows] - self.piece.skip
        if len(self.shape) == 1:
            flat = read_at(self.path, self.info, 0, self.info.rows).view("<f4").reshape(-1)
            return (flat[self.piece.to[index]].astype(np.float64) - self.piece.add) / self.piece.times
        inside = (index >= 0) & (index < len(self.piece.to))  # rows that no position reaches are not in the file
        out = np.zeros((len(index), self.shape[1]), np.float32)
        to = self.piece.to[index[inside]]
        if len(to):
            values = unpack(_gather(self.path, self.info, to), self.info.type)
            out[inside] = values.dequantize() if isinstance(values, QuantizedTensor) else values
        return out


def read_at(path: Path, info: Info, first: int, last: int) -> NDArray[np.uint8]:
    """[last - first, bytes] rows of a tensor of the file."""
    with path.open("rb") as f:
        return read_rows(f, info, first, last)


def _gather(path: Path, info: Info, rows: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Rows in any order: one read where they lie close together, else one a row."""
    first, last = int(rows.min()), int(rows.max()) + 1
    if last - first <= 4 * len(rows):
        return read_at(path, info, first, last)[rows - first]
    return np.concatenate([read_at(path, info, int(r), int(r) + 1) for r in rows])


def _places(tensors: Sequence[Stored]) -> dict[str, list[tuple[Stored, Piece]]]:
    """Canonical name to where its rows lie; more than one place where a tied head is stored."""
    out: dict[str, list[tuple[Stored, Piece]]] = {}
    for t in tensors:
        for piece in t.slot.pieces:
            out.setdefault(piece.name, []).append((t, piece))
    return out


class Packed:
    """What lies in the file, in canonical names and rows; see `packing.Stored`."""

    def __init__(self, path: Path, spec: Spec, level: str, threads: int | None) -> None:
        self.path, self.threads = path, threads or 1
        self._plan = {p.name: p for p in _planned(spec, level)}
        self._header = read_header(path)
        self._layout = layout(spec, shipped_fit(self._header.arch, spec), list(self._plan.values()))
        self._places = _places(self._layout)
        self._hashes: Mapping[str, Any] = receipt(path).get("tensors", {})

    def problems(self) -> dict[str, str]:
        """Tensors that are missing, of another type or shape, or too many; constants that are not what they were."""
        have, out = self._header.tensors, {}
        want = {t.slot.name: t for t in self._layout}
        out |= {n: "is not in the file" for n in want if n not in have}
        out |= {n: "does not belong in the file" for n in have if n not in want}
        for name, t in want.items():
            if name not in have:
                continue
            info = have[name]
            if info.shape != t.slot.shape:
                out[name] = f"has shape {list(info.shape)}, not {list(t.slot.shape)}"
            elif info.type != t.type:
                out[name] = f"is stored as {info.type}, the recipe says {t.type}"
            elif how := self._constants(t):
                out[name] = how
        return out

    def _constants(self, t: Stored) -> str:
        """Neutral fillings and rotary divisors, which come from no canonical tensor."""
        covered = sum(len(p.to) for p in t.slot.pieces)
        if t.slot.matrix or (t.slot.value is None and covered == int(np.prod(t.slot.shape))):
            return ""
        got = self._vector(t)
        if t.slot.value is not None:
            return difference("values", got, t.slot.value.reshape(-1), 0)
        free = np.setdiff1d(np.arange(got.size), np.concatenate([p.to for p in t.slot.pieces] or [[]]).astype(int))
        return difference("fillings", got[free], np.full(len(free), t.slot.fill, np.float32), 0)

    def _vector(self, t: Stored) -> Array:
        info = self._header.tensors[t.slot.name]
        return read_at(self.path, info, 0, info.rows).view("<f4").reshape(-1)

    def compare(self, name: str, start: int, block: Array) -> str:
        """An empty string where the file holds the canonical rounding of these rows, else what differs."""
        for t, piece in self._places[name]:
            low, high = max(start, piece.skip), min(start + len(block), piece.skip + len(piece.to))
            if low >= high:
                continue
            mine, to = block[low - start : high - start], piece.to[low - piece.skip : high - piece.skip]
            if t.slot.matrix:
                how = compare_values(self._rows(t, to), self._expected(name, t, mine), low)
            else:
                folded = (mine.astype(np.float64) * piece.times + piece.add).astype(np.float32)
                how = difference("values", self._vector(t)[to], folded, low)
            if how:
                return f"{how} (in {t.slot.name})"
        return ""

    def hashed(self, name: str) -> bool | None:
        """Whether the tensor has the receipt's content hash, decoded a few rows at a time in canonical order."""
        t, piece = self._places[name][0]
        entry = self._hashes.get(name)
        whole = piece.skip == 0 and len(piece.to) == self._plan[name].shape[0]
        if not isinstance(entry, list) or len(entry) < 2 or not whole:
            return None
        digest, step = ContentHash(), max(1, (1 << 22) // t.slot.shape[-1])
        for start in range(0, len(piece.to), step):
            digest.update(self._rows(t, piece.to[start : start + step]))
        return digest.hexdigest() == entry[1]

    def _expected(self, name: str, t: Stored, block: Array) -> Values:
        level = self._plan[name].level
        if level in BITS:
            return quantize(block, BITS[level])
        return unpack(pack(block, t.type, self.threads, name), t.type)

    def _rows(self, t: Stored, to: NDArray[np.intp]) -> Values:
        info = self._header.tensors[t.slot.name]
        return unpack(_gather(self.path, info, to), info.type)


def _planned(spec: Spec, level: str) -> list[Planned]:
    if level in LEVELS:
        return plan(spec, level)
    chosen = recipe(spec, level)
    return [Planned(p.name, p.shape, chosen[p.name]) for p in params(spec)]
