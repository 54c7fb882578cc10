"""Reading a folder back in canonical names and rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Arithmetic, Planned, QuantizedTensor, Values
from backends.hf.build import LEVELS_KEY, SCALES, configuration
from backends.hf.carriers import told
from backends.hf.fit import examine
from backends.hf.store import Slot, Store, codes_of, unpack
from backends.hf.support import levels
from backends.reading import differences, load_json, own_mark, read_back, tokenizer_problems
from backends.safetensors import INDEX, WEIGHTS, FileReader, narrow, widen
from spec.config import Spec
from spec.errors import UserError
from spec.layout import Run
from spec.levels import CODES, GROUPS
from spec.params import params

Floats = NDArray[np.float32]

GENERATION = "generation_config.json"


class Artifact:
    """A folder that this program wrote; see `backends.base.Artifact`.

    Folds are undone in float64: a gain stored as 1 + w gives the w whose 1 + w it is. So the graph is the source's
    spec, and a wrong fold shows against it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        mark = own_mark(path, "hf", levels(), ())
        self.source: Spec = mark.source
        self.spec: Spec = mark.source
        self.level, self.receipt = mark.level, mark.receipt
        self.config = load_json(path / "config.json")
        self._weight_map = _weight_map(path)
        self._files = [FileReader(path / name) for name in sorted(set(self._weight_map.values())) or [WEIGHTS]]
        self._of = {name: f for f in self._files for name in f.tensors}
        carrier = told(self.config)
        if carrier is None:
            raise UserError(
                f"{path}: config.json: model_type: {self.config.get('model_type')!r} is none of the carriers"
            )
        self._fit = examine(self.source, carrier)
        if self._fit.refusals:
            raise UserError(
                f"{path}: config.json: model_type: {carrier.arch} does not carry the spec: {self._fit.refusals[0]}"
            )
        self.levels = self._levels()
        self.store = Store(self._fit, [Planned(p.name, p.shape, self.levels[p.name]) for p in params(self.source)])
        self._scales = FileReader(path / SCALES) if self.store.dense else None
        self._shapes = {p.name: p.shape for p in params(self._fit.spec)}
        self._places: dict[str, list[str]] = {}
        for shipped, origin in self._fit.origins.items():
            if origin.name is not None:
                self._places.setdefault(origin.name, []).append(shipped)

    def _levels(self) -> dict[str, str]:
        try:
            said: dict[str, list[str]] = json.loads(self._files[0].metadata[LEVELS_KEY])
            levels = {name: level for level, names in said.items() for name in names}
        except (KeyError, ValueError, AttributeError):
            raise UserError(f"{self._files[0].path}: its header does not say the levels: not written by us") from None
        missing = [p.name for p in params(self.source) if p.name not in levels]
        if missing:
            raise UserError(f"{self._files[0].path}: its header does not say the level of {missing[0]}")
        return levels

    @property
    def carrier(self) -> str:
        """transformers' architecture."""
        return self._fit.carrier.arch

    @property
    def session(self) -> int | None:
        return self._fit.session

    @property
    def arithmetic(self) -> Arithmetic:
        kind = {"F32": "f32", "F16": "f16", "BF16": "bf16"}[self.store.dtype]
        c = self._fit.carrier
        return Arithmetic(compute=kind, cache=kind, tables=c.rounds_tables, gains=c.rounds_gains)

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """What is missing, too much or otherwise than planned; config.json and constant tensors too."""
        want = Store(self._fit, planned)
        expected = {t.name: t for s in want.slots.values() for t in s.tensors()}
        out: dict[str, str] = {}
        for name, t in expected.items():
            found = self._of[name].tensors[name] if name in self._of else None
            if found is None:
                out[name] = "is missing"
            elif (found.dtype, found.shape) != (t.dtype, t.shape):
                out[name] = f"is {found.dtype} {list(found.shape)}, not {t.dtype} {list(t.shape)}"
        out |= {name: "is no tensor of this model" for name in self._of if name not in expected}
        if {t.name for t in want.scales()} != set(self._scales.tensors if self._scales else ()):
            out[SCALES] = "does not hold the scales of what is stored as floats"
        out |= self._texts(want)
        return out or self._constants(want)

    def _texts(self, want: Store) -> dict[str, str]:
        """What is wrong with the files beside the weights."""
        words = read_back(self.path)
        out = differences({"config.json": (self.config, configuration(want, words))})
        out |= tokenizer_problems(self.path, words, self.source.context)
        if words is None and (self.path / GENERATION).exists():
            out[GENERATION] = "does not belong into a folder without a tokenizer"
        if self._weight_map and self._weight_map != {n: f.path.name for n, f in self._of.items()}:
            out[INDEX] = "does not say where the tensors are"
        return out

    def _constants(self, want: Store) -> dict[str, str]:
        out: dict[str, str] = {}
        for name, origin in self._fit.origins.items():
            if origin.name is None and not (self._vector(name) == np.float32(origin.fill)).all():
                out[name] = f"is not {origin.fill:g} throughout"
        for first, *copies in self._places.values():  # norms that both branches shared
            for name in copies:
                if not np.array_equal(self._vector(name), self._vector(first)):
                    out[name] = f"differs from {first}, whose copy it is"
        for s in want.slots.values():
            if s.packed is not None and tuple(self._raw(f"{s.name}_shape", 0, 2)) != s.shape:
                out[f"{s.name}_shape"] = f"is not {list(s.shape)}"
        return out

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows start..stop of a canonical tensor of the source, folds undone."""
        shipped = self._place(name)
        found = self._stored(shipped, start, stop)
        return found if isinstance(found, QuantizedTensor) else self._unfolded(shipped, found)

    def _vector(self, shipped: str) -> Floats:
        """A whole vector of the shipped spec, as it is stored."""
        found = self._stored(shipped, 0, self._shapes[shipped][0])
        assert not isinstance(found, QuantizedTensor), "vectors are floats"
        return found

    def _unfolded(self, shipped: str, values: Floats) -> NDArray[Any]:
        add = self._fit.origins[shipped].add
        return values.astype(np.float64) - add if add else values

    def _stored(self, shipped: str, start: int, stop: int) -> Values:
        """Rows start..stop of a tensor of the shipped spec, as they are stored."""
        runs = self.store.layout.runs(shipped, start, stop)
        origin, cols = self._fit.origins[shipped].name, self._shapes[shipped][1:]
        slot = self.store.slots[runs[0].tensor]
        if slot.packed is not None:
            own, bits, group = self.levels[str(origin)], CODES[slot.packed], GROUPS[slot.packed]
            codes = np.empty((stop - start, *cols), np.int8)
            scales = np.empty((stop - start, cols[0] // group), np.float32)
            for r in runs:
                end = r.start + len(r.take)
                codes[r.take] = unpack(self._raw(f"{r.tensor}_packed", r.start, end), bits)
                scales[r.take] = self._raw(f"{r.tensor}_scale", r.start, end)
            return QuantizedTensor(codes, scales, CODES[own], group).grouped(GROUPS[own])
        out = np.empty((stop - start, *cols), np.float32)
        for r in runs:
            out[r.take] = self._floats(self.store.slots[r.tensor], r)
        if origin in self.store.dense and self._scales is not None:
            scales = self._scales.rows(origin, start, stop).astype(np.float32)
            found = codes_of(out, scales, self.levels[origin])
            if not isinstance(found, QuantizedTensor):
                raise UserError(f"{self.path}: {origin}: rows {start}..{stop - 1} are no codes times {SCALES}'s scales")
            return found
        return out

    def _place(self, name: str) -> str:
        """The tensor of the shipped spec that holds one of the source."""
        if name not in self._places:
            raise UserError(f"{self.path}: {name} is no tensor of this model")
        return self._places[name][0]

    def _floats(self, slot: Slot, r: Run) -> Floats:
        end, file = r.start + len(r.take), self._file(slot.name)
        dtype = file.tensors[slot.name].dtype  # float32 where the scales are a source's own, else the slot's
        if slot.bound.folded:
            return widen(file.elements(slot.name, r.start, end), dtype)
        if not slot.bound.transposed:
            return widen(self._raw(slot.name, r.start, end), dtype)
        return widen(file.columns(slot.name, r.start, end), dtype)

    def _raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._file(name).rows(name, start, stop)

    def _file(self, name: str) -> FileReader:
        if name not in self._of:
            raise UserError(f"{self.path}: tensor {name} is missing")
        return self._of[name]

    def expected(self, name: str, level: str, start: int, values: Floats) -> Floats:
        """What `rows` must give for these rows of the source: folded, rounded to the slot's dtype, the fold undone."""
        shipped = self._place(name)
        slot = self.store.slots[self.store.layout.runs(shipped, 0, 1)[0].tensor]
        add = self._fit.origins[shipped].add
        folded = values.astype(np.float64) + add if add else values
        return self._unfolded(shipped, widen(narrow(folded, slot.dtype), slot.dtype))


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of every tensor; empty where there is one file for all."""
    if not (folder / INDEX).is_file():
        return {}
    if (folder / WEIGHTS).exists():
        raise UserError(f"{folder}: holds {WEIGHTS} beside {INDEX}, and clients take the first")
    weight_map = load_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: has no weight_map")
    return {str(k): str(v) for k, v in weight_map.items()}


def open_artifact(path: Path) -> Artifact:
    """The folder, for its weights. Raises `UserError` where it is not whole or not ours."""
    return Artifact(Path(path))
