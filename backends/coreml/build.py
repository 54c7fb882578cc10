"""Writing a Core ML package. The weights are held in memory, packed, until the program around them is serialised."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Floats, Planned, QuantizedTensor, Tokenizer, Values
from backends.coreml import package
from backends.coreml.emitter import Half, Tensor
from backends.coreml.names import experts_in, in_linear
from backends.coreml.palettes import BITS, Palette, group_rows, palettize
from backends.coreml.program import save
from backends.coreml.support import compute_dtype
from backends.folder import end_ids
from spec.config import Spec
from spec.errors import UserError
from spec.levels import CODES, GROUPS
from spec.load import dump
from spec.params import params
from spec.rope import rope_tables

__all__ = ["CoreMLWriter", "pack", "recipe", "size", "stamp", "writer"]

WHOLE = "package.mlpackage"
"""Where coremltools writes, inside the partial folder: it wants that suffix."""


class CoreMLWriter:
    """A `backends.base.Writer` that collects rows, and builds the package in `close`."""

    def __init__(
        self,
        spec: Spec,
        planned: Sequence[Planned],
        tokenizer: Tokenizer | None,
        out: Path,
        about: Mapping[str, str],
        options: Mapping[str, str],
        threads: int,
    ) -> None:
        self.spec, self.tokenizer, self.path, self.threads = spec, tokenizer, out, threads
        self._about, self._options = dict(about), dict(options)
        self._planned = {p.name: p for p in planned}
        self._missing = {p.name: p.shape[0] for p in planned}
        self._held: dict[str, Any] = {p.name: _room(p) for p in planned}
        try:
            out.mkdir(parents=True)
        except OSError as e:
            raise UserError(f"{out}: {e.strerror}") from None

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor."""
        assert name in self._missing, f"{name} is no tensor of this model"
        held, stop = self._held[name], start + values.shape[0]
        if isinstance(held, QuantizedTensor):
            assert isinstance(values, QuantizedTensor) and values.bits == held.bits, f"{name}: planned on the grid"
            assert np.isfinite(values.scales).all(), f"{name}: a scale is no number"
            held.codes[start:stop], held.scales[start:stop] = values.codes, values.scales
        else:
            assert not isinstance(values, QuantizedTensor), f"{name}: planned as floats"
            self._floats(name, held, start, values)
        self._missing[name] -= values.shape[0]

    def _floats(self, name: str, held: Any, start: int, values: Floats) -> None:
        rows = held[start : start + len(values)]
        with np.errstate(over="ignore"):
            rows[...] = values
        wrong = ~np.isfinite(rows)
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            value, where = float(values[at]), f"{name}: row {start + at[0]}: a weight of"
            if not np.isfinite(value):
                raise UserError(f"{where} {value}, which is no number to convert")
            raise UserError(f"{where} {value:.6g} is beyond float16 (at most 65504): use --quant f32")

    def close(self, receipt: dict[str, Any]) -> None:
        """Build, serialise and write everything."""
        lost = {n: r for n, r in self._missing.items() if r}
        assert not lost, f"rows missing (or written twice): {lost}"
        whole = self.path / WHOLE
        try:
            save(self.spec, self._tensors(), self._about["compute"], self._options["functions"], whole)
            self._held.clear()
            for item in whole.iterdir():
                item.rename(self.path / item.name)
            whole.rmdir()
            package.complete(self.path, self.tokenizer, self.spec)
            self._describe(receipt)
        except OSError as e:
            raise UserError(f"{e.filename or self.path}: {e.strerror or e}") from None
        except RuntimeError as e:  # what coremltools' writers of packages and weights raise
            raise UserError(f"{self.path}: coremltools cannot write it: {' '.join(str(e).split())}") from None

    def _tensors(self) -> dict[str, Tensor]:
        """What was collected in the form that the program stores; palettes are found here, since a table spans rows."""
        out: dict[str, Tensor] = {}
        for name, p in self._planned.items():
            held = self._held.pop(name)
            if p.level in BITS:
                group = group_rows(p.shape[0] // experts_in(self.spec, name))
                held = palettize(held, BITS[p.level], self.threads, group)
            out[name] = Half(held) if isinstance(held, np.ndarray) and held.dtype == np.float16 else held
        for param in params(self.spec) if self._about["compute"] == "f16" else ():
            bias = out[param.name]
            if in_linear(param) and isinstance(bias, np.ndarray) and np.abs(bias).max() >= 65520:
                top = float(np.abs(bias).max())
                raise UserError(f"{param.name}: a bias of {top:.6g} is beyond float16: use --compute f32")
        return out

    def _describe(self, receipt: dict[str, Any]) -> None:
        model, spec = package.read_model(self.path), self.spec
        held = model.description.metadata
        held.author = "Allotrope"
        held.shortDescription = (
            f"{spec.name}: a language model of {spec.depth} layers, width {spec.width}, {spec.vocab_size} tokens, "
            f"context {spec.context}; weights {self._about['level']}, activations {self._about['compute']}"
        )
        held.license = self._about.pop("license", "") or "that of the source model"
        values = {**self._about, "spec": dump(spec), "options": json.dumps(self._options, sort_keys=True)}
        values |= {"eos_token_ids": json.dumps(end_ids(self.tokenizer))}
        for name, value in values.items():
            held.userDefined[package.key(name)] = value
        held.userDefined[package.key("receipt")] = json.dumps(receipt, sort_keys=True)
        package.write_model(self.path, model)

    def abort(self) -> None:
        """Let go of everything and delete what was written."""
        self._held.clear()
        shutil.rmtree(self.path, ignore_errors=True)


def _room(p: Planned) -> Any:
    """Where a tensor's rows are collected: codes and scales, or floats of the stored width."""
    if p.level in GROUPS:
        (rows, cols), group = p.shape, GROUPS[p.level]
        scales = np.empty((rows, cols // group), np.float32)
        return QuantizedTensor(np.empty(p.shape, np.int8), scales, CODES[p.level], group)
    return np.empty(p.shape, np.float32 if p.level == "f32" else np.float16)


def writer(
    spec: Spec,
    planned: Sequence[Planned],
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    level: str = "",
    metadata: dict[str, Any],
    threads: int,
    compute: str = "",
    functions: str = "one",
) -> CoreMLWriter:
    """A writer for `out`. It holds all weights until `close`: a byte for each quantized one or index, two or four for
    each float. metadata: further keys. Raises `UserError` where the disk lacks room for coremltools' temporary copy."""
    need = size(spec, planned, tokenizer, compute, functions)
    temporary = Path(tempfile.gettempdir())
    free = shutil.disk_usage(temporary).free
    if need > free:
        raise UserError(f"{temporary}: coremltools needs {need / 1e6:,.1f} MB there (or where TMPDIR says), and "
                        f"{free / 1e6:,.1f} MB are free")  # fmt: skip
    about = {**{k: str(v) for k, v in metadata.items()}, "level": level, "compute": compute_dtype(compute, planned)}
    options = {"compute": compute, "functions": functions}
    return CoreMLWriter(spec, planned, tokenizer, out, about, options, threads)


def size(
    spec: Spec, planned: Sequence[Planned], tokenizer: Tokenizer | None, compute: str = "", functions: str = "one"
) -> int:
    """Bytes of the package, within a few percent for small models."""
    dtype = compute_dtype(compute, planned)
    weights = sum(_stored(p, 2 if dtype == "f16" else 4, experts_in(spec, p.name)) for p in planned)
    tables = sum(4 * spec.context * t.dim for t in rope_tables(spec, spec.context))
    program = (12_000 + 25_000 * spec.depth) * (2 if functions == "two" else 1)
    text = 0 if tokenizer is None else len(json.dumps(tokenizer.json, indent=1)) + 4096
    return weights + tables + program + text + len(dump(spec)) + 130 * len(planned)


def _stored(p: Planned, scale: int, experts: int) -> int:
    """Bytes of a tensor with its header; `scale` is the bytes of a scale, which has the compute dtype."""
    count = prod(p.shape)
    if p.level in BITS:
        groups = p.shape[0] // group_rows(p.shape[0] // experts)
        return count * BITS[p.level] // 8 + groups * scale * (1 << BITS[p.level]) + 256
    if p.level in GROUPS:
        return count * CODES[p.level] // 8 + count // GROUPS[p.level] * scale + 256
    return count * (4 if p.level == "f32" else 2) + 128


def stamp(path: Path, receipt: dict[str, Any]) -> None:
    """Replace the receipt in a finished package's metadata; weights and program stay as they are."""
    model = package.read_model(path)
    model.description.metadata.userDefined[package.key("receipt")] = json.dumps(receipt, sort_keys=True)
    package.write_model(path, model)


def recipe(spec: Spec, level: str) -> dict[str, str]:
    """Canonical tensor name to level, for a palette: matrices have it, positions stay f16, vectors f32."""
    assert level in BITS, level
    kinds: dict[bool, Callable[[str], str]] = {
        True: lambda name: "f16" if name == "positions.weight" else level, False: lambda _: "f32",
    }  # fmt: skip
    return {p.name: kinds[p.matrix](p.name) for p in params(spec)}


def pack(block: Floats, level: str) -> Palette:
    """Rows at a palette level: whole groups, each with its table."""
    return palettize(block, BITS[level])
