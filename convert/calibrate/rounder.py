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
from convert.calibrate import sizes
from convert.calibrate.boundary import Boundary
from convert.calibrate.fisher import EXPERTS, Fisher
from convert.calibrate.measure import Measured, head_weight
from convert.calibrate.runner import Runner, embedding_rows, groups
from convert.calibrate.statistics import Moments, spans
from convert.calibrate.store import Store
from convert.levels import GROUPS, LEVELS
from convert.quantize import TooLarge
from convert.recipe import Held, kept
from convert.stream import rounded
from spec.errors import UserError

Compensate = Callable[[Tensor, Tensor | None, str, Tensor | None], QuantizedTensor]
"""(weight [out, in], Hessian [in, in] or none where nothing was seen, level, cross moment [in, in] where there is one)
-> codes and scales."""


def to_round(planned: Sequence[Planned], held: Held) -> dict[str, str]:
    """The matrices that get new codes, with their levels."""
    return {p.name: p.level for p in planned if p.level in GROUPS and not kept(held.levels.get(p.name), p.level)}


@dataclass
class Rounder:
    """The pass over one store."""

    store: Store
    runner: Runner
    measured: Measured
    fisher: Fisher
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
        block, plain = self.runner.block(i), self.runner.block(i)
        before, prefix = self.boundary(i), f"layers.{i}."
        self._round_floats(block, prefix)
        codes: dict[str, QuantizedTensor] = {}
        tokens: dict[str, Sequence[int]] = {}
        for group in groups(block):
            names = [n for n in group if f"{prefix}{n}.weight" in self.wanted]
            if names:
                found, counts = self._group(i, block, plain, names)
                codes |= {f"{prefix}{n}.weight": q for n, q in found.items()}
                tokens |= {f"{prefix}{n}.weight": counts for n in names}
        with self.boundary(i + 1).writing() as sink:
            for a, z in self.runner.chunks(len(self.ids)):
                sink(a, self.runner.run(i, block, self._on_device(before, a, z)).cpu().numpy())
        self.store.add(f"layers.{i}", codes, tokens)
        before.keep(0)
        self.measured.boundary(i).keep(0)

    def _head(self) -> None:
        codes, tokens = {}, {}
        name = head_weight(self.runner)
        if name == "head.weight" and name in self.wanted:
            hessian, tokens[name] = self._head_hessian(self.boundary(self.runner.spec.depth))
            codes[name] = self._by_rows(name, hessian)
        self.store.add("head", codes, tokens)

    def _group(
        self, i: int, block: Block, plain: Block, names: Sequence[str]
    ) -> tuple[dict[str, QuantizedTensor], list[int]]:
        """Round products of one input, in the block too; and the tokens that each expert saw."""
        own = {n: block.get_submodule(n) for n in names}
        experts = getattr(own[names[0]], "experts", None)
        width = _weight(own[names[0]]).shape[1]
        found: dict[str, list[QuantizedTensor]] = {n: [] for n in names}
        counts: list[int] = []
        for span in [None] if experts is None else spans(experts, width):
            moments = self._collect(i, block, None if experts else plain, names, width, span)
            counts += moments[names[0]].counts
            for name, module in own.items():
                weight = _weight(module)
                rows = len(weight) // (experts or 1)
                for n, e in enumerate(span or range(1)):
                    part = weight[e * rows : (e + 1) * rows]
                    hessian, cross = moments[name].hessian(n), moments[name].cross(n)
                    q = self._round(f"layers.{i}.{name}.weight", e * rows, part, hessian, cross)
                    part.copy_(torch.from_numpy(q.dequantize()))
                    found[name].append(q)
                del moments[name]
        return {name: joined(parts) for name, parts in found.items()}, counts

    def _collect(
        self, i: int, block: Block, plain: Block | None, names: Sequence[str], width: int, span: range | None
    ) -> dict[str, Moments]:
        """Moments of each product's input, rows weighted by the energy of the gradient at its output."""
        device = self.runner.device
        moments = {n: Moments(width, span, plain is not None, device) for n in names}
        energies = {n: self._energy(i, n) for n in names}
        for a, z in self.runner.chunks(len(self.ids)):
            entered = self.runner.enter(i, block, names[0], self._on_device(self.boundary(i), a, z))
            before = None
            if plain is not None:
                before = self.runner.enter(i, plain, names[0], self._on_device(self.measured.boundary(i), a, z)).x
            for n, m in moments.items():
                energy = energies[n][a * self.runner.length : z * self.runner.length].to(device)
                m.add(entered.x, entered.counts, entered.weights(energy), before)
        return moments

    def _energy(self, i: int, name: str) -> Tensor:
        """[tokens] of mean 1."""
        tail = EXPERTS if name.startswith(f"{EXPERTS}.") else f"{name}.weight"
        energy = torch.from_numpy(self.fisher.layer(i)[f"layers.{i}.{tail}.energy"])
        mean = energy.mean(dtype=torch.float64)
        return (energy.double() / mean).float() if mean > 0 else torch.ones_like(energy)

    def _head_hessian(self, boundary: Boundary) -> tuple[Tensor | None, list[int]]:
        norm, device = self.runner.final_norm(), self.runner.device
        moments = Moments(self.runner.spec.width, None, False, device)
        for a, z in self.runner.chunks(len(self.ids)):
            x = self.runner.end(norm, self._on_device(boundary, a, z)).flatten(0, -2)
            moments.add(x, None, torch.ones(len(x), device=device), None)
        return moments.hessian(0), moments.counts

    def _by_rows(self, name: str, hessian: Tensor | None) -> QuantizedTensor:
        """A matrix that is never whole in memory: rows are rounded one like the other."""
        found = [
            self._round(name, start, torch.from_numpy(rows).to(self.runner.device), hessian)
            for start, rows in self.runner.source.blocks(name, sizes.ROWS)
        ]
        return joined(found)

    def _round(
        self, name: str, start: int, weight: Tensor, hessian: Tensor | None, cross: Tensor | None = None
    ) -> QuantizedTensor:
        try:
            return self.compensate(weight, hessian, self.wanted[name], cross)
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
    """Matrices that no token came to; those of an expert with its number: `layers.3.mlp.experts.7.up.weight`."""
    for name, counts in tokens.items():
        for e, n in enumerate(counts):
            if not n:
                yield name.replace(".experts.", f".experts.{e}.") if ".mlp.experts." in name else name
