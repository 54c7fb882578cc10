"""Reading a GGUF file back in canonical names and rows."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Planned, QuantizedTensor, Values
from backends.gguf.build import Stored, layout
from backends.gguf.container import Info, read_header, read_rows
from backends.gguf.names import Piece
from backends.gguf.pack import dense, unpack
from backends.gguf.twin import shipped_fit, shipped_spec
from spec.config import Spec
from spec.errors import UserError
from spec.params import params

Floats = NDArray[np.float32]


class Artifact:
    """A file that this program wrote; tensors are decoded when asked for.

    `.spec` is what the shipped graph computes with `.graph_weights`: where a rewrite rounds (gains with an offset, a
    logit scale in the final norm), the stored value stands and the spec says so.
    """

    def __init__(self, path: Path, source: Spec | None = None) -> None:
        self.path = path
        self.header = read_header(path)
        self.source = source or shipped_spec(self.header, path)
        self._fit = shipped_fit(self.header.arch, self.source)
        planned = [Planned(p.name, p.shape, "f32") for p in params(self.source)]  # places depend on no type
        self._places: dict[str, tuple[Stored, Piece]] = {}
        for t in layout(self.source, self._fit, planned):
            for piece in t.slot.pieces:
                self._places.setdefault(piece.name, (t, piece))
        self._shapes = {p.name: p.shape for p in params(self.source)}

    def tensor(self, name: str) -> Values:
        """A canonical tensor: codes and scales of Q4_0 and Q8_0 bit for bit, else float32.

        Vectors are as stored: compare them with `stored_as(name, values)` of the source's.
        """
        return self.rows(name, 0, self._shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows start..stop of a canonical tensor. Rows of a position table that nothing reaches come back as zeros."""
        t, piece = self._place(name)
        info = self._info(t)
        if len(self._shapes[name]) == 1:
            with self.path.open("rb") as f:
                flat = unpack(read_rows(f, info, 0, info.rows), info.type)
            assert not isinstance(flat, QuantizedTensor)
            return flat.reshape(-1)[piece.to[start:stop]]
        lo, hi = max(start, piece.skip), min(stop, piece.skip + len(piece.to))
        to = piece.to[lo - piece.skip : hi - piece.skip]
        first, last = int(to.min()), int(to.max()) + 1
        with self.path.open("rb") as f:
            found = unpack(read_rows(f, info, first, last)[to - first], info.type)
        if (lo, hi) == (start, stop):
            return found
        out = np.zeros((stop - start, *self._shapes[name][1:]), np.float32)
        out[lo - start : hi - start] = dense(found)
        return out

    def _place(self, name: str) -> tuple[Stored, Piece]:
        if name not in self._places:
            raise UserError(f"{self.path}: {name} is no tensor of this model")
        return self._places[name]

    def _info(self, t: Stored) -> Info:
        if t.slot.name not in self.header.tensors:
            raise UserError(f"{self.path}: tensor {t.slot.name} is missing")
        return self.header.tensors[t.slot.name]

    def type(self, name: str) -> str:
        """The ggml type of a canonical tensor."""
        return self._info(self._place(name)[0]).type

    def stored_as(self, name: str, values: Floats) -> Floats:
        """A vector of the source as this file must hold it (folds applied, rounded once to float32)."""
        _, piece = self._place(name)
        return (values.astype(np.float64) * piece.times + piece.add).astype(np.float32)

    @cached_property
    def spec(self) -> Spec:
        """What the shipped graph computes: the source's spec without what was folded into weights."""
        data: dict[str, Any] = self.source.model_dump(mode="json", exclude_unset=True)
        data |= {"pattern": [], "overrides": {}}
        blocks = [b.model_dump(mode="json") for b in self.source.layers]
        norms = [b["norm"] for b in blocks]
        norms += [b["attention"]["qk_norm"] for b in blocks if b["attention"]["qk_norm"]]
        if self.source.final_norm is not None:
            data["final_norm"] = self.source.final_norm.model_dump(mode="json")
            norms.append(data["final_norm"])
        if self.source.embedding.norm is not None:
            data["embedding"]["norm"] = self.source.embedding.norm.model_dump(mode="json")
            norms.append(data["embedding"]["norm"])
        for n in norms:
            n["offset"] = 0.0
        if self._scaled:
            data["head"] = self.source.head.model_dump(mode="json") | {"scale": None}
        return Spec.model_validate(data | {"block": blocks[0], "pattern": blocks})

    @property
    def _scaled(self) -> bool:
        from backends.gguf.fit import folded_logit_scale

        return folded_logit_scale(self.source, self._fit.carrier) != 1.0

    def graph_weights(self, name: str) -> Floats:
        """Float32 weights that the shipped graph computes with, for `.spec`."""
        if self._scaled and name not in self._places and name.startswith("final_norm"):
            return np.full(self._shapes[name], 1.0, np.float32)
        return dense(self.tensor(name))
