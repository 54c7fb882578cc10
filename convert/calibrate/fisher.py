"""The second pass: how much the model's answers depend on what each product gives, from the last layer to the first.

Labels are sampled from the model's own distribution, so that the expected outer product of the gradients of their
log-likelihood is the Fisher information (Martens 2020, arXiv 1412.1193; Kunstner et al. 2019, arXiv 1905.12558), half
of which is the Hessian of the KL divergence between the model and a changed one. Each layer is run again from its
stored input and differentiated with respect to it; no gradient of a weight is ever made.

Shapes: N windows, T tokens of one, D model, V vocab, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from backends.torch.modules import Block, Experts
from convert.calibrate import sizes
from convert.calibrate.boundary import Boundary
from convert.calibrate.measure import Measured, head_weight
from convert.calibrate.price import Lookup, gain, head_moments
from convert.calibrate.runner import embedding_rows, groups, observing, parts, product_weight
from convert.calibrate.statistics import Moments, spans
from convert.calibrate.store import Store, read_tensors, write_json, write_tensors
from convert.sources.files import read_json

EXPERTS = "mlp.experts"


class Gradient:
    """What is kept of the gradients at one product's output: sums of squares of each channel, and the energy |g|^2 of
    each row."""

    def __init__(self) -> None:
        self.squares: list[NDArray[np.float64]] = []
        self.energy: list[NDArray[np.float32]] = []

    def __call__(self, g: Tensor, counts: Tensor | None) -> None:
        """More rows [n, out]."""
        rows = parts(g, counts)
        sums = [part.square().sum(0, dtype=torch.float64).cpu().numpy() for part in rows]
        self.squares = [a + b for a, b in zip(self.squares, sums, strict=True)] if self.squares else sums
        self.energy.append(g.square().sum(-1).cpu().numpy())


class Fisher:
    """The pass, and what it left in a store's work folder."""

    def __init__(self, store: Store, measured: Measured, seed: int, priced: Mapping[str, str] | None = None) -> None:
        """priced: matrices whose gains are wanted, with the level that int8 is compared with."""
        self.priced = dict(priced or {})
        self.store, self.measured, self.runner, self.ids = store, measured, measured.runner, measured.ids
        self.chance = np.random.default_rng(seed).random(self.ids.shape)
        """[N, T], what decides which label is sampled."""

    @property
    def steps(self) -> int:
        """The head, every layer, and the embedding."""
        return self.runner.spec.depth + 2

    def step(self, n: int) -> None:
        """Step n, those before it being done. Nothing where it is done."""
        depth = self.runner.spec.depth
        i = depth - n  # the layer that it is of; depth is the head, -1 the embedding
        if self._file(i).is_file():
            return
        found, gains = self._head() if i == depth else self._embedding() if i < 0 else self._layer(i)
        write_json(self._gains(i), gains)
        write_tensors(self._file(i), found)
        if i < depth:
            self._gradient(i + 1).keep(0)

    def layer(self, i: int) -> dict[str, NDArray[Any]]:
        """Of layer i, by name: `NAME.squares`, sums over tokens, float64 [out] ([E * out] of stacked experts), and
        `NAME.energy`, float32 [N * T]; experts have that of the mixture's output, `layers.{i}.mlp.experts.energy`. The
        head has `head.curvature` [V], sums of p (1 - p); the embedding, which is layer -1, `embed.fisher` [D, D]."""
        return read_tensors(self._file(i))

    def lookup(self) -> Lookup:
        """What rounds the embedding, once every step is done. A tied one is the head too: for the inputs that the head
        has in the model as it is, since the rounded model's are not known before."""
        return self._lookup(torch.from_numpy(self.layer(-1)["embed.fisher"]).to(self.runner.device))

    def _lookup(self, fisher: Tensor) -> Lookup:
        depth, head = self.runner.spec.depth, None
        if self.runner.spec.head.tied:
            head = head_moments(self.runner, self.measured.boundary(depth), len(self.ids)).hessian(0)
        return Lookup(self.ids, fisher, self.layer(depth)["head.curvature"], head)

    def gains(self) -> dict[str, float]:
        """Nats of KL divergence a token that int8 saves, for each priced matrix, once every step is done."""
        out: dict[str, float] = {}
        for i in range(-1, self.runner.spec.depth + 1):
            out |= read_json(self._gains(i))
        return out

    def _gains(self, i: int) -> Path:
        return self.store.work / f"gains.{i if i >= 0 else 'embed'}.json"

    def _file(self, i: int) -> Path:
        return self.store.work / f"fisher.{i if i >= 0 else 'embed'}.safetensors"

    def _gradient(self, i: int) -> Boundary:
        """At the input of layer i."""
        return Boundary(self.store.work / f"gradient.{i}.f32", (*self.ids.shape, self.runner.spec.width))

    def _head(self) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        runner, depth = self.runner, self.runner.spec.depth
        norm, weight = runner.final_norm(), runner.tensor(head_weight(runner))
        bias = runner.tensor("head.bias") if runner.spec.head.bias else None
        curvature = np.zeros(runner.spec.vocab_size)
        rows = max(1, sizes.LOGITS // runner.spec.vocab_size)

        def scores(x: Tensor) -> Tensor:
            return runner.logits(lambda h: F.linear(h, weight, bias), runner.end(norm, x)).log_softmax(-1)

        with self._gradient(depth).writing() as sink:
            for a, z in runner.chunks(len(self.ids)):
                stream = torch.from_numpy(self.measured.boundary(depth).read(a, z)).flatten(0, -2)
                chance, grads = self.chance[a:z].reshape(-1), []
                for b in range(0, len(stream), rows):
                    x = stream[b : b + rows].to(runner.device).requires_grad_()
                    with torch.enable_grad():
                        logp = scores(x)
                        labels = _sampled(logp.detach(), chance[b : b + rows])
                        grads.append(torch.autograd.grad(-logp.gather(-1, labels).sum(), x)[0].cpu())
                    p = logp.detach().exp()
                    curvature += (p * (1 - p)).sum(0, dtype=torch.float64).cpu().numpy()
                sink(a, torch.cat(grads).view(z - a, *self.ids.shape[1:], -1).numpy())
        gains: dict[str, float] = {}
        if (level := self.priced.get("head.weight")) is not None:
            hessian = head_moments(runner, self.measured.boundary(depth), len(self.ids)).hessian(0)
            assert hessian is not None, "tokens"
            squares = torch.from_numpy(curvature / self.ids.size)
            gains["head.weight"] = gain(weight, level, hessian, squares)
        return {"head.curvature": curvature}, gains

    def _layer(self, i: int) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        runner, block = self.runner, self.runner.block(i)
        found = {name: Gradient() for group in groups(block) for name in group}
        if EXPERTS in dict(block.named_modules()):
            found[EXPERTS] = Gradient()
        moments = {group: m for group in groups(block) if (m := self._moments(i, block, group)) is not None}
        inputs = {group[0]: m for group, m in moments.items()}
        with self._gradient(i).writing() as sink, _differentiating(block, found), observing(block, inputs):
            for a, z in runner.chunks(len(self.ids)):
                x = torch.from_numpy(self.measured.boundary(i).read(a, z)).to(runner.device).requires_grad_()
                g = torch.from_numpy(self._gradient(i + 1).read(a, z)).to(runner.device)
                with torch.enable_grad():
                    sink(a, torch.autograd.grad(runner.run(i, block, x), x, g)[0].cpu().numpy())
        out: dict[str, NDArray[Any]] = {}
        for name, gradient in found.items():
            if name != EXPERTS:
                out[f"layers.{i}.{name}.weight.squares"] = np.concatenate(gradient.squares)
            if not name.startswith(f"{EXPERTS}."):
                tail = "" if name == EXPERTS else ".weight"
                out[f"layers.{i}.{name}{tail}.energy"] = np.concatenate(gradient.energy)
        gains: dict[str, float] = {}
        for group, m in moments.items():
            for n, part in m.all():
                for name in group:
                    full = f"layers.{i}.{name}.weight"
                    if full in self.priced:
                        weight, squares = product_weight(block, name), torch.from_numpy(out[f"{full}.squares"])
                        rows = len(weight) // m.of
                        mine = slice(n * rows, (n + 1) * rows)
                        saved = gain(weight[mine], self.priced[full], part, squares[mine] / self.ids.size)
                        gains[full] = gains.get(full, 0.0) + saved * m.of / len(m.counts)
        return out, gains

    def _moments(self, i: int, block: Block, group: Sequence[str]) -> Moments | None:
        """What counts the moments of a group's input, where a gain of its matrices is wanted. Of many experts the first
        stand for all."""
        if not any(f"layers.{i}.{name}.weight" in self.priced for name in group):
            return None
        experts = getattr(block.get_submodule(group[0]), "experts", None)
        width = product_weight(block, group[0]).shape[1]
        span = None if experts is None else spans(experts, width)[0]
        return Moments(width, span, False, self.runner.device, experts or 1)

    def _embedding(self) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        begin = self.runner.begin(self.ids, embedding_rows(self.runner.source))
        total = torch.zeros(self.runner.spec.width, self.runner.spec.width, device=self.runner.device)
        for a, z in self.runner.chunks(len(self.ids)):
            g = torch.from_numpy(self._gradient(0).read(a, z)).to(self.runner.device)
            rows = begin.gradient(a, z, g).flatten(0, -2)
            total.addmm_(rows.T, rows)
        gains: dict[str, float] = {}
        if (level := self.priced.get("embed.weight")) is not None:
            lookup = self._lookup(total)
            gains["embed.weight"] = sum(
                lookup.gain(start, torch.from_numpy(rows.copy()).to(total.device), level)
                for start, rows in self.runner.source.blocks("embed.weight", sizes.ROWS)
            )
        return {"embed.fisher": total.cpu().numpy()}, gains


def _sampled(logp: Tensor, chance: NDArray[np.float64]) -> Tensor:
    """[n, 1] labels: where the cumulated probability passes a number in [0, 1) drawn for each row."""
    cumulated = logp.exp().double().cumsum(-1)
    at = torch.from_numpy(chance).to(logp.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, at, right=True).clamp_(max=logp.shape[-1] - 1)


@contextmanager
def _differentiating(block: Block, gradients: dict[str, Gradient]) -> Iterator[None]:
    """Shows the gradients at products' outputs (at that of the experts' sum) to whoever counts them."""
    handles = []
    try:
        for name, gradient in gradients.items():

            def after(module: nn.Module, _: Any, named: Any, out: Tensor, gradient: Gradient = gradient) -> None:
                counts = named.get("counts")
                out.register_hook(lambda g: gradient(g.flatten(0, -2), None if isinstance(module, Experts) else counts))

            handles.append(block.get_submodule(name).register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
