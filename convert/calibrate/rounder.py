"""The last pass: every matrix on its grid, layer by layer, each product for the inputs that the rounded ones before it
make.

Inside a layer products are rounded in the order in which they run, and what enters the next one is measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.base import Floats, Planned, QuantizedTensor
from backends.torch.modules import Block
from convert.calibrate.boundary import Boundary
from convert.calibrate.measure import Measured, head_weight
from convert.calibrate.runner import Enough, Runner, embedding_rows, groups, observing
from convert.calibrate.statistics import Hessians, spans
from convert.calibrate.store import Store
from convert.levels import GROUPS, LEVELS
from convert.quantize import TooLarge
from convert.recipe import Held, kept
from convert.stream import rounded
from spec.errors import UserError

ROWS = 8192
"""Rows of an embedding or head that are rounded together."""

Compensate = Callable[[Tensor, Tensor | None, str], QuantizedTensor]
"""(weight [out, in], Hessian [in, in] or none where nothing was seen, level) -> codes and scales."""


def to_round(planned: Sequence[Planned], held: Held) -> dict[str, str]:
    """The matrices that get new codes, with their levels."""
    return {p.name: p.level for p in planned if p.level in GROUPS and not kept(held.levels.get(p.name), p.level)}


@dataclass
class Rounder:
    """The pass over one store."""

    store: Store
    runner: Runner
    measured: Measured
    planned: Sequence[Planned]
    compensate: Compensate

    def __post_init__(self) -> None:
        self.ids: NDArray[np.int64] = self.measured.ids
        self.levels = {p.name: p.level for p in self.planned}
        self.wanted = to_round(self.planned, self.runner.source.held)

    def units(self) -> list[str]:
        """What is rounded one after another."""
        return ["embed", *(f"layers.{i}" for i in range(self.runner.spec.depth)), "head"]

    def step(self, unit: str) -> None:
        """Round a unit, the ones before it being whole. Nothing where that is done."""
        if self.store.has(unit):
            return
        if unit == "embed":
            self._embed()
        elif unit == "head":
            self._head()
        else:
            self._layer(int(unit.split(".")[1]))

    def boundary(self, i: int) -> Boundary:
        """The input of layer i in the rounded model."""
        return Boundary(self.store.work / f"rounded.{i}.f32", (*self.ids.shape, self.runner.spec.width))

    def _embed(self) -> None:
        codes, tokens = {}, {}
        name = "embed.weight"
        if name in self.wanted:
            hessian = None
            if (
                head_weight(self.runner) == name
            ):  # a tied one is the head too, and so far only the plain stream is known
                hessian, tokens[name] = self._head_hessian(self.measured.boundary(self.runner.spec.depth))
            codes[name] = self._by_rows(name, hessian)
        begin = self.runner.begin(self.ids, self._embedding_rows(codes.get(name)))
        with self.boundary(0).writing() as sink:
            for a, z in self.runner.chunks(len(self.ids)):
                sink(a, begin(a, z).cpu().numpy())
        self.store.add("embed", codes, tokens)

    def _layer(self, i: int) -> None:
        block, before, prefix = self.runner.block(i), self.boundary(i), f"layers.{i}."
        self._round_floats(block, prefix)
        codes: dict[str, QuantizedTensor] = {}
        tokens: dict[str, Sequence[int]] = {}
        for group in groups(block):
            names = [n for n in group if f"{prefix}{n}.weight" in self.wanted]
            if names:
                found, counts = self._group(i, block, names)
                codes |= {f"{prefix}{n}.weight": q for n, q in found.items()}
                tokens |= {f"{prefix}{n}.weight": counts for n in names}
        with self.boundary(i + 1).writing() as sink:
            for a, z in self.runner.chunks(len(self.ids)):
                sink(a, self.runner.run(i, block, self._on_device(before, a, z)).cpu().numpy())
        self.store.add(f"layers.{i}", codes, tokens)
        before.keep(0)

    def _head(self) -> None:
        codes, tokens = {}, {}
        name = head_weight(self.runner)
        if name == "head.weight" and name in self.wanted:
            hessian, tokens[name] = self._head_hessian(self.boundary(self.runner.spec.depth))
            codes[name] = self._by_rows(name, hessian)
        self.store.add("head", codes, tokens)

    def _group(self, i: int, block: Block, names: Sequence[str]) -> tuple[dict[str, QuantizedTensor], list[int]]:
        """Round products of one input, in the block too; and the tokens that each expert saw."""
        own = {n: block.get_submodule(n) for n in names}
        experts = getattr(own[names[0]], "experts", None)
        width = self._weight(own[names[0]]).shape[1]
        parts: dict[str, list[QuantizedTensor]] = {n: [] for n in names}
        counts: list[int] = []
        for span in [None] if experts is None else spans(experts, width):
            hessians = self._collect(i, block, names[0], Hessians(width, span, self.runner.device))
            counts += hessians.counts
            for n, e in enumerate(span or range(1)):
                hessian = hessians.mean(n)
                for name, module in own.items():
                    weight = self._weight(module)
                    rows = len(weight) // (experts or 1)
                    part = weight[e * rows : (e + 1) * rows]
                    full = f"layers.{i}.{name}.weight"
                    q = self._round(full, e * rows, part, hessian)
                    part.copy_(torch.from_numpy(q.dequantize()))
                    parts[name].append(q)
        return {name: joined(found) for name, found in parts.items()}, counts

    def _collect(self, i: int, block: Block, name: str, hessians: Hessians) -> Hessians:
        def observe(x: Tensor, counts: Tensor | None) -> None:
            hessians(x, counts)
            raise Enough

        with observing(block, {name: observe}):
            for a, z in self.runner.chunks(len(self.ids)):
                try:
                    self.runner.run(i, block, self._on_device(self.boundary(i), a, z))
                except Enough:
                    continue
        return hessians

    def _head_hessian(self, boundary: Boundary) -> tuple[Tensor | None, list[int]]:
        norm = self.runner.final_norm()
        hessians = Hessians(self.runner.spec.width, None, self.runner.device)
        for a, z in self.runner.chunks(len(self.ids)):
            hessians(self.runner.end(norm, self._on_device(boundary, a, z)).flatten(0, -2), None)
        return hessians.mean(0), hessians.counts

    def _by_rows(self, name: str, hessian: Tensor | None) -> QuantizedTensor:
        """A matrix that is never whole in memory: rows are rounded one like the other."""
        found = [
            self._round(name, start, torch.from_numpy(rows).to(self.runner.device), hessian)
            for start, rows in self.runner.source.blocks(name, ROWS)
        ]
        return joined(found)

    def _round(self, name: str, start: int, weight: Tensor, hessian: Tensor | None) -> QuantizedTensor:
        try:
            return self.compensate(weight, hessian, self.wanted[name])
        except TooLarge as e:
            raise UserError(e.at(name, start)) from None

    def _round_floats(self, block: Block, prefix: str) -> None:
        """What is stored as 16-bit floats, so that what comes after it sees that."""
        for name, parameter in block.named_parameters():
            level = self.levels[prefix + name]
            if level in ("f16", "bf16"):
                values = rounded(prefix + name, level, 0, parameter.cpu().numpy())
                assert not isinstance(values, QuantizedTensor), "floats"
                parameter.copy_(torch.from_numpy(values))

    def _embedding_rows(self, codes: QuantizedTensor | None) -> Callable[[NDArray[np.int64]], Floats]:
        if codes is not None:
            return lambda index: codes[index].dequantize()
        plain, level = embedding_rows(self.runner.source), self.levels["embed.weight"]
        floats = level in LEVELS and level not in GROUPS
        return lambda index: _floats(rounded("embed.weight", level, 0, plain(index)) if floats else plain(index))

    def _on_device(self, boundary: Boundary, start: int, stop: int) -> Tensor:
        return torch.from_numpy(boundary.read(start, stop)).to(self.runner.device)

    @staticmethod
    def _weight(module: torch.nn.Module) -> Tensor:
        weight = module.weight
        assert isinstance(weight, Tensor), "a product"
        return weight


def _floats(values: Floats | QuantizedTensor) -> Floats:
    assert not isinstance(values, QuantizedTensor), "floats"
    return values


def joined(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Rows one below the other."""
    if len(parts) == 1:
        return parts[0]
    codes, scales = (np.concatenate([getattr(q, what) for q in parts]) for what in ("codes", "scales"))
    return QuantizedTensor(codes, scales, parts[0].bits, parts[0].group)


def untouched(tokens: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Matrices that no token came to: `layers.3.mlp.experts.7.up.weight`, numbered where only some experts have none."""
    for name, counts in tokens.items():
        for e, n in enumerate(counts):
            if not n:
                yield name.replace(".experts.", f".experts.{e}.") if ".mlp.experts." in name else name
