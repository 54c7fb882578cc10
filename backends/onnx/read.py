"""Reading a folder's weights back in canonical names and rows: positioned reads, never the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends import narrow
from backends.base import Arithmetic, Floats, Planned, QuantizedTensor, Values
from backends.onnx.genai import CONFIG, config, tokenizer_class
from backends.onnx.kernels import Kernel, activations_of, grouped_experts, kernel
from backends.onnx.layout import (
    DATA,
    MODEL,
    Profile,
    Stored,
    constants,
    decode,
    encode,
    expert_levels,
    layout,
    part_names,
    unpack,
)  # fmt: skip
from backends.onnx.support import OPTIONS, levels, session
from backends.reading import differences, load_json, own_mark, read_back, tokenizer_problems
from spec.config import MoE, Spec
from spec.errors import UserError
from spec.levels import CODES, GROUPS
from spec.params import params

VIEWS = (".bytes", ".rows", ".experts", ".pairs")
"""Ends of the names of further initializers over the same bytes; of `.experts` [E, N, ...], and of `.pairs` [E, 2 N,
...], whose rows are the gate's and up's in turn."""


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
                if name.endswith((".experts", ".pairs")):
                    shape = (shape[0] * shape[1], *shape[2:])
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

    def _find(self, name: str) -> Stored | None:
        for view in ("", *VIEWS[:3]):
            if (found := self.initializers.get(name + view)) is not None:
                return found
        both = self.initializers.get(name.replace(".experts.up.", ".experts.gate.") + ".pairs")
        if both is None:
            return None
        half = replace(both, name=name, shape=(both.shape[0] // 2, *both.shape[1:]), step=2)
        return replace(half, offset=half.offset + half.row_bytes) if ".experts.up." in name else half

    def level(self, name: str) -> str:
        """The level of a quantized matrix; an empty text for floats."""
        return next((level for level in CODES if self._find(part_names(name, level)[0]) is not None), "")

    def _bytes(self, t: Stored, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows of a tensor, without what lies between them."""
        row, apart, count = t.row_bytes, t.row_bytes * t.step, stop - start
        data = self._read(t.name, t.offset + start * apart, max(0, (count - 1) * apart + row))
        return np.lib.stride_tricks.as_strided(data, (count, row), (apart, 1), writeable=False).reshape(-1)

    def floats(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor of floats, by the initializer's name."""
        found = self._find(name)
        if found is None:
            raise UserError(f"{self.folder / MODEL}: {name} is missing")
        data = self._bytes(found, start, stop)
        values = narrow.decode(data, found.dtype) if found.dtype == "e4m3" else decode(data, found.dtype)
        return values.reshape(stop - start, *found.shape[1:])

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows of a canonical tensor: codes and scales where they are on the portable grid, else float32."""
        for level, bits in CODES.items():
            codes, scales = part_names(name, level)
            found = self._find(codes)
            if found is not None:
                whole = unpack(self._bytes(found, start, stop), bits, self.profile).reshape(stop - start, -1)
                return QuantizedTensor(whole, self.floats(scales, start, stop), bits, GROUPS[level])
        for level in narrow.LEVELS:
            codes, scales = part_names(name, level)
            if (found := self._find(codes)) is not None:
                held = narrow.unpack(self._bytes(found, start, stop), found.dtype).reshape(stop - start, -1)
                whole = float(self.floats(f"{name}.whole", 0, 1)[0]) if level == "nvfp4" else 1.0
                return narrow.Narrow(level, held, self.floats(scales, start, stop), whole).dequantize()
        if name not in self._shapes:
            raise UserError(f"{self.folder}: {name} is no tensor of this model")
        return self.floats(name, start, stop)

    def problems(self, planned: Sequence[Planned], compute: str, activations: str = "") -> dict[str, str]:
        """What differs from the layout that the plan asks for, and constants of another value."""
        wanted = layout(self.spec, planned, self.profile, compute, activations)
        out: dict[str, str] = {}
        for name, t in wanted.tensors.items():
            same = [f for v in ("", *VIEWS[:3]) if (f := self.initializers.get(name + v)) is not None]
            same = same or [f for f in [self._find(name)] if f is not None]
            if not same:
                out[name] = "missing"
            for f in same:
                if (f.offset, f.nbytes, f.step) != (t.offset, t.nbytes, t.step):
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
        mark = own_mark(path, "onnx", levels(), OPTIONS, added=("activations",))
        self.source = self.spec = mark.source
        self.level, self.receipt, self.compute = mark.level, mark.receipt, mark.options["compute"]
        self.profile: Profile = "portable" if mark.options["profile"] == "portable" else "ort"
        self.activations = activations_of(self.profile, self.compute, mark.options["activations"])
        self._weights = GraphReader(path, self.spec, self.profile)

    @property
    def session(self) -> int | None:
        """Tokens of the session whose rotary tables are fixed in the graph."""
        return session(self.spec)

    @property
    def arithmetic(self) -> Arithmetic:
        """How ONNX Runtime rounds: on a CPU accuracy level 4 quantizes the inputs of products with codes (but for those
        in a loop over experts), and GroupQueryAttention takes its rotary tables in the compute type."""
        coded = any(self._weights.level(p.name) for p in params(self.spec) if p.matrix)
        quantized = self.activations == "int8" and coded
        kinds = [kernel(b.attention, self.profile, self.compute) for b in self.spec.layers]
        tables = self.compute != "f32" and Kernel.GROUPED in kinds
        looped = frozenset(self._looped()) if quantized else frozenset()
        return Arithmetic(self.compute, self.compute, "int8" if quantized else None, looped, tables=tables)

    def _looped(self) -> Iterator[str]:
        """Weights of experts that no fused operator computes."""
        for i, b in enumerate(self.spec.layers):
            if not isinstance(b.mlp, MoE):
                continue
            at = f"layers.{i}.mlp.experts"
            own = (p.name for p in params(self.spec) if p.role == "experts" and p.name.startswith(f"{at}."))
            levels = {name: self._weights.level(name) for name in own}
            if not grouped_experts(b.mlp, self.profile, self.compute, expert_levels(levels, at), self.activations):
                yield from levels

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """Tensors, constants, and what onnxruntime-genai reads, that are not as planned."""
        words = read_back(self.path)
        want = config(self.spec, words, self.profile, self.compute)
        out = differences({CONFIG: (load_json(self.path / CONFIG), want)})
        out |= tokenizer_problems(self.path, words, self.spec.context, tokenizer_class(words))
        return out | self._weights.problems(planned, self.compute, self.activations)

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows of a canonical tensor as the file holds them."""
        return self._weights.rows(name, start, stop)

    def expected(self, name: str, level: str, start: int, values: Floats) -> Floats:
        """The source's rows rounded to the level's float type."""
        return decode(encode(values, level), level).reshape(values.shape)


def open_artifact(path: str | Path) -> Artifact:
    """Open a folder that this program wrote. Raises `UserError`."""
    return Artifact(Path(path))
