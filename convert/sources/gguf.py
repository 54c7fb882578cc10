"""A GGUF file as a source: its spec from the metadata, its weights dequantized row by row, its tokenizer.

A file of this program is opened by the spec that it carries, with folds undone; any other one by the row of its
architecture in llama.cpp (`backends.gguf.foreign`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import PORTABLE, Floats, QuantizedTensor, Values
from backends.gguf.container import Header
from backends.gguf.pack import dense
from backends.gguf.read import Artifact, open_any
from backends.gguf.vocabulary import read_vocabulary
from convert import templates
from convert.levels import CODES, GROUPS, takes
from convert.recipe import Held
from convert.sources.base import Source, collapse, several
from convert.sources.store import Entry
from spec.errors import UserError
from spec.layout import Layout, Rule
from spec.params import params

ON_GRID = {"q4_0": "q4", "q8_0": "q8"}
"""Types that are codes times a scale for 32 weights, as the portable levels are."""


def open_gguf(path: Path) -> Source:
    """Open a GGUF file, or one of the files of a split one. Raises `UserError`, `SpecError`."""
    artifact, spare, notes = open_any(path)
    header = artifact.header
    _check(path, header, artifact, spare)
    tokenizer = read_vocabulary(header.keys, artifact.source.vocab_size, str(path))
    if tokenizer is not None:
        main = {} if tokenizer.chat_template is None else {templates.DEFAULT: tokenizer.chat_template}
        templates.accepted(main | tokenizer.templates, str(path))
    rules = [Rule(p.name, p.name) for p in params(artifact.source)]
    return Source(path, artifact.source, Layout(rules, artifact.source), GGUFStore(artifact), tokenizer, notes=notes)


def _check(path: Path, header: Header, artifact: Artifact, spare: frozenset[str]) -> None:
    """Every tensor belongs to the model, and the model lacks none. Raises `UserError` with all that is wrong."""
    have, want = header.tensors, artifact.slots
    problems = []
    missing = [n for n in want if n not in have]
    if missing:
        problems.append(f"{several(len(missing), 'tensor is', 'tensors are')} missing: {collapse(missing)}")
    extra = [n for n in have if n not in want and n not in spare]
    if extra:
        problems.append(f"{several(len(extra), 'tensor belongs', 'tensors belong')} to nothing in the model: "
                        f"{collapse(extra)}")  # fmt: skip
    for name, t in want.items():
        if name in have and have[name].shape != t.slot.shape:
            problems.append(f"{name}: shape {list(have[name].shape)}, the model needs {list(t.slot.shape)}")
    if not problems:
        wrong = [n for n, t in want.items() if not artifact.constants_hold(t)]
        if wrong:
            problems.append(f"{collapse(wrong)}: other constants than the model has there")
    if problems:
        raise UserError("\n".join(f"{path}: {p}" for p in problems))


class GGUFStore:
    """A file's tensors by their canonical names (a `convert.sources.store.Store`), rows in canonical order."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._entries = {
            n: Entry(artifact.type(n).upper(), shape) for n, shape in artifact.shapes.items() if artifact.places(n)
        }
        levels = {
            n: ON_GRID[t] for n, shape in artifact.shapes.items() if len(shape) == 2 and artifact.places(n)
            for t in [artifact.type(n)] if t in ON_GRID and _whole(artifact, n)
        }  # fmt: skip
        self.held = Held(_grouped(artifact.receipt, levels), wide=artifact.receipt.get("level") not in PORTABLE)

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    @property
    def nbytes(self) -> int:
        return sum(t.rows * t.row_bytes for t in self._artifact.header.tensors.values())

    def values(self, name: str, start: int, stop: int) -> Values:
        """Rows as the file holds them. Raises `UserError` where several places hold them and differ."""
        first, *others = self._artifact.copies(name, start, stop)
        for other in others:
            if not np.array_equal(dense(first), dense(other)):
                outside = " and ".join(dict.fromkeys(t.slot.name for t, _ in self._artifact.places(name)))
                what = "a gain for each head, and they differ" if "norm" in outside else "differ"
                raise UserError(f"{self._artifact.path}: {outside}: {what}; a spec has one {name} for all")
        return first

    def fetch(self, name: str, start: int, stop: int) -> Floats:
        """Rows as float32, dequantized."""
        return np.ascontiguousarray(dense(self.values(name, start, stop)), np.float32)

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self.fetch(name, start, stop)

    def coded(self, name: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of one of `held`."""
        found = self.values(name, start, stop)
        assert isinstance(found, QuantizedTensor), f"{name} is no codes"
        return found.grouped(GROUPS[self.held.levels[name]])

    def close(self) -> None:
        """Nothing stays open between reads."""


def _grouped(receipt: Mapping[str, Any], levels: Mapping[str, str]) -> dict[str, str]:
    """Levels of what is stored as codes: that of the receipt where it has the same codes in larger groups, whose scales
    the file repeats."""
    said = receipt.get("tensors")
    out = dict(levels)
    for name, stored in levels.items():
        match said.get(name) if isinstance(said, dict) else None:
            case [str(level), *_] if CODES.get(level) == CODES[stored] and takes(stored, CODES[level], GROUPS[level]):
                out[name] = level
    return out


def _whole(artifact: Artifact, name: str) -> bool:
    return artifact.reached(name) == (0, artifact.shapes[name][0])
