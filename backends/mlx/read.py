"""Reading a folder back in canonical names and rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Arithmetic, Floats, Planned, Values
from backends.folder import MARK, read_mark
from backends.mlx import pack as packs
from backends.mlx import rotary
from backends.mlx.build import config, encoded
from backends.mlx.bundle import source
from backends.mlx.checks import window
from backends.mlx.choose import named
from backends.mlx.container import Input
from backends.mlx.layout import BUNDLED, Piece, Slot, Stored, arrange, fixed
from backends.mlx.levels import FLOATS, NATIVE, Packing
from backends.mlx.support import OPTIONS, levels
from backends.reading import differences, load_json, own_mark, read_back, tokenizer_problems
from spec.config import Rope, Spec
from spec.errors import UserError
from spec.params import params
from spec.rope import RopeTable, layer_table


class MLXArtifact:
    """A folder that this program wrote; see `backends.base.Artifact`.

    Folds are undone in `rows`, exactly, so `spec` is the source's: what runs the folder as it is stored is compared
    with the source's function, and a wrong fold shows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not read_mark(path):
            raise UserError(f"{path}: has no {MARK} of an MLX conversion: run it with mlx-lm itself (mlx_lm.generate)")
        mark = own_mark(path, "mlx", levels(), OPTIONS)
        self.source: Spec = mark.source
        self.spec: Spec = mark.source
        self.level, self.receipt, self.compute = mark.level, mark.receipt, mark.options["compute"]
        self.config = load_json(path / "config.json")
        carrier = BUNDLED if "model_file" in self.config else str(self.config.get("model_type"))
        self.fit = named(carrier, self.source, self.compute, path)
        self.session: int | None = self.source.context if fixed(self.source) else None
        self.input = Input(path)
        self._places: dict[str, tuple[Slot, Piece]] = {}
        for s in self.fit.slots:
            for p in s.pieces:
                self._places[p.name] = s, p
        self._shapes = {p.name: p.shape for p in params(self.source)}

    @property
    def arithmetic(self) -> Arithmetic:
        """Operations round once to the dtype of the activations; the cache has it too."""
        return Arithmetic(self.compute, self.compute)

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """What is missing, too much, or of another type or shape, and constants that are not the spec's."""
        stored = arrange(self.fit.slots, planned, self.compute)
        wanted = {x.name: x for t in stored for x in t.tensors.values()}
        out = {n: "is missing" for n in wanted if n not in self.input.tensors}
        out |= {n: "is no tensor of this model" for n in self.input.tensors if n not in wanted}
        for name, t in wanted.items():
            got = self.input.tensors.get(name)
            if got is not None and got != t:
                out[name] = f"is {got.dtype} {list(got.shape)}, not {t.dtype} {list(t.shape)}"
        out |= self._texts(stored)
        if not out:
            out |= {t.slot.name: "neutral elements changed" for t in stored if not self._neutral(t)}
        return out

    def _texts(self, stored: Sequence[Stored]) -> dict[str, str]:
        """What is wrong with the files beside the weights."""
        words = read_back(self.path)
        want = config(self.fit, stored, self.compute, words)
        out = differences({"config.json": (self.config, json.loads(json.dumps(want)))})
        out |= tokenizer_problems(self.path, words, self.source.context)
        bundled = self.path / BUNDLED
        if self.fit.carrier == BUNDLED:
            if not bundled.is_file() or bundled.read_text(encoding="utf-8") != source():
                out[BUNDLED] = "is not the one that this version writes"
            return out
        if bundled.exists():
            out[BUNDLED] = "does not belong beside an architecture of mlx-lm's"
        for i, b in enumerate(self.source.layers):
            want = layer_table(b.attention, self.source.context)
            if want is not None and not rotary.same(self.table(i), want):
                out[f"config.json rope_scaling, layers[{i}]"] = "gives another rotary table than the spec's"
        return out

    def table(self, layer: int) -> RopeTable:
        """The rotary table that mlx-lm makes of config.json for a layer that rotates. Raises `UserError`."""
        b = self.fit.shipped.layers[layer]
        assert isinstance(b.attention.position, Rope) and b.attention.head_dim is not None
        try:
            return rotary.read(self.config, b.attention.head_dim, window(self.source, b) is not None)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
            raise UserError(f"{self.path / 'config.json'}: its rotary settings are damaged") from None

    def _neutral(self, t: Stored) -> bool:
        """Whether what no canonical tensor provides has its neutral value."""
        s = t.slot
        got = packs.from_floats(self.input.elements(s.name, 0, s.shape[0]), t.dtype) if s.neutral else np.empty(0)
        return all(bool((got[p.to] == np.float32(s.fill)).all()) for p in s.neutral)

    def stored(self, slot: Slot) -> Stored:
        """A slot as the file holds it. Raises `UserError` where it is missing."""
        t = self.input.tensors.get(slot.name)
        if t is None:
            raise UserError(f"{self.path}: tensor {slot.name} is missing")
        if t.dtype != "U32":
            return Stored(slot, t.dtype, None, "")
        scales = self.input.tensors.get(f"{slot.path}.scales")
        if scales is None:
            raise UserError(f"{self.path}: tensor {slot.path}.scales is missing")
        cols = slot.shape[1]
        group, bits = cols // scales.shape[-1], t.shape[-1] * 32 // cols
        kinds = (p for p in NATIVE.values() if scales.dtype == "U8" and (p.bits, p.group) == (bits, group))
        packed = next((p for p in kinds if p.mode != "affine"), Packing(bits, group))
        return Stored(slot, FLOATS[self.compute], packed, self.level)

    def _place(self, name: str) -> tuple[Stored, Piece]:
        if name not in self._places:
            raise UserError(f"{self.path}: {name} is no tensor of this model")
        slot, piece = self._places[name]
        return self.stored(slot), piece

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows start..stop of a canonical tensor, without the offset that a gain holds."""
        t, piece = self._place(name)
        to = piece.to[start:stop]
        if not len(to):
            return np.empty((0, *self._shapes[name][1:]), np.float32)
        first, last = int(to.min()), int(to.max()) + 1
        fetch = self.input.rows if t.slot.matrix else self.input.elements
        parts = {n: fetch(x.name, first, last)[to - first] for n, x in t.tensors.items()}
        if t.packing is None:
            return _unfold(packs.from_floats(parts[""], t.dtype), piece)
        if packs.on_grid(parts, t.packing, t.dtype):
            return packs.to_grid(parts, t.packing, t.dtype)
        return packs.dequantize(parts, t.packing, t.dtype)

    def expected(self, name: str, level: str, start: int, values: Floats) -> Floats:
        """What `rows` must give for these rows of the source."""
        t, piece = self._place(name)
        parts = encoded(t, piece, values, name)
        if t.packing is None:
            return _unfold(packs.from_floats(parts[""], t.dtype), piece)
        return packs.dequantize(parts, t.packing, t.dtype)


def _unfold(values: NDArray[Any], piece: Piece) -> NDArray[Any]:
    """Stored elements less what was added: in float64, where that is exact."""
    return values.astype(np.float64) - piece.add if piece.add else values


def open_artifact(path: str | Path) -> MLXArtifact:
    """A folder for its weights. Raises `UserError` where it is not whole, or not ours."""
    return MLXArtifact(Path(path))
