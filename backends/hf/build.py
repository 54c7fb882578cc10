"""Writing a folder: its files are laid out before the first weight arrives, so rows go to their final place.

Memory is the block at hand and its packed form. A transposed product (GPT-2's) takes one short write for each of its
input channels and block, since its rows are columns of the file.
"""

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
from backends.base import Planned, QuantizedTensor, Tokenizer, Values
from backends.hf.config import config
from backends.hf.fit import Fit, choose
from backends.hf.names import FUSED_BY_SERVERS
from backends.hf.store import TORCH, Slot, Store, describe, pack
from backends.safetensors import INDEX, FileWriter, Tensor, header, index_table, narrow
from backends.tokens import misread
from spec.config import Spec
from spec.errors import UserError
from spec.layout import Layout
from spec.levels import CODES, GROUPS
from spec.params import params

__all__ = ["FolderWriter", "settled", "size", "stamp", "writer"]

log = logging.getLogger(__name__)

stamp = folder.stamp
SCALES = "allotrope.scales"
"""Scales of quantized tensors that are stored as floats (a safetensors file under a name that no client looks for)."""
LEVELS_KEY = "allotrope.levels"


def carried(spec: Spec, architecture: str, tokenizer: Tokenizer | None) -> Fit:
    """The carrier, one whose tokenizer transformers reads as it is. Raises `UserError` with everything that stands in
    the way."""
    fit = choose(spec, architecture, misread(tokenizer))
    if fit.refusals:
        from backends.hf.support import support

        raise UserError("\n".join(support(spec, "f32", architecture).refusals))
    return fit


def settled(spec: Spec, tokenizer: Tokenizer | None, architecture: str = "") -> tuple[dict[str, str], list[str]]:
    """Options with the architecture named where the tokenizer decides it, and a note that says so.

    Raises `UserError` where transformers would read the tokenizer otherwise than it is and nothing else carries both.
    """
    wrong = misread(tokenizer)
    plain, fit = choose(spec, architecture), choose(spec, architecture, wrong)
    asked = {"architecture": architecture} if architecture else {}
    if plain.refusals or plain.carrier.arch not in wrong:
        return asked, []
    reason = f"in a folder of {plain.carrier.arch}, transformers splits and normalizes text as Qwen2Tokenizer does"
    if fit.carrier.arch not in wrong:
        note = f"written as {fit.carrier.arch}: {reason}, and this tokenizer does otherwise"
        return {"architecture": fit.carrier.arch}, [note]
    other = choose(spec, "", wrong).carrier.arch
    hint = f"leave --architecture out, and it is written as {other}" if other not in wrong else "no other computes this"
    raise UserError(f"tokenizer: {reason}, and this one does otherwise ({hint})")


def configuration(store: Store, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json."""
    return config(store.fit.source, store.fit.carrier, TORCH[store.dtype], tokenizer) | store.quantization()


class FolderWriter:
    """A `backends.base.Writer`: rows of canonical tensors in any order, each once."""

    def __init__(self, spec: Spec, store: Store, tokenizer: Tokenizer | None, out: Path, level: str) -> None:
        self.path, self._spec, self._store, self._level = out, spec, store, level
        self._missing = {p.name: p.shape[0] for p in params(spec)}
        self._fed: dict[str, list[str]] = {}
        for name, origin in store.fit.origins.items():
            if origin.name is not None:
                self._fed.setdefault(origin.name, []).append(name)
        self._files: list[FileWriter] = []
        self._of: dict[str, FileWriter] = {}
        self._scales: FileWriter | None = None
        try:
            out.mkdir()
        except OSError as e:
            raise UserError(f"{out}: {e.strerror}") from None
        try:
            metadata = {"format": "pt", LEVELS_KEY: describe(store.levels)}
            shards = store.shards()
            for name, tensors in shards.items():
                self._open(FileWriter(out / name, tensors, metadata))
            if store.dense:
                self._scales = FileWriter(out / SCALES, store.scales(), {"format": "pt"})
                self._files.append(self._scales)
            self._describe(tokenizer, shards)
            self._fill()
        except BaseException as e:
            self.abort()
            if isinstance(e, OSError):
                raise UserError(f"{e.filename or out}: {e.strerror}") from None
            raise

    def _open(self, file: FileWriter) -> None:
        self._files.append(file)
        self._of |= dict.fromkeys(file.tensors, file)

    def _describe(self, tokenizer: Tokenizer | None, shards: Mapping[str, Sequence[Tensor]]) -> None:
        """Every file that is no weights."""
        folder.write_json(self.path / "config.json", configuration(self._store, tokenizer))
        folder.write_tokenizer(self.path, tokenizer, self._spec.context)
        if len(shards) > 1:
            folder.write_json(self.path / INDEX, index_table(shards))

    def _fill(self) -> None:
        """What no tensor of the source provides: constants, and the shapes of packed tensors."""
        for s in self._store.slots.values():
            if s.packed is not None:
                self._of[f"{s.name}_shape"].rows(f"{s.name}_shape", 0, np.array(s.shape, "<i8"))
        for name, origin in self._store.fit.origins.items():
            if origin.name is None:
                bound = self._store.layout.of[name]
                rows = next(p.shape[0] for p in bound.canonical if p.name == name)
                assert all(len(p.shape) == 1 for p in bound.canonical), f"{name}: only vectors are filled in"
                self._floats(name, 0, np.full(rows, origin.fill, np.float32), 0.0)

    def write(self, name: str, start: int, values: Values) -> None:
        """Rows `start...` of a canonical tensor."""
        assert name in self._missing, f"{name} is no tensor of this model"
        for shipped in self._fed.get(name, ()):
            if isinstance(values, QuantizedTensor):
                self._codes(shipped, start, values)
                continue
            try:
                self._floats(shipped, start, values, self._store.fit.origins[shipped].add)
            except UserError as e:
                raise UserError(f"{name}: {e}") from None
        if name in self._store.dense:
            assert isinstance(values, QuantizedTensor) and self._scales is not None
            self._scales.rows(name, start, values.scales.astype("<f2"))
        self._missing[name] -= values.shape[0]

    def _floats(self, shipped: str, start: int, values: NDArray[np.float32], add: float) -> None:
        x = values.astype(np.float64) + add if add else values
        for run in self._store.layout.runs(shipped, start, start + len(values)):
            slot = self._store.slots[run.tensor]
            self._put(slot, run.start, narrow(x[run.take], slot.dtype))

    def _put(self, slot: Slot, start: int, data: NDArray[Any]) -> None:
        file = self._of[slot.name]
        (file.columns if slot.bound.transposed else file.rows)(slot.name, start, data)

    def _codes(self, shipped: str, start: int, values: QuantizedTensor) -> None:
        for run in self._store.layout.runs(shipped, start, start + len(values.codes)):
            slot, mine = self._store.slots[run.tensor], values[run.take]
            if slot.packed is None:
                self._put(slot, run.start, narrow(mine.dequantize(), slot.dtype))
                continue
            mine = mine.grouped(GROUPS[slot.packed])
            file = self._of[f"{slot.name}_packed"]
            file.rows(f"{slot.name}_packed", run.start, pack(mine.codes, CODES[slot.packed]))
            file.rows(f"{slot.name}_scale", run.start, narrow(mine.scales, slot.dtype))

    def close(self, receipt: dict[str, Any]) -> None:
        """Flush everything, and last of all say what the folder is."""
        lost = {n: r for n, r in self._missing.items() if r}
        assert not lost, f"rows missing (or written twice): {lost}"
        for f in self._files:
            f.close()
        folder.write_mark(self.path, "hf", self._spec, self._level, {}, receipt)

    def abort(self) -> None:
        """Close and delete."""
        for f in self._files:
            f.abort()
        shutil.rmtree(self.path, ignore_errors=True)


def writer(
    spec: Spec,
    planned: Sequence[Planned],
    tokenizer: Tokenizer | None,
    out: Path,
    *,
    level: str,
    metadata: Mapping[str, Any],
    threads: int,
    architecture: str = "",
) -> FolderWriter:
    """A writer for the folder `out`, with every file laid out and every constant in place.

    metadata: not written, as config.json has no place for it; the receipt says the same. Raises `UserError` where no
    architecture carries the spec or the disk is full.
    """
    fit = carried(spec, architecture, tokenizer)
    return writer_for(fit, spec, planned, tokenizer, out, level=level)


def writer_for(
    fit: Fit, spec: Spec, planned: Sequence[Planned], tokenizer: Tokenizer | None, out: Path, *, level: str
) -> FolderWriter:
    """`writer` with a carrier of one's own choice."""
    assert not fit.refusals, fit.refusals
    store = Store(fit, planned)
    log.info("Hugging Face: %s, %d tensors", fit.carrier.arch, len(store.slots))
    return FolderWriter(spec, store, tokenizer, out, level)


def joined_matrices(
    spec: Spec, level: str, tokenizer: Tokenizer | None, architecture: str = ""
) -> list[tuple[str, ...]]:
    """Canonical matrices that the folder stores as one, or that servers compute as one: they have one precision."""
    fit = carried(spec, architecture, tokenizer)
    stored = [[p.name for p in b.canonical if p.matrix] for b in Layout(fit.carrier.rules, fit.spec).rules]
    served = [[f"layers.{i}.{stem}.weight" for stem in group] for i in range(spec.depth) for group in FUSED_BY_SERVERS]
    mine = ([fit.origins[n].name for n in names if n in fit.origins] for names in (*stored, *served))
    found = {tuple(dict.fromkeys(n for n in names if n is not None)): None for names in mine}
    return [names for names in found if len(names) > 1]


def size(spec: Spec, planned: Sequence[Planned], tokenizer: Tokenizer | None, architecture: str = "") -> int:
    """Bytes of the folder, without the model card."""
    store = Store(carried(spec, architecture, tokenizer), planned)
    files = [(t, {LEVELS_KEY: describe(store.levels)}) for t in store.shards().values()]
    files += [(store.scales(), {})] if store.dense else []
    weights = sum(len(header(tensors, meta)[0]) + sum(t.nbytes for t in tensors) for tensors, meta in files)
    texts = [json.dumps(configuration(store, tokenizer), indent=1)]
    if tokenizer is not None:
        texts += [json.dumps(tokenizer.json, indent=1), tokenizer.chat_template or ""]
    receipt = 3000 + 120 * len(store.levels)
    return (
        weights
        + sum(len(t.encode()) for t in texts)
        + len(tokenizer.sentencepiece or b"" if tokenizer else b"")
        + receipt
    )
