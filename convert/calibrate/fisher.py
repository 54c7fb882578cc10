"""The second pass: how much the model's answers depend on what each product gives, from the last layer to the first.

Labels are sampled from the model's own distribution, so that the expected outer product of the gradients of their
log-likelihood is the Fisher information (Martens 2020, arXiv 1412.1193; Kunstner et al. 2019, arXiv 1905.12558), half
of which is the Hessian of the KL divergence between the model and a changed one. Each layer is run again from its
stored input and differentiated with respect to it; no gradient of a weight is ever made.

Shapes: N windows, T tokens of one, D model, V vocab, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from backends.torch.modules import Block, Experts
from convert.calibrate import sizes
from convert.calibrate.boundary import Boundary
from convert.calibrate.compensate import SWEEPS, prepare
from convert.calibrate.kinds import Kinds, Sums, by_context, by_frequency, most
from convert.calibrate.measure import Measured
from convert.calibrate.price import FINE, answers, gain, shares
from convert.calibrate.runner import embedding_rows, groups, observing, parts, product_weight
from convert.calibrate.statistics import Moments, spans
from convert.calibrate.store import Store, read_tensors, write_json, write_tensors
from convert.calibrate.vocabulary import Vocabulary
from convert.sources.files import read_json

EXPERTS = "mlp.experts"


class Gradient:
    """What is kept of the gradients at one product's output: sums of squares of each channel, the energy |g|^2 of each
    row, and where `outer` the sum of g g^T."""

    def __init__(self, outer: Tensor | None = None) -> None:
        self.outer = outer
        self.squares: list[NDArray[np.float64]] = []
        self.energy: list[NDArray[np.float32]] = []

    def __call__(self, g: Tensor, counts: Tensor | None) -> None:
        """More rows [n, out]."""
        rows = parts(g, counts)
        sums = [part.square().sum(0, dtype=torch.float64).cpu().numpy() for part in rows]
        self.squares = [a + b for a, b in zip(self.squares, sums, strict=True)] if self.squares else sums
        self.energy.append(g.square().sum(-1).cpu().numpy())
        if self.outer is not None:
            self.outer.addmm_(g.T, g)


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
        if i == depth:
            write_tensors(self._file(i), self._head())
        elif i < 0:
            write_tensors(self._file(i), self._embedding())
        else:
            found, gains = self._layer(i)
            write_json(self._gains(i), gains)
            write_tensors(self._file(i), found)
        if i < depth:
            self._gradient(i + 1).keep(0)

    def layer(self, i: int) -> dict[str, NDArray[Any]]:
        """Of layer i, by name: `NAME.squares`, sums over tokens, float64 [out] ([E * out] of stacked experts),
        `NAME.outer`, sums of g g^T [out, out] where there are at most as many outputs as the stream is wide, and
        `NAME.energy`, float32 [N * T]; experts have that of the mixture's output, `layers.{i}.mlp.experts.energy`. The
        head has `head.curvature` [V], sums of p (1 - p), and `head.labels` [V]; the embedding, which is layer -1, the
        parts of its `Kinds`: `embed.labels`, `embed.fisher`, `embed.uses`."""
        return read_tensors(self._file(i))

    def vocabulary(self, sweeps: int = SWEEPS) -> Vocabulary:
        """What rounds the embedding, once every step is done. A tied one is the head too: for the inputs that the head
        has in the model as it is, since the rounded model's are not known before."""
        found = {n: torch.from_numpy(t).to(self.runner.device) for n, t in self.layer(-1).items()}
        hessians = found["embed.fisher"].unflatten(0, (-1, self.runner.spec.width))
        uses = [Kinds(found["embed.labels"], hessians, found["embed.uses"])]
        plain = self.measured.boundary(self.runner.spec.depth)
        return Vocabulary([*uses, *([self.answers(plain)] if self.runner.spec.head.tied else [])], sweeps=sweeps)

    def answers(self, stream: Boundary) -> Kinds:
        """The head's rows, for inputs from `stream`."""
        depth, file = self.runner.spec.depth, self.store.work / "fisher.shares.safetensors"
        found = self.layer(depth)
        labels = torch.from_numpy(found["head.labels"])
        if not file.is_file():
            counts = shares(self.runner, labels, self.measured.boundary(depth), len(self.ids))
            write_tensors(file, {"shares": counts.numpy()})
        counts = torch.from_numpy(read_tensors(file)["shares"])
        return answers(self.runner, labels, found["head.curvature"], counts, stream, len(self.ids))

    def gains(self) -> dict[str, float]:
        """Nats of KL divergence a token that int8 saves, for each priced matrix, once every step is done."""
        depth = self.runner.spec.depth
        if not self._gains(-1).is_file():
            plain = self.measured.boundary(depth)
            saved = self._vocabulary_gains("embed.weight", lambda: self.vocabulary(1))
            saved |= self._vocabulary_gains("head.weight", lambda: Vocabulary([self.answers(plain)], sweeps=1))
            write_json(self._gains(-1), saved)
        return {n: g for i in range(-1, depth) for n, g in read_json(self._gains(i)).items()}

    def _gains(self, i: int) -> Path:
        return self.store.work / f"gains.{i if i >= 0 else 'embed'}.json"

    def _file(self, i: int) -> Path:
        return self.store.work / f"fisher.{i if i >= 0 else 'embed'}.safetensors"

    def _gradient(self, i: int) -> Boundary:
        """At the input of layer i."""
        return Boundary(self.store.work / f"gradient.{i}.f32", (*self.ids.shape, self.runner.spec.width))

    def _head(self) -> dict[str, NDArray[Any]]:
        runner, depth = self.runner, self.runner.spec.depth
        norm, scores = runner.final_norm(), runner.scores()
        curvature = torch.zeros(runner.spec.vocab_size, dtype=torch.float64, device=runner.device)
        contexts = torch.zeros(runner.spec.vocab_size, runner.spec.width, device=runner.device)
        rows = max(1, sizes.LOGITS // runner.spec.vocab_size)
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
                    p = p * (1 - p)
                    curvature += p.sum(0, dtype=torch.float64)
                    contexts.addmm_(p.T, runner.end(norm, x.detach()))
                sink(a, torch.cat(grads).view(z - a, *self.ids.shape[1:], -1).numpy())
        kinds = by_context(contexts, curvature, most(runner.spec.width))
        return {"head.curvature": curvature.cpu().numpy(), "head.labels": kinds.cpu().numpy()}

    def _layer(self, i: int) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        runner, block = self.runner, self.runner.block(i)
        found = {name: Gradient(self._outer(block, name)) for group in groups(block) for name in group}
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
            if gradient.outer is not None:
                out[f"layers.{i}.{name}.weight.outer"] = gradient.outer.cpu().numpy()
            if not name.startswith(f"{EXPERTS}."):
                tail = "" if name == EXPERTS else ".weight"
                out[f"layers.{i}.{name}{tail}.energy"] = np.concatenate(gradient.energy)
        gains: dict[str, float] = {}
        for group, m in moments.items():
            for n, part in m.all():
                factor = prepare(part)
                for name in group:
                    full = f"layers.{i}.{name}.weight"
                    if full in self.priced:
                        weight, squares = product_weight(block, name), torch.from_numpy(out[f"{full}.squares"])
                        rows = len(weight) // m.of
                        mine = slice(n * rows, (n + 1) * rows)
                        saved = gain(weight[mine], self.priced[full], factor, part, squares[mine] / self.ids.size)
                        gains[full] = gains.get(full, 0.0) + saved * m.of / len(m.counts)
        return out, gains

    def _outer(self, block: Block, name: str) -> Tensor | None:
        """Where g g^T is summed up: of experts' products nowhere, nor where it would be larger than the stream's."""
        out = len(product_weight(block, name))
        if out > self.runner.spec.width or name.startswith(f"{EXPERTS}."):
            return None
        return torch.zeros(out, out, device=self.runner.device)

    def _moments(self, i: int, block: Block, group: Sequence[str]) -> Moments | None:
        """What counts the moments of a group's input, where a gain of its matrices is wanted. Of many experts the first
        stand for all."""
        if not any(f"layers.{i}.{name}.weight" in self.priced for name in group):
            return None
        experts = getattr(block.get_submodule(group[0]), "experts", None)
        width = product_weight(block, group[0]).shape[1]
        span = None if experts is None else spans(experts, width)[0]
        return Moments(width, span, False, self.runner.device, experts or 1)

    def _embedding(self) -> dict[str, NDArray[Any]]:
        runner = self.runner
        counts = torch.from_numpy(np.bincount(self.ids.reshape(-1), minlength=runner.spec.vocab_size))
        sums = Sums(by_frequency(counts, most(runner.spec.width)).to(runner.device), runner.spec.width)
        begin = runner.begin(self.ids, embedding_rows(runner.source))
        for a, z in runner.chunks(len(self.ids)):
            g = torch.from_numpy(self._gradient(0).read(a, z)).to(runner.device)
            rows = begin.gradient(a, z, g).flatten(0, -2)
            sums.looked_up(torch.from_numpy(self.ids[a:z].reshape(-1)).to(runner.device), rows)
        found = sums.lookup_kinds(counts.to(runner.device))
        parts = {"labels": found.labels, "fisher": found.hessians.flatten(0, 1), "uses": found.uses}
        return {f"embed.{part}": t.cpu().numpy() for part, t in parts.items()}

    def _vocabulary_gains(self, name: str, vocabulary: Callable[[], Vocabulary]) -> dict[str, float]:
        """What int8 saves in the embedding or the head."""
        level = self.priced.get(name)
        if level is None:
            return {}
        coarse, fine = vocabulary().costs(self.runner.tensor(name), (level, FINE))
        return {name: coarse - fine}


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
