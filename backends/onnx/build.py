"""Writing the folder: graph and layout are known before the first row arrives, so rows go to their final place."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import narrow
from backends.base import Floats, Planned, QuantizedTensor, Tokenizer, Values
from backends.folder import stamp, write_mark, write_tokenizer
from backends.onnx.kernels import activations_of
from backends.onnx.layout import DATA, MODEL, Layout, Profile, Stored, constants, encode, layout, pack
from backends.placed import PlacedFile
from spec.config import Spec
from spec.errors import UserError
from spec.levels import CODES

__all__ = ["DataWriter", "GraphWriter", "OnnxWriter", "size", "stamp", "writer"]


class DataWriter:
    """The data file: rows of canonical tensors in any order, each once, to their final offsets."""

    def __init__(self, path: Path, spec: Spec, places: Layout) -> None:
        self.path, self.places = path, places
        self._missing = {name: self._rows(name) for name in places.levels}
        self._held: dict[str, Floats] = {}
        path.unlink(missing_ok=True)
        self._file = PlacedFile(path, places.nbytes)
        try:
            for name, start, rows in constants(spec):
                t = places.tensors[name]
                self._file.write(encode(rows, "f32"), t.offset + start * t.row_bytes)
        except BaseException:
            self.abort()
            raise

    def _rows(self, name: str) -> int:
        return self.places.parts(name)[0].shape[0]

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor."""
        assert name in self._missing, f"{name} is no tensor of this model"
        parts, level = self.places.parts(name), self.places.levels[name]
        if isinstance(values, QuantizedTensor):
            codes, scales = parts
            assert values.bits == CODES[level], f"{name}: {values.bits} bits at level {level}"
            self._put(codes, start, pack(values, self.places.profile))
            self._put(scales, start, encode(values.scales, scales.dtype))
        elif level in narrow.LEVELS:
            self._narrow(name, level, start, values)
        else:
            assert level not in CODES, f"{name}: floats at level {level}"
            self._put(parts[0], start, encode(values, level))
        self._missing[name] -= values.shape[0]

    def _narrow(self, name: str, level: str, start: int, values: Floats) -> None:
        """Round rows here. What nvfp4's largest weight decides waits until all rows are there."""
        codes, scales, *whole = self.places.parts(name)
        if whole:
            held = self._held.setdefault(name, np.empty(codes.shape, np.float32))
            held[start : start + len(values)] = values
            if self._missing[name] > len(values):
                return
            start, values = 0, self._held.pop(name)
        try:
            q = narrow.quantize(values, level)
        except UserError as e:
            raise UserError(f"{name}: {e}") from None
        self._put(codes, start, narrow.pack(q.codes, codes.dtype))
        if whole:
            self._put(scales, start, narrow.encode(q.scales, "e4m3").reshape(-1))
            self._put(whole[0], 0, encode(np.array([q.whole], np.float32), "f32"))
        else:
            self._put(scales, start, encode(q.scales, scales.dtype))

    def _put(self, t: Stored, start: int, data: NDArray[np.uint8]) -> None:
        apart = t.row_bytes * t.step
        for i, rows in enumerate([data] if t.step == 1 else data.reshape(-1, t.row_bytes)):
            self._file.write(rows, t.offset + (start + i) * apart)

    def close(self) -> None:
        """Flush to disk."""
        lost = {n: r for n, r in self._missing.items() if r}
        assert not lost, f"rows missing (or written twice): {lost}"
        self._file.close()

    def abort(self) -> None:
        """Close and delete."""
        self._file.abort()


class GraphWriter:
    """`model.onnx` and its data file in a folder, nothing else: what other backends build from."""

    def __init__(
        self,
        spec: Spec,
        planned: Sequence[Planned],
        out: Path,
        *,
        profile: Profile = "portable",
        compute: str = "f32",
        activations: str = "",
        **graph: Any,
    ) -> None:
        """graph: `cache`, `slots`, `rows_first` as `backends.onnx.graph.model` takes them."""
        import onnx_ir

        from backends.onnx.graph import model

        self.out, self._data, self._made = out, None, not out.exists()
        made = model(spec, planned, profile=profile, compute=compute, activations=activations, **graph)
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._data = DataWriter(out / DATA, spec, layout(spec, planned, profile, compute, activations))
            onnx_ir.save(made, out / MODEL)
        except BaseException as e:
            self.abort()
            if isinstance(e, OSError):
                raise UserError(f"{e.filename or out}: {e.strerror or e}") from None
            raise

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor."""
        assert self._data is not None
        self._data.write(name, start, values)

    def close(self) -> None:
        """Flush to disk."""
        assert self._data is not None
        self._data.close()

    def abort(self) -> None:
        """Close and delete the two files, and the folder with all that is in it if it was not there before."""
        if self._data is not None:
            self._data.abort()
        if self.out.is_dir():
            (self.out / MODEL).unlink(missing_ok=True)
        if self._made:
            shutil.rmtree(self.out, ignore_errors=True)


class OnnxWriter:
    """A `backends.base.Writer`: the graph, its data, onnxruntime-genai's configuration, the tokenizer, the mark."""

    def __init__(
        self, spec: Spec, planned: Sequence[Planned], tokenizer: Tokenizer | None, out: Path, level: str, **options: Any
    ) -> None:
        self.spec, self.tokenizer, self.out, self.level, self.options = spec, tokenizer, out, level, options
        self._graph = GraphWriter(spec, planned, out, **options)

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor."""
        self._graph.write(name, start, values)

    def close(self, receipt: dict[str, Any]) -> None:
        """What lies beside the weights, and at last the mark."""
        from backends.onnx.genai import tokenizer_class, write_config

        try:
            self._graph.close()
            write_tokenizer(self.out, self.tokenizer, self.spec.context, tokenizer_class(self.tokenizer))
            kind = {name: self.options[name] for name in ("profile", "compute")}
            write_config(self.out, self.spec, self.tokenizer, **kind)
            write_mark(self.out, "onnx", self.spec, self.level, self.options, receipt)
        except OSError as e:
            raise UserError(f"{e.filename or self.out}: {e.strerror or e}") from None

    def abort(self) -> None:
        """Delete everything."""
        self._graph.abort()


def writer(
    spec: Spec,
    planned: Sequence[Planned],
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    level: str,
    metadata: dict[str, Any],
    threads: int,
    profile: str = "ort",
    compute: str = "f32",
    activations: str = "",
) -> OnnxWriter:
    """A folder that onnxruntime-genai and ONNX Runtime open. `metadata` and `threads` are not needed here."""
    from backends.onnx.support import support

    refusals = support(spec, level, profile=profile, compute=compute, activations=activations).refusals
    if refusals:
        raise UserError("\n".join(refusals))
    chosen = activations_of(profile, compute, activations)
    return OnnxWriter(spec, planned, tokenizer, out, level, profile=profile, compute=compute, activations=chosen)


def size(
    spec: Spec,
    planned: Sequence[Planned],
    tokenizer: Tokenizer | None,
    *,
    profile: str = "ort",
    compute: str = "f32",
    activations: str = "",
) -> int:
    """Bytes of the folder: the data file to the byte, about 25 KB of graph a layer, and the tokenizer."""
    kind: Profile = "portable" if profile == "portable" else "ort"
    words = len(str(tokenizer.json)) if tokenizer is not None else 0
    return layout(spec, planned, kind, compute, activations).nbytes + 25_000 * spec.depth + 10_000 + words
