"""Reading a GGUF file back in canonical names and rows."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Arithmetic, Planned, QuantizedTensor, Values
from backends.gguf.build import EXACT, RECEIPT_KEY, SPEC_KEY, Stored, layout
from backends.gguf.container import Header, Info, read_header, read_rows, read_split
from backends.gguf.fit import Fit
from backends.gguf.foreign import read_foreign
from backends.gguf.importance import Lookup, conditioned
from backends.gguf.names import Piece
from backends.gguf.pack import dense, pack, unpack
from backends.gguf.twin import shipped_fit, shipped_spec
from spec.config import Spec
from spec.errors import UserError
from spec.params import params

Array = NDArray[Any]


def open_artifact(path: Path) -> Artifact:
    """A file that this program wrote. Raises `UserError` where it is none, or damaged."""
    return Artifact(path)


def open_any(path: Path) -> tuple[Artifact, frozenset[str], tuple[str, ...]]:
    """Any GGUF file, or one of the files of a split one: opened, the tensors that are no part of its function, and
    notes.

    A file of this program is opened by the spec that it carries, with folds undone where that is exact; any other by
    its architecture's row (`foreign`). Raises `UserError`, `SpecError`.
    """
    header, note = read_split(path), ""
    if SPEC_KEY in header.keys:
        artifact = Artifact(path, shipped_spec(header, path), header)
        factors = {piece.times for name in artifact.shapes for _, piece in artifact.places(name)}
        if all(math.frexp(abs(f))[0] == 0.5 for f in factors):
            return artifact, frozenset(), ("opened by the spec that the file carries, folds undone",)
        note = "a scale of the logits was folded into the final norm, which rounded it: it stays there"
    found = read_foreign(header, path)
    artifact = Artifact(path, found.spec, header, found.fit)
    return artifact, found.spare, (*found.notes, *([note] if note else []))


class Artifact:
    """A file that this program wrote; tensors are decoded when asked for. See `backends.base.Artifact`.

    Folds are undone in float64, which is exact: a gain stored as 1 + w in float32 gives the w whose 1 + w it is. So
    the graph is the source's spec.
    """

    arithmetic = Arithmetic(compute="f32", cache="f16")
    """Activations are rounded by the type of each weight besides (`convert.verify.emulate.activation_type`)."""

    def __init__(
        self, path: Path, source: Spec | None = None, header: Header | None = None, fit: Fit | None = None
    ) -> None:
        """header, fit: of a file that another program wrote (`foreign`)."""
        self.path = path
        self.header = header or read_header(path)
        self.source = self.spec = source or shipped_spec(self.header, path)
        self._fit = fit or shipped_fit(self.header.arch, self.source)
        planned = [Planned(p.name, p.shape, "f32") for p in params(self.source)]  # places depend on no type
        self._places: dict[str, list[tuple[Stored, Piece]]] = {}
        self.slots: dict[str, Stored] = {}
        """Every tensor that the file must have."""
        for t in layout(self.source, self._fit, planned):
            self.slots[t.slot.name] = t
            for piece in t.slot.pieces:
                self._places.setdefault(piece.name, []).append((t, piece))
        self.shapes = {p.name: p.shape for p in params(self.source)}
        self.importance: Lookup | None = None
        """What `expected` rounds with: mean squares of the inputs of matrices."""

    @property
    def session(self) -> int | None:
        """Length of the sessions whose rotary tables are in the file."""
        return self._fit.rotary.session

    @property
    def receipt(self) -> dict[str, Any]:
        """The receipt in the metadata; empty where there is none."""
        text = str(self.header.keys.get(RECEIPT_KEY, "")).strip()
        try:
            found = json.loads(text) if text else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def level(self) -> str:
        """The level that the receipt declares. Raises `UserError` where it declares none."""
        level = self.receipt.get("level")
        if not isinstance(level, str):
            raise UserError(f"{self.path}: has no receipt of ours that says its level (give --level)")
        return level

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows start..stop of a canonical tensor: codes and scales of Q4_0 and Q8_0 bit for bit, else floats. Rows of a
        position table that nothing reaches, which are not in the file, come back as zeros."""
        return self._rows(self._place(name), name, start, stop)

    def copies(self, name: str, start: int, stop: int) -> list[Values]:
        """These rows from each place that holds them: a tied head that is stored again, a gain for each head."""
        return [self._rows(place, name, start, stop) for place in self.places(name)]

    def _rows(self, place: tuple[Stored, Piece], name: str, start: int, stop: int) -> Values:
        t, piece = place
        if len(self.shapes[name]) == 1:
            return self._unfold(self.vector(t)[piece.to[start:stop]], piece)
        lo, hi = max(start, piece.skip), min(stop, piece.skip + len(piece.to))
        if (lo, hi) == (start, stop):
            return self.stored_rows(t, piece.to[lo - piece.skip : hi - piece.skip])
        out = np.zeros((stop - start, *self.shapes[name][1:]), np.float32)
        if lo < hi:
            out[lo - start : hi - start] = dense(self.stored_rows(t, piece.to[lo - piece.skip : hi - piece.skip]))
        return out

    def expected(self, name: str, level: str, start: int, values: Array) -> Array:
        """What `rows` must give for these rows of the source: through ggml's own quantizer for a native type."""
        t, piece = self._place(name)
        if t.slot.matrix:
            kind = self.type(name)
            found = None if self.importance is None or kind in EXACT else self.importance(name)
            weights = None if found is None else conditioned(found, self.shapes[name])
            return dense(unpack(pack(values, kind, 1, name, weights, start), kind))
        return self._unfold((values.astype(np.float64) * piece.times + piece.add).astype(np.float32), piece)

    @staticmethod
    def _unfold(values: Array, piece: Piece) -> Array:
        if piece.times == 1 and not piece.add:
            return values
        return (values.astype(np.float64) - piece.add) / piece.times

    def reached(self, name: str) -> tuple[int, int]:
        """The first and last + 1 row of a canonical tensor that is in the file."""
        _, piece = self._place(name)
        return piece.skip, piece.skip + len(piece.to)

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """Tensors that are missing, of another type or shape, or too many; constants that are not what they were."""
        have = self.header.tensors
        want = {t.slot.name: t for t in layout(self.source, self._fit, planned)}
        out = {n: "is not in the file" for n in want if n not in have}
        out |= {n: "does not belong in the file" for n in have if n not in want}
        for name, t in want.items():
            if name not in have:
                continue
            info = have[name]
            if info.shape != t.slot.shape:
                out[name] = f"has shape {list(info.shape)}, not {list(t.slot.shape)}"
            elif info.type != t.type:
                out[name] = f"is stored as {info.type}, the recipe says {t.type}"
            elif not self.constants_hold(t):
                out[name] = "holds other constants than it must (neutral fillings, rotary divisors)"
        for places in self._places.values():  # a tied head that is stored a second time
            for t, _ in places[1:]:
                if not out and not self._same(places[0][0], t):
                    out[t.slot.name] = f"differs from {places[0][0].slot.name}, whose copy it is"
        return out

    def constants_hold(self, t: Stored) -> bool:
        """Neutral fillings and rotary divisors, which come from no canonical tensor."""
        if t.slot.matrix:
            return bool(t.slot.pieces) or self._zeros(t)
        covered = sum(len(p.to) for p in t.slot.pieces)
        if t.slot.value is None and covered == int(np.prod(t.slot.shape)):
            return True
        got = self.vector(t)
        if t.slot.value is not None:
            return np.array_equal(got, t.slot.value.reshape(-1))
        free = np.setdiff1d(np.arange(got.size), np.concatenate([p.to for p in t.slot.pieces] or [[]]).astype(int))
        return bool((got[free] == np.float32(t.slot.fill)).all())

    def _zeros(self, t: Stored) -> bool:
        info = self._info(t)
        with info.file.open("rb") as f:
            return not any(read_rows(f, info, r, r + 1).any() for r in range(info.rows))

    def _same(self, a: Stored, b: Stored) -> bool:
        first, second = self._info(a), self._info(b)
        step = max(1, (1 << 24) // max(1, first.shape[-1] * 4))
        with first.file.open("rb") as f, second.file.open("rb") as g:
            return first.shape == second.shape and all(
                np.array_equal(read_rows(f, first, r, min(first.rows, r + step)),
                               read_rows(g, second, r, min(first.rows, r + step)))
                for r in range(0, first.rows, step)
            )  # fmt: skip

    def types(self) -> set[str]:
        """ggml types of the matrices, as the file has them."""
        return {self._info(t).type for places in self._places.values() for t, _ in places if t.slot.matrix}

    def type(self, name: str) -> str:
        """The ggml type of a canonical tensor."""
        return self._info(self._place(name)[0]).type

    def vector(self, t: Stored) -> NDArray[np.float32]:
        """A tensor of the file that is no matrix, flat."""
        info = self._info(t)
        with info.file.open("rb") as f:
            return dense(unpack(read_rows(f, info, 0, info.rows), info.type)).reshape(-1)

    def stored_rows(self, t: Stored, rows: NDArray[np.intp]) -> Values:
        """Rows of a tensor of the file in any order: one read where they lie close together, else one a row."""
        return unpack(self._bytes(t, rows), self._info(t).type)

    def _bytes(self, t: Stored, rows: NDArray[np.intp]) -> NDArray[np.uint8]:
        info = self._info(t)
        first, last = int(rows.min()), int(rows.max()) + 1
        with info.file.open("rb") as f:
            if last - first <= 4 * len(rows):
                return read_rows(f, info, first, last)[rows - first]
            return np.concatenate([read_rows(f, info, int(r), int(r) + 1) for r in rows])

    def bytes_hash(self, name: str) -> str:
        """SHA-256 of a matrix's bytes in canonical rows, as the receipt has it for native types."""
        t, piece = self._place(name)
        digest, step = hashlib.sha256(), max(1, (1 << 22) // self._info(t).row_bytes)
        for start in range(0, len(piece.to), step):
            digest.update(np.ascontiguousarray(self._bytes(t, piece.to[start : start + step])).data)
        return digest.hexdigest()

    def tensor(self, name: str) -> Values:
        """A whole canonical tensor."""
        return self.rows(name, 0, self.shapes[name][0])

    def weights(self, name: str) -> Array:
        """A whole canonical tensor, dequantized."""
        found = self.tensor(name)
        return found.dequantize() if isinstance(found, QuantizedTensor) else found

    def places(self, name: str) -> list[tuple[Stored, Piece]]:
        """Where a canonical tensor lies; one that the file lacks has none."""
        return self._places.get(name, [])

    def _place(self, name: str) -> tuple[Stored, Piece]:
        if name not in self._places:
            raise UserError(f"{self.path}: {name} is no tensor of this model")
        return self._places[name][0]

    def _info(self, t: Stored) -> Info:
        if t.slot.name not in self.header.tensors:
            raise UserError(f"{self.path}: {t.slot.name} is not in the file")
        return self.header.tensors[t.slot.name]
