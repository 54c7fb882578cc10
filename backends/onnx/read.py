"""Reading a folder's weights back in canonical names and rows: positioned reads, never the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.base import Arithmetic, Floats, Planned, QuantizedTensor, Values
from backends.onnx.genai import CONFIG, config
from backends.onnx.kernels import Kernel, kernel
from backends.onnx.layout import (
    CODES,
    DATA,
    GROUP,
    MODEL,
    Profile,
    Stored,
    constants,
    decode,
    encode,
    layout,
    part_names,
    unpack,
)  # fmt: skip
from backends.onnx.support import OPTIONS, levels, session
from backends.reading import differences, load_json, own_mark, read_back, tokenizer_problems
from spec.config import Spec
from spec.errors import UserError
from spec.params import params

VIEWS = (".bytes", ".rows")
"""Ends of the names of further initializers over the same bytes."""


class GraphReader:
    """The weights behind a `model.onnx` that `GraphWriter` wrote."""

    def __init__(self, folder: Path, spec: Spec, profile: Profile) -> None:
        self.folder, self.spec = folder, spec
        self.profile: Profile = profile
        self._shapes = {p.name: p.shape for p in params(spec)}

    @cached_property
    def initializers(self) -> dict[str, Stored]:
        """Those in the data file. Raises `UserError` where the model cannot be read."""
        import onnx_ir as ir

        from backends.onnx.builder import DTYPES

        names = {kind: name for name, kind in DTYPES.items()}
        try:
            graph = ir.load(self.folder / MODEL).graph
        except Exception as e:  # onnx and protobuf raise errors of many kinds
            raise UserError(f"{self.folder / MODEL}: cannot be read: {str(e).splitlines()[0]}") from None
        out = {}
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.dtype in names:
                shape = tuple(int(d) for d in tensor.shape.numpy())
                out[name] = Stored(name, names[tensor.dtype], shape, tensor.offset or 0)
        return out

    def _read(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        file = self.folder / DATA
        try:
            with file.open("rb") as f:
                f.seek(offset)
                data = f.read(nbytes)
        except OSError as e:
            raise UserError(f"{file}: {e.strerror}") from None
        if len(data) < nbytes:
            raise UserError(f"{file}: is cut off: {name} ends at byte {offset + nbytes}")
        return np.frombuffer(data, np.uint8)

    def floats(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor of floats, by the initializer's name."""
        found = self.initializers.get(name)
        if found is None:
            raise UserError(f"{self.folder / MODEL}: {name} is missing")
        row = found.nbytes // found.shape[0]
        data = self._read(name, found.offset + start * row, (stop - start) * row)
        return decode(data, found.dtype).reshape(stop - start, *found.shape[1:])

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows of a canonical tensor: codes and scales where they are on the portable grid, else float32."""
        for level, bits in CODES.items():
            codes, scales = part_names(name, level)
            found = next((f for v in ("", *VIEWS) if (f := self.initializers.get(codes + v)) is not None), None)
            if found is not None:
                row = found.nbytes // found.shape[0]
                data = self._read(codes, found.offset + start * row, (stop - start) * row)
                whole = unpack(data, bits, self.profile).reshape(stop - start, -1)
                return QuantizedTensor(whole, self.floats(scales, start, stop), bits, GROUP)
        if name not in self._shapes:
            raise UserError(f"{self.folder}: {name} is no tensor of this model")
        return self.floats(name, start, stop)

    def problems(self, planned: Sequence[Planned], compute: str) -> dict[str, str]:
        """What differs from the layout that the plan asks for, and constants of another value."""
        wanted = layout(self.spec, planned, self.profile, compute)
        out: dict[str, str] = {}
        for name, t in wanted.tensors.items():
            same = [f for v in ("", *VIEWS) if (f := self.initializers.get(name + v)) is not None]
            if not same:
                out[name] = "missing"
            for f in same:
                if (f.offset, f.nbytes) != (t.offset, t.nbytes):
                    out[name] = f"{f.nbytes} bytes at {f.offset}, not {t.nbytes} at {t.offset}"
            found = self.initializers.get(name)
            if found is not None and (found.dtype, found.shape) != (t.dtype, t.shape):
                out[name] = f"{found.dtype} {list(found.shape)}, not {t.dtype} {list(t.shape)}"
        known = {n + v for n in wanted.tensors for v in ("", *VIEWS)}
        out |= {n: "is no tensor of this model" for n in self.initializers if n not in known}
        for name, start, values in constants(self.spec):
            if name not in out and not np.array_equal(self.floats(name, start, start + len(values)), values):
                out[name] = f"differs from the spec's, in rows {start}..{start + len(values) - 1}"
        return out


class Artifact:
    """See `backends.base.Artifact`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mark = own_mark(path, "onnx", levels(), OPTIONS)
        self.source = self.spec = mark.source
        self.level, self.receipt, self.compute = mark.level, mark.receipt, mark.options["compute"]
        self.profile: Profile = "portable" if mark.options["profile"] == "portable" else "ort"
        self._weights = GraphReader(path, self.spec, self.profile)

    @property
    def session(self) -> int | None:
        """Tokens of the session whose rotary tables are fixed in the graph."""
        return session(self.spec)

    @property
    def arithmetic(self) -> Arithmetic:
        """How ONNX Runtime rounds: on a CPU accuracy level 4 quantizes the inputs of products with codes, and
        GroupQueryAttention takes its rotary tables in the compute type."""
        quantized = self.profile == "ort" and self.level in CODES and self.compute == "f32"
        kinds = [kernel(b.attention, self.profile, self.compute) for b in self.spec.layers]
        tables = self.compute != "f32" and Kernel.GROUPED in kinds
        return Arithmetic(self.compute, self.compute, "int8" if quantized else None, tables=tables)

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """Tensors, constants, and what onnxruntime-genai reads, that are not as planned."""
        words = read_back(self.path)
        want = config(self.spec, words, self.profile, self.compute)
        out = differences({CONFIG: (load_json(self.path / CONFIG), want)})
        out |= tokenizer_problems(self.path, words, self.spec.context)
        return out | self._weights.problems(planned, self.compute)

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows of a canonical tensor as the file holds them."""
        return self._weights.rows(name, start, stop)

    def expected(self, name: str, level: str, start: int, values: Floats) -> Floats:
        """The source's rows rounded to the level's float type."""
        return decode(encode(values, level), level).reshape(values.shape)


def open_artifact(path: str | Path) -> Artifact:
    """Open a folder that this program wrote. Raises `UserError`."""
    return Artifact(Path(path))
