"""The last pass: every matrix on its grid, layer by layer, each product for the inputs that the rounded ones before it
make.

Inside a layer products are rounded in the order in which they run, and what enters the next one is measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backends.base import Floats, Planned, QuantizedTensor
from backends.torch.modules import Block
from convert.calibrate.boundary import Boundary, Sink
from convert.calibrate.compensate import Factor, compensate, prepare
from convert.calibrate.fisher import EXPERTS, Fisher
from convert.calibrate.measure import Measured
from convert.calibrate.price import head_moments
from convert.calibrate.runner import Observe, Runner, embedding_rows, groups, observing, product_weight
from convert.calibrate.statistics import Moments, spans
from convert.calibrate.store import Store
from convert.calibrate.twosided import compensate_both
from convert.calibrate.vocabulary import Vocabulary
from convert.levels import CODES, GROUPS, LEVELS
from convert.quantize import TooLarge, quantize
from convert.recipe import Held, kept
from convert.stream import rounded
from spec.errors import UserError


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
    sweeps: int
    """Of polishing, at most."""
    together: int = 64
    """Rows of a product that are rounded together, where their errors are spread over other rows too."""

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
        name = "embed.weight"
        codes, tokens = {}, {}
        if name in self.wanted:
            codes[name] = self._vocabulary(name, self.fisher.vocabulary(self.sweeps))
            tokens[name] = [self.ids.size]
        begin = self.runner.begin(self.ids, self._embedding_rows(codes.get(name)))
        with self.boundary(0).writing() as sink:
            for a, z in self.runner.chunks(len(self.ids)):
                sink(a, begin(a, z).cpu().numpy())
        self.store.add("embed", codes, tokens)

    def _layer(self, i: int) -> None:
        before, prefix = self.boundary(i), f"layers.{i}."
        block = self.runner.block(i)
        plain = self._enter_plain(i, block)
        self._round_floats(block, prefix)
        codes: dict[str, QuantizedTensor] = {}
        tokens: dict[str, Sequence[int]] = {}
        for group in groups(block):
            names = [n for n in group if f"{prefix}{n}.weight" in self.wanted]
            if names:
                found, counts = self._group(i, block, plain.get(group), names)
                codes |= {f"{prefix}{n}.weight": q for n, q in found.items()}
                tokens |= {f"{prefix}{n}.weight": counts for n in names}
        with self.boundary(i + 1).writing() as sink:
            for a, z in self.runner.chunks(len(self.ids)):
                sink(a, self.runner.run(i, block, self._on_device(before, a, z)).cpu().numpy())
        self.store.add(f"layers.{i}", codes, tokens)
        for done in (before, self.measured.boundary(i), *plain.values()):
            done.keep(0)

    def _enter_plain(self, i: int, block: Block) -> dict[tuple[str, ...], Boundary]:
        """What enters the products of layer i in the model as it is, by group; of experts nothing, since their tokens
        are others in the rounded model."""
        wanted = [g for g in groups(block) if any(f"layers.{i}.{n}.weight" in self.wanted for n in g)]
        out = {
            g: Boundary(
                self.store.work / f"entered.{g[0]}.f32", (*self.ids.shape, product_weight(block, g[0]).shape[1])
            )
            for g in wanted
            if not g[0].startswith(f"{EXPERTS}.")
        }
        if not out:
            return out
        with ExitStack() as stack:
            sinks = {g[0]: stack.enter_context(boundary.writing()) for g, boundary in out.items()}
            for a, z in self.runner.chunks(len(self.ids)):
                with observing(block, {name: _kept(sink, a, z) for name, sink in sinks.items()}):
                    self.runner.run(i, block, self._on_device(self.measured.boundary(i), a, z))
        return out

    def _head(self) -> None:
        name = "head.weight"
        codes, tokens = {}, {}
        if name in self.wanted:
            stream, plain = (b.boundary(self.runner.spec.depth) for b in (self, self.measured))
            moments = head_moments(self.runner, stream, len(self.ids), plain)
            factor, tokens[name] = self._factor(moments, 0), moments.counts
            shift = None if factor is None else factor.shift
            codes[name] = self._vocabulary(name, Vocabulary([self.fisher.answers(stream)], shift, self.sweeps))
        self.store.add("head", codes, tokens)

    def _vocabulary(self, name: str, vocabulary: Vocabulary) -> QuantizedTensor:
        try:
            return vocabulary(self.runner.tensor(name), self.wanted[name])
        except TooLarge as e:
            raise UserError(e.at(name, 0)) from None

    def _group(
        self, i: int, block: Block, plain: Boundary | None, names: Sequence[str]
    ) -> tuple[dict[str, QuantizedTensor], list[int]]:
        """Round products of one input, in the block too; and the tokens that each expert saw."""
        experts = getattr(block.get_submodule(names[0]), "experts", None)
        width = product_weight(block, names[0]).shape[1]
        found: dict[str, list[QuantizedTensor]] = {n: [] for n in names}
        counts: list[int] = []
        energies, outer = self._energies(i, names), {name: self._outer(i, name) for name in names}
        for span in [None] if experts is None else spans(experts, width):
            moments = self._collect(i, block, plain, names[0], energies, width, span)
            counts += moments.counts
            for n, e in enumerate(span or range(1)):
                factor = self._factor(moments, n)
                for name in names:
                    weight = product_weight(block, name)
                    rows = len(weight) // (experts or 1)
                    part = weight[e * rows : (e + 1) * rows]
                    q = self._round(f"layers.{i}.{name}.weight", e * rows, part, factor, outer[name])
                    part.copy_(torch.from_numpy(q.dequantize()))
                    found[name].append(q)
        return {name: joined(parts) for name, parts in found.items()}, counts

    def _collect(
        self,
        i: int,
        block: Block,
        plain: Boundary | None,
        name: str,
        energies: Tensor,
        width: int,
        span: range | None,
    ) -> Moments:
        """Moments of the input of a product, rows weighted by the energy of the gradients at the outputs; crossed with
        what enters it in the model as it is."""
        device = self.runner.device
        moments = Moments(width, span, plain is not None, device)
        for a, z in self.runner.chunks(len(self.ids)):
            entered = self.runner.enter(i, block, name, self._on_device(self.boundary(i), a, z))
            before = None if plain is None else self._on_device(plain, a, z).flatten(0, -2)
            energy = energies[a * self.runner.length : z * self.runner.length].to(device)
            moments.add(entered.x, entered.counts, entered.weights(energy), before)
        return moments

    def _energies(self, i: int, names: Sequence[str]) -> Tensor:
        """[tokens], the mean of what the products have, each of mean 1; that of the mixture for experts."""
        found, total = self.fisher.layer(i), torch.zeros(self.ids.size, dtype=torch.float64)
        for name in dict.fromkeys(EXPERTS if n.startswith(f"{EXPERTS}.") else f"{n}.weight" for n in names):
            energy = torch.from_numpy(found[f"layers.{i}.{name}.energy"]).double()
            total += energy / energy.mean().clamp_min(1e-300)
        return (total / total.mean()).float() if total.any() else torch.ones(len(total))

    def _outer(self, i: int, name: str) -> Tensor | None:
        found = self.fisher.layer(i).get(f"layers.{i}.{name}.weight.outer")
        return None if found is None else torch.from_numpy(found).to(self.runner.device)

    def _factor(self, moments: Moments, n: int) -> Factor | None:
        hessian = moments.hessian(n)
        return None if hessian is None else prepare(hessian, moments.cross(n))

    def _round(
        self, name: str, start: int, weight: Tensor, factor: Factor | None, outer: Tensor | None
    ) -> QuantizedTensor:
        """Rows of a matrix, `start` the first; where no token came, by the search alone."""
        level = self.wanted[name]
        try:
            if factor is None:
                return quantize(weight.cpu().numpy(), CODES[level], GROUPS[level])
            if outer is None:
                return compensate(weight, factor, level, self.sweeps)
            return compensate_both(weight, factor, outer, level, self.together, self.sweeps)
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


def _kept(sink: Sink, start: int, stop: int) -> Observe:
    """Writes what enters a product, as windows start..stop."""
    return lambda x, _: sink(start, x.unflatten(0, (stop - start, -1)).cpu().numpy())


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
