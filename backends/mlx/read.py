"""Reading a folder back in canonical names and rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Arithmetic, Floats, Planned, Values
from backends.folder import MARK, marked_spec, read_mark
from backends.mlx import pack as packs
from backends.mlx.build import encoded
from backends.mlx.bundle import source
from backends.mlx.choose import named
from backends.mlx.container import Input
from backends.mlx.layout import BUNDLED, Piece, Slot, Stored, arrange, fixed, quantization
from backends.mlx.levels import FLOATS, GRID, NATIVE, Packing, known
from spec.config import Spec
from spec.errors import UserError
from spec.params import params


class MLXArtifact:
    """A folder that this program wrote; see `backends.base.Artifact`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mark = read_mark(path)
        if mark.get("backend") != "mlx":
            raise UserError(f"{path}: has no {MARK} of an MLX conversion: run it with mlx-lm itself (mlx_lm.generate)")
        self.source: Spec = marked_spec(mark, path)
        self.level = str(mark.get("level"))
        self.receipt: dict[str, Any] = dict(mark.get("receipt") or {})
        self.compute = str((mark.get("options") or {}).get("compute"))
        if self.level not in known() or self.compute not in FLOATS:
            raise UserError(f"{path / MARK}: level {self.level}, compute {self.compute}: not known to this version")
        self.config = _config(path)
        carrier = BUNDLED if "model_file" in self.config else str(self.config.get("model_type"))
        self.fit = named(carrier, self.source, self.compute, path)
        self.spec: Spec = self.fit.spec
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
        plain = json.loads(json.dumps({**self.fit.config, **quantization(stored)}))
        out |= {f"config.json {k}": "is not the spec's" for k, v in plain.items() if self.config.get(k) != v}
        if not quantization(stored) and "quantization" in self.config:
            out["config.json quantization"] = "is no part of this model"
        if self.fit.carrier == BUNDLED:
            file = self.path / BUNDLED
            if not file.is_file() or file.read_text(encoding="utf-8") != source():
                out[BUNDLED] = "is not the one that this version writes"
        if not out:
            out |= {t.slot.name: "neutral elements changed" for t in stored if not self._neutral(t)}
        return out

    def _neutral(self, t: Stored) -> bool:
        """Whether what no canonical tensor provides has its neutral value."""
        s = t.slot
        free = np.ones(s.shape[0], bool)
        for p in s.pieces:
            free[p.to] = False
        if not free.any():
            return True
        return bool((packs.from_floats(self.input.rows(s.name, 0, s.shape[0]), t.dtype)[free] == s.fill).all())

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
        group, bits = cols // scales.shape[1], t.shape[1] * 32 // cols
        mode = NATIVE[self.level].mode if self.level in NATIVE else "affine"
        return Stored(slot, FLOATS[self.compute], Packing(bits, group, mode), self.level)

    def _place(self, name: str) -> tuple[Stored, Piece]:
        if name not in self._places:
            raise UserError(f"{self.path}: {name} is no tensor of this model")
        slot, piece = self._places[name]
        return self.stored(slot), piece

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows start..stop of a canonical tensor."""
        t, piece = self._place(name)
        to = piece.to[start:stop]
        if not len(to):
            return np.empty((0, *self._shapes[name][1:]), np.float32)
        first, last = int(to.min()), int(to.max()) + 1
        parts = {n: self.input.rows(x.name, first, last)[to - first] for n, x in t.tensors.items()}
        if t.packing is None:
            return packs.from_floats(parts[""], t.dtype)
        if self.level in GRID:
            return packs.to_grid(parts, t.packing, t.dtype)
        return packs.dequantize(parts, t.packing, t.dtype)

    def expected(self, name: str, level: str, start: int, values: Floats) -> Floats:
        """Rows of the source as the file must hold them."""
        t, piece = self._place(name)
        parts = encoded(t, piece, values, name)
        return packs.from_floats(parts[""], t.dtype) if t.packing is None else packs.dequantize(
            parts, t.packing, t.dtype
        )  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}") from None
    except ValueError:
        raise UserError(f"{file}: not valid JSON") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: not a JSON object")
    return data


def open_artifact(path: str | Path) -> MLXArtifact:
    """A folder for its weights. Raises `UserError` where it is not whole, or not ours."""
    return MLXArtifact(Path(path))
