"""The first pass: the model as it is, layer by layer. What enters each product is measured, and the residual stream
between layers is kept as far as later passes want it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convert.calibrate.boundary import Boundary
from convert.calibrate.runner import Runner, embedding_rows, groups, observing
from convert.calibrate.statistics import Squares
from convert.calibrate.store import Store, read_tensors, write_tensors

HEAD = "head"


class Measured:
    """The pass, and what it left in a store's work folder."""

    def __init__(self, store: Store, runner: Runner, ids: NDArray[np.int64], kept: int) -> None:
        """kept: windows whose boundaries stay on disk."""
        self.store, self.runner, self.ids, self.kept = store, runner, ids, kept

    def boundary(self, i: int) -> Boundary:
        """The input of layer i (of all windows until layer i was measured, then of the kept); after the last layer,
        the stream before the final norm, of all windows."""
        return Boundary(self.store.work / f"plain.{i}.f32", (*self.ids.shape, self.runner.spec.width))

    def step(self, i: int) -> None:
        """Measure layer i, whose input is on disk; after the last layer, the head. Nothing where that is done."""
        if self._file(i).is_file():
            return
        if i == 0 and not self.boundary(0).whole:
            self._begin()
        squares = self._head(i) if i == self.runner.spec.depth else self._layer(i)
        write_tensors(self._file(i), squares)
        if i < self.runner.spec.depth:
            self.boundary(i).keep(self.kept)

    def importance(self) -> dict[str, NDArray[Any]]:
        """Mean squares and counts of every product, as `Rounding` stores them."""
        out: dict[str, NDArray[Any]] = {}
        for i in range(self.runner.spec.depth + 1):
            out |= read_tensors(self._file(i))
        return out

    def _file(self, i: int) -> Path:
        return self.store.work / f"measured.{i}.safetensors"

    def _begin(self) -> None:
        begin = self.runner.begin(self.ids, embedding_rows(self.runner.source))
        with self.boundary(0).writing() as sink:
            for a, z in self.runner.chunks(len(self.ids)):
                sink(a, begin(a, z).cpu().numpy())

    def _layer(self, i: int) -> dict[str, NDArray[Any]]:
        block, before = self.runner.block(i), self.boundary(i)
        squares = {group: Squares() for group in groups(block)}
        with self.boundary(i + 1).writing() as sink, observing(block, {g[0]: s for g, s in squares.items()}):
            for a, z in self.runner.chunks(len(self.ids)):
                x = torch.from_numpy(before.read(a, z)).to(self.runner.device)
                sink(a, self.runner.run(i, block, x).cpu().numpy())
        return _named({f"layers.{i}.{name}.weight": s for group, s in squares.items() for name in group})

    def _head(self, i: int) -> dict[str, NDArray[Any]]:
        norm, squares = self.runner.final_norm(), Squares()
        for a, z in self.runner.chunks(len(self.ids)):
            x = torch.from_numpy(self.boundary(i).read(a, z)).to(self.runner.device)
            squares(self.runner.end(norm, x).flatten(0, -2), None)
        return _named({head_weight(self.runner): squares})


def head_weight(runner: Runner) -> str:
    """The matrix that logits come from."""
    return "embed.weight" if runner.spec.head.tied else "head.weight"


def _named(squares: dict[str, Squares]) -> dict[str, NDArray[Any]]:
    out: dict[str, NDArray[Any]] = {}
    for name, s in squares.items():
        out[name], out[f"{name}.count"] = s.means(), np.asarray(s.counts, np.int64)
    return out
