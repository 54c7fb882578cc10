"""Writing a folder: every tensor's place is known before the first weight arrives."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import folder
from backends.base import Floats, Planned, QuantizedTensor, Tokenizer, Values
from backends.mlx import pack as packs
from backends.mlx.bundle import source
from backends.mlx.choose import choose
from backends.mlx.container import Output, sharded
from backends.mlx.layout import BUNDLED, Fit, Piece, Stored, arrange, quantization
from backends.mlx.levels import FLOATS, GRID, NATIVE, computes, recipe
from backends.tokens import misread
from spec.config import Spec
from spec.errors import UserError
from spec.levels import CODES

__all__ = ["MLXWriter", "pack", "recipe", "size", "stamp", "writer"]

log = logging.getLogger(__name__)

DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class MLXWriter:
    """A `backends.base.Writer`: rows of canonical tensors in any order, each once, to their final offsets."""

    def __init__(
        self,
        spec: Spec,
        fit: Fit,
        stored: Sequence[Stored],
        tokenizer: Tokenizer | None,
        out: Path,
        level: str,
        compute: str,
        options: Mapping[str, str],
    ) -> None:
        self.spec, self.fit, self.stored, self.tokenizer, self.path = spec, fit, stored, tokenizer, out
        self.level, self.compute, self.options = level, compute, options
        self._places: dict[str, list[tuple[Stored, Piece]]] = {}
        self._missing: dict[str, int] = {}
        for t in stored:
            for p in t.slot.pieces:
                self._places.setdefault(p.name, []).append((t, p))
                self._missing[p.name] = len(p.to)
        self._output: Output | None = None
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"{out}: {e.strerror}") from None
        try:
            self._output = Output(out, sharded([x for t in stored for x in t.tensors.values()]))
            for t in stored:
                self._fill(t)
        except BaseException:
            self.abort()
            raise

    def _fill(self, t: Stored) -> None:
        """What no canonical tensor provides: neutral biases and gains."""
        s = t.slot
        if s.neutral:
            assert not s.matrix, s.name
            self._put(t, "", 0, packs.to_floats(np.full(s.shape, s.fill, np.float32), t.dtype, s.name))

    def _put(self, t: Stored, part: str, row: int, data: NDArray[Any]) -> None:
        assert self._output is not None
        self._output.put(t.tensors[part].name, row, data)

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor."""
        count = values.shape[0]
        for t, p in self._places[name]:
            rows = p.to[start : start + count]
            for part, data in encoded(t, p, values, name).items():
                self._scatter(t, part, rows, data)
        self._missing[name] -= count

    def _scatter(self, t: Stored, part: str, to: NDArray[np.intp], data: NDArray[Any]) -> None:
        """Rows to rows `to` of the file, neighbours in one call."""
        order = np.argsort(to, kind="stable")
        to, data = to[order], data[order] if (np.diff(order) != 1).any() else data
        for run in np.split(np.arange(len(to)), np.flatnonzero(np.diff(to) != 1) + 1):
            self._put(t, part, int(to[run[0]]), data[run[0] : run[-1] + 1])

    def close(self, receipt: dict[str, Any]) -> None:
        """The other files, everything flushed to disk, and last the mark that says it is whole."""
        lost = {n: r for n, r in self._missing.items() if r}
        assert not lost, f"rows missing (or written twice): {lost}"
        assert self._output is not None
        try:
            self._output.close()
            if self.fit.carrier == BUNDLED:
                (self.path / BUNDLED).write_text(source(), encoding="utf-8")
            folder.write_json(self.path / "config.json", config(self.fit, self.stored, self.compute, self.tokenizer))
            folder.write_tokenizer(self.path, self.tokenizer, self.spec.context)
            folder.write_mark(self.path, "mlx", self.spec, self.level, self.options, receipt)
        except OSError as e:
            raise UserError(f"{e.filename or self.path}: {e.strerror}") from None

    def abort(self) -> None:
        """Close and delete."""
        if self._output is not None:
            self._output.abort()
        shutil.rmtree(self.path, ignore_errors=True)


def encoded(t: Stored, p: Piece, values: Values, name: str) -> dict[str, NDArray[Any]]:
    """Rows as the file holds them, by part. Raises `UserError` beyond the dtype's range."""
    if isinstance(values, QuantizedTensor):
        assert t.packing is not None
        return packs.from_grid(values, t.packing, t.dtype, name)
    if t.packing is not None:
        return packs.quantize(values, t.packing, t.dtype)
    x = (values.astype(np.float64) + p.add).astype(np.float32) if p.add else values
    return {"": packs.to_floats(x, t.dtype, name, packs.LEVEL if t.slot.matrix else packs.COMPUTE)}


def config(fit: Fit, stored: Sequence[Stored], compute: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json."""
    out = {**fit.config, "torch_dtype": DTYPE_NAMES[compute], **quantization(stored)}
    ends = folder.end_ids(tokenizer)
    if ends:
        out["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for role in ("bos", "pad"):
        found = None if tokenizer is None else folder.token_id(tokenizer, getattr(tokenizer, role))
        if found is not None:
            out[f"{role}_token_id"] = found
    return out


def writer(
    spec: Spec,
    planned: Sequence[Planned],
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    level: str,
    metadata: dict[str, Any],
    threads: int,
    compute: str = "",
) -> MLXWriter:
    """A `backends.base.Writer` for a folder. Packing is NumPy's, one block at a time."""
    chosen = compute or computes(level)[0]
    fit = choose(spec, level, chosen, misread(tokenizer))
    log.info("MLX: %s, computing in %s", fit.carrier, chosen)
    stored = arrange(fit.slots, planned, chosen)
    return MLXWriter(spec, fit, stored, tokenizer, out, level, chosen, {"compute": chosen})


def joined_matrices(spec: Spec, level: str, tokenizer: Tokenizer | None, *, compute: str = "") -> list[tuple[str, ...]]:
    """Canonical matrices that the folder stores as one, which has one packing."""
    fit = choose(spec, level, compute or computes(level)[0], misread(tokenizer))
    found = (tuple(dict.fromkeys(p.name for p in s.pieces)) for s in fit.slots if s.matrix)
    return [names for names in found if len(names) > 1]


def size(spec: Spec, planned: Sequence[Planned], tokenizer: Tokenizer | None, *, compute: str = "") -> int:
    """Bytes of the folder, near the truth."""
    level = _level(planned)
    chosen = compute or computes(level)[0]
    fit = choose(spec, level, chosen, misread(tokenizer))
    stored = arrange(fit.slots, planned, chosen)
    tensors = [x for t in stored for x in t.tensors.values()]
    text = len(json.dumps(config(fit, stored, chosen, tokenizer), indent=1))
    text += len(source()) if fit.carrier == BUNDLED else 0
    text += 0 if tokenizer is None else len(json.dumps(tokenizer.json, indent=1)) + len(tokenizer.sentencepiece or b"")
    receipt = 200 * len(planned) + 4096
    return sum(t.nbytes + len(t.name) + 80 for t in tensors) + text + receipt


def _level(planned: Sequence[Planned]) -> str:
    """The level that a plan was made for: its quantized one, that of 4 bits where it is mixed with q8."""
    found = {p.level for p in planned if len(p.shape) > 1}
    for level in (*sorted(GRID, key=CODES.__getitem__), *NATIVE):
        if level in found:
            return level
    return found.pop() if len(found) == 1 else "f16"


def stamp(path: Path, receipt: dict[str, Any]) -> None:
    """Replace the receipt of a finished folder."""
    folder.stamp(path, receipt)


def pack(block: Floats, level: str) -> bytes:
    """Rows in one of MLX's own types, as they are stored with 16-bit scales; matrices that stay f16 too."""
    if level in FLOATS:
        return packs.to_floats(block, FLOATS[level], "pack").tobytes()
    from backends.mlx.levels import packing

    p = packing(level, block.shape[-1])
    assert p is not None, f"{level} does not pack rows of {block.shape[-1]}"
    return b"".join(x.tobytes() for x in packs.quantize(block, p, "F16").values())
