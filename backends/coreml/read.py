"""Reading a package back in canonical names and rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Arithmetic, Floats, Planned, QuantizedTensor, Values
from backends.coreml import package
from backends.coreml.contract import differences
from backends.coreml.mil.program import Function, Instruction, default_function, functions
from backends.coreml.mil.types import dtype_of
from backends.coreml.mil.weights import Blob
from backends.coreml.names import by_name, experts_in, in_linear, mil_name
from backends.coreml.palettes import BITS, Palette, group_rows, palettize
from backends.coreml.program import constants
from spec.config import Spec
from spec.errors import UserError
from spec.levels import CODES
from spec.load import parse, read_yaml

SCALED, TABLE, HALF = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense", "constexpr_cast"


class CoreMLArtifact:
    """A package that this program wrote; see `backends.base.Artifact`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UserError(f"{path}: no such package")
        self._model = package.read_model(path)
        self.source: Spec = parse(read_yaml(self._held("spec"), str(path)), str(path))
        self.spec = self.source
        self._params = by_name(self.source)

    def _held(self, name: str) -> str:
        return package.metadata(self._model, self.path, name)

    @property
    def level(self) -> str:
        return self._held("level")

    @property
    def compute(self) -> str:
        """Dtype of activations, `f16` or `f32`."""
        return self._held("compute")

    @property
    def receipt(self) -> dict[str, Any]:
        try:
            return json.loads(self._held("receipt"))
        except ValueError as e:
            raise UserError(f"{self.path}: its receipt is not JSON ({e})") from None

    @property
    def session(self) -> int:
        """Rotary tables are constants of the program, as long as the context."""
        return self.source.context

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(compute=self.compute, cache="f16", emulated=sys.platform != "darwin")

    @cached_property
    def functions(self) -> dict[str, Function]:
        """Every function of the program."""
        return functions(self._model, self.path / package.WEIGHTS)

    @property
    def default(self) -> str:
        """The function that runs where a client names none."""
        return default_function(self._model)

    @cached_property
    def _constants(self) -> dict[str, Instruction]:
        return _constants(self.functions[self.default])

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows of a canonical tensor: codes and scales where it is on the portable grid, else float32."""
        i = _flat(self._find(name))
        if len(self._params[name].shape) == 1:
            return _rows(i.args["val"], None).reshape(-1)[start:stop].astype(np.float32)
        at = (start, stop)
        match i.type:
            case "const":
                return _rows(i.args["val"], at).astype(np.float32)
            case "constexpr_cast":
                return _rows(i.args["source_val"], at).astype(np.float32)
            case "constexpr_lut_to_dense":
                return self._palette(i, start, stop)
            case _:
                codes, scales = _rows(i.args["data"], at), _rows(i.args["scale"], at).astype(np.float32)
                bits = 4 if dtype_of(i.args["data"]) == "INT4" else 8
                return QuantizedTensor(codes, scales, bits, codes.shape[1] // scales.shape[1])

    def _palette(self, i: Instruction, start: int, stop: int) -> Floats:
        tables = _rows(i.args["lut"], None).astype(np.float32)
        tables = tables.reshape(-1, tables.shape[-2])
        rows = prod(n or 1 for n in i.outputs[0].shape[:-1])
        table = tables[np.arange(start, stop) // (rows // len(tables))]
        return np.take_along_axis(table, _rows(i.args["indices"], (start, stop)).astype(np.intp), axis=1)

    def _find(self, name: str) -> Instruction:
        i = self._constants.get(mil_name(name))
        if name not in self._params or i is None:
            raise UserError(f"{self.path}: has no tensor {name}")
        return i

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """Tensors that are missing or of another type or shape than planned, constants with other values or that differ
        between functions, and whatever a client could not rely on."""
        out = {}
        for p in planned:
            i = self._constants.get(mil_name(p.name))
            how = "is missing" if i is None else self._difference(p, i)
            if how:
                out[p.name] = how
        made = constants(self.source)
        for name, value in made.items():
            i = self._constants.get(name)
            if i is None:
                out[name] = "is missing"
            elif not np.array_equal(_rows(i.args["val"], None).reshape(value.shape), value):
                out[name] = "differs from what the spec gives"
        for function in sorted(set(self.functions) - {self.default}):
            others = _constants(self.functions[function])
            for name in (*(p.name for p in planned), *made):
                a, b = (held.get(mil_name(name)) for held in (self._constants, others))
                if a is None or b is None or not _same(a, b):
                    out.setdefault(name, f"is another in the function {function}")
        dtype = "FLOAT16" if self.compute == "f16" else "FLOAT32"
        return out | differences(self._model, self.functions, self.path / package.WEIGHTS, self.source, dtype)

    def _difference(self, p: Planned, i: Instruction) -> str:
        shape = list(i.outputs[0].shape)
        experts = experts_in(self.source, p.name)
        apart = [experts, p.shape[0] // experts, *p.shape[1:]] if len(p.shape) > 1 and experts > 1 else list(p.shape)
        held = shape if len(p.shape) > 1 else [prod(n or 1 for n in shape)]
        if held != apart:
            return f"has shape {shape}, not {apart}"
        want, dtype = _type(p, self.compute, in_linear(self._params[p.name]))
        kinds = {"const": "val", HALF: "source_val", SCALED: "data", TABLE: "indices"}
        got = i.type, dtype_of(i.args[kinds[i.type]])
        return "" if got == (want, dtype) else f"is stored as {got[0]} of {got[1]}, not {want} of {dtype}"

    def rows_together(self, name: str, level: str) -> int:
        """Rows that share a table, in a palette; else 1."""
        return group_rows(self._params[name].shape[0] // experts_in(self.source, name)) if level in BITS else 1

    def expected(self, name: str, level: str, start: int, values: Floats) -> Floats | Palette:
        """Rows of the source as the package must hold them: rounded to float16 where that is the stored type, or
        palettized again, whole groups each."""
        if level not in BITS:
            half = level == "f16" or (self.compute == "f16" and in_linear(self._params[name]))
            return values.astype(np.float16).astype(np.float32) if half else values
        group = self.rows_together(name, level)
        assert start % group == 0 and len(values) % group == 0, f"{name}: rows {start}... cut a group of {group}"
        return palettize(values, BITS[level], group=group)


def _constants(f: Function) -> dict[str, Instruction]:
    return {i.outputs[0].name: i for i in f.body if i.type == "const" or i.type.startswith("constexpr_")}


def _same(a: Instruction, b: Instruction) -> bool:
    """Whether two constants are one: the same tensors of the weight file, or equal values in the program."""
    if (a.type, a.outputs, set(a.args)) != (b.type, b.outputs, set(b.args)):
        return False
    return all(_equal(a.args[key], b.args[key]) for key in a.args)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Blob) or isinstance(b, Blob):
        return a == b
    return bool(np.array_equal(a, b))


def _type(p: Planned, compute: str, in_product: bool) -> tuple[str, str]:
    """The operation and data type that hold a planned tensor."""
    if len(p.shape) == 1:
        return "const", "FLOAT16" if in_product and compute == "f16" else "FLOAT32"
    if p.level in BITS:
        return TABLE, f"UINT{BITS[p.level]}"
    if p.level == "f16":
        return ("const" if compute == "f16" else HALF), "FLOAT16"
    return (SCALED, f"INT{CODES[p.level]}") if p.level in CODES else ("const", "FLOAT32")


def _flat(i: Instruction) -> Instruction:
    """A constant whose tensors are matrices: the rows of experts one below the other."""

    def flat(value: Any) -> Any:
        if isinstance(value, str) or len(value.shape) != 3:
            return value
        shape = (value.shape[0] * value.shape[1], value.shape[2])
        return replace(value, shape=shape) if isinstance(value, Blob) else value.reshape(shape)

    return replace(i, args={key: flat(value) for key, value in i.args.items()})


def _rows(value: Any, at: tuple[int, int] | None) -> NDArray[Any]:
    if isinstance(value, Blob):
        return value.read() if at is None else value.rows(*at)
    return value if at is None else value[at[0] : at[1]]


def open_artifact(path: str | Path) -> CoreMLArtifact:
    """Open a package for its weights. Raises `UserError` where it is none of ours."""
    return CoreMLArtifact(Path(path))
