"""A calibration measures layer by layer what one whole forward and backward pass would: for every feature.

Shapes: N windows, T tokens, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from backends.torch.checkpoint import load_decoder
from backends.torch.model import Decoder
from backends.torch.modules import Experts, GroupedLinear
from convert.calibrate import kinds, sizes
from convert.calibrate import rounder as rounders
from convert.calibrate.compensate import Factor
from convert.calibrate.compensate import prepare as factored
from convert.calibrate.fisher import Fisher
from convert.calibrate.kinds import PRIOR
from convert.calibrate.measure import Measured
from convert.calibrate.rounder import Rounder, untouched
from convert.calibrate.runner import Runner, computing
from convert.calibrate.store import Store
from convert.quantize import quantize
from convert.recipe import plan
from convert.sources import open_source
from parity_tests.cases import BASE, FEATURES, random_ids, random_weights
from spec import Spec, dump, parse
from spec.config import merge

WINDOWS, LENGTH = 5, 24
CLOSE = 2e-5
"""Relative: float32 sums of some hundred terms in another order."""


def written(folder: Path, spec: Spec) -> Path:
    folder.mkdir()
    (folder / "spec.yaml").write_text(dump(spec))
    save_file(random_weights(spec), folder / "model.safetensors")
    return folder


class Passes:
    """A calibration's passes over random ids, a few windows at a time."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        self.spec, self.ids = spec, random_ids(spec, WINDOWS, LENGTH)
        self.checkpoint = written(folder / "checkpoint", spec)
        self.source = open_source(self.checkpoint)
        self.store = Store(folder / "work", {})
        self.runner = Runner(self.source, LENGTH, torch.device("cpu"))
        self.measured = Measured(self.store, self.runner, self.ids, WINDOWS)
        self.fisher = Fisher(self.store, self.measured, 0)
        with computing(1):
            for i in range(spec.depth + 1):
                self.measured.step(i)
            for n in range(self.fisher.steps):
                self.fisher.step(n)

    def rounded(self, level: str) -> Rounder:
        """All units rounded."""
        made = Rounder(self.store, self.runner, self.measured, self.fisher, plan(self.spec, level), 3)
        with computing(1):
            for unit in made.units():
                made.step(unit)
        return made


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Spec], Passes]:
    monkeypatch.setattr(sizes, "CHUNK", 2 * LENGTH)
    monkeypatch.setattr(kinds, "KINDS", 3)
    return lambda spec: Passes(tmp_path, spec)


def products(decoder: Decoder) -> dict[str, nn.Module]:
    found = {n: m for n, m in decoder.named_modules() if isinstance(m, nn.Linear | GroupedLinear | Experts)}
    return {**found, "head": decoder.head}


class Whole:
    """One forward and backward pass of the whole model with hooks."""

    def __init__(self, folder: Path, ids: NDArray[np.int64], chance: NDArray[np.float64] | None = None) -> None:
        self.decoder = load_decoder(folder, torch.float32, length=LENGTH).requires_grad_(False)
        self.inputs: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.gradients: dict[str, Tensor] = {}
        handles = [m.register_forward_hook(self._hook(n), with_kwargs=True) for n, m in products(self.decoder).items()]
        rows = self.decoder.embed.weight[torch.from_numpy(ids)].requires_grad_()
        handles.append(self.decoder.embed.register_forward_hook(lambda *_: rows))
        self.logits = self.decoder(torch.from_numpy(ids))
        logp = self.logits.detach().log_softmax(-1)
        self.curvature = (logp.exp() * (1 - logp.exp())).flatten(0, 1).sum(0)
        if chance is not None:
            cumulated = logp.double().exp().cumsum(-1)
            labels = (cumulated <= torch.from_numpy(chance)[..., None] * cumulated[..., -1:]).sum(-1)
            loss = -self.logits.log_softmax(-1).gather(-1, labels[..., None]).sum()
            self.embedding = torch.autograd.grad(loss, rows)[0].flatten(0, 1)
        for handle in handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, named: Any, out: Tensor) -> None:
            if not isinstance(module, Experts):
                self.inputs[name] = args[0].detach().flatten(0, -2), named.get("counts")
            if out.requires_grad:
                out.register_hook(lambda g: self.gradients.update({name: g.detach().flatten(0, -2)}))

        return hook


def close(got: Any, want: Any, what: str, tolerance: float = CLOSE) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: {got.shape}, not {want.shape}"
    scale = max(float(np.abs(want).max()), 1e-30)
    assert float(np.abs(got - want).max()) <= tolerance * scale, f"{what}: {np.abs(got - want).max() / scale:.3g}"


def by_expert(x: Tensor, counts: Tensor | None) -> NDArray[np.float64]:
    """Mean squares, of each expert."""
    if counts is None:
        return x.double().square().mean(0).numpy()
    return np.stack([part.double().square().sum(0).numpy() / max(len(part), 1) for part in x.split(counts.tolist())])


@pytest.mark.parametrize("name", FEATURES)
def test_one_layer_at_a_time_measures_what_the_whole_model_does(name: str, passes: Callable[[Spec], Passes]) -> None:
    spec = FEATURES[name]
    p = passes(spec)
    whole = Whole(p.checkpoint, p.ids, p.fisher.chance)
    importance = p.measured.importance()
    tied = {"head": "embed"} if spec.head.tied else {}
    for product, (x, counts) in whole.inputs.items():
        full = f"{tied.get(product, product)}.weight"
        close(importance[full], by_expert(x, counts), f"{full} importance")
        assert importance[f"{full}.count"].tolist() == ([len(x)] if counts is None else counts.tolist())
    assert len(importance) == 2 * len(whole.inputs)

    found = {n: v for i in range(-1, spec.depth + 1) for n, v in p.fisher.layer(i).items()}
    close(found["head.curvature"], whole.curvature, "curvature")
    g, ids = whole.embedding.double(), torch.from_numpy(p.ids.reshape(-1))
    counts = torch.bincount(ids, minlength=spec.vocab_size)
    close(found["embed.uses"], counts / ids.numel(), "embed.uses")
    labels = torch.from_numpy(found["embed.labels"])
    hessians = []
    for k in range(int(labels.max()) + 1):
        mine = g[labels[ids] == k]
        hessians.append((mine.T @ mine + PRIOR * (g.T @ g) / len(g)) / (len(mine) + PRIOR))
    close(found["embed.fisher"], torch.cat(hessians), "embed.fisher", 20 * CLOSE)
    for product, g in whole.gradients.items():
        if product == "head":
            continue
        stacked = ".mlp.experts." in product
        experts = product.endswith(".mlp.experts")
        if not experts and not stacked:
            close(found[f"{product}.weight.squares"], g.double().square().sum(0), f"{product} squares", 20 * CLOSE)
        if stacked:
            _, counts = whole.inputs[product]
            assert counts is not None
            sums = torch.cat([part.double().square().sum(0) for part in g.split(counts.tolist())])
            close(found[f"{product}.weight.squares"], sums, f"{product} squares", 20 * CLOSE)
        else:
            energy = found[f"{product}{'' if experts else '.weight'}.energy"]
            close(energy, g.double().square().sum(-1), f"{product} energy", 20 * CLOSE)


def wide(name: str, **patch: Any) -> Spec:
    """A spec whose matrices all have whole groups."""
    return parse(merge(merge(BASE, {"name": name}), patch), name)


ROUNDED = {
    "untied": wide("untied"),
    "tied": wide("tied", head={"tied": True}),
    "parallel": wide("parallel", block={"parallel": True, "shared_norm": True}),
    "moe": wide("moe", block={"mlp": {"kind": "moe", "experts": 4, "hidden": 32, "router": {"top_k": 2},
                                      "shared": {"hidden": 32}}}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_each_product_is_rounded_for_what_the_rounded_ones_before_it_make(
    name: str, passes: Callable[[Spec], Passes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ROUNDED[name]
    p = passes(spec)
    seen: list[tuple[Tensor, Tensor | None]] = []

    def prepare(hessian: Tensor, cross: Tensor | None = None) -> Factor:
        seen.append((hessian.clone(), None if cross is None else cross.clone()))
        return factored(hessian, cross)

    monkeypatch.setattr(rounders, "prepare", prepare)
    rounder = p.rounded("q4")
    weights, last = random_weights(spec), f"layers.{spec.depth - 1}.mlp.{'shared.' if name == 'moe' else ''}down"
    codes = {n: q for unit in rounder.units() for n, q in p.store.codes(unit, rounder.levels)[0].items()}
    assert set(codes) == {n.name for n in plan(spec, "q4") if n.level in ("q4", "q8")}
    after = {n: codes[n].dequantize() if n in codes else w for n, w in weights.items()}
    after[f"{last}.weight"] = weights[f"{last}.weight"]  # its input is what those before it make
    folder = tmp_path / "rounded"
    folder.mkdir()
    (folder / "spec.yaml").write_text(dump(spec))
    save_file(after, folder / "model.safetensors")
    x, _ = Whole(folder, p.ids).inputs[last]
    before, _ = Whole(p.checkpoint, p.ids).inputs[last]
    energy = torch.from_numpy(p.fisher.layer(spec.depth - 1)[f"{last}.weight.energy"]).double()
    energy /= energy.sum()
    hessian, cross = seen[-1 if spec.head.tied else -2]  # the last one is the head's
    assert cross is not None
    close(hessian, (x.double().T * energy) @ x.double(), "hessian", 10 * CLOSE)
    close(cross, (before.double().T * energy) @ x.double(), "cross", 10 * CLOSE)


def test_an_expert_that_no_token_chose_is_counted_and_searched(passes: Callable[[Spec], Passes]) -> None:
    spec = wide("few", block={"mlp": {"kind": "moe", "experts": 60, "hidden": 32, "router": {"top_k": 1}}})
    p = passes(spec)
    rounder = p.rounded("q4")
    absent = []
    for unit in rounder.units():
        codes, tokens = p.store.codes(unit, rounder.levels)
        absent += list(untouched(tokens))
        for name, counts in tokens.items():
            assert sum(counts) == WINDOWS * LENGTH, name
            if ".experts." in name:
                rows = random_weights(spec)[name].reshape(60, 32, 32)
                e = counts.index(0)
                alone = quantize(rows[e], codes[name].bits)
                assert np.array_equal(codes[name].codes.reshape(60, 32, 32)[e], alone.codes)
    assert absent
    assert all(".mlp.experts." in name for name in absent)


def test_experts_in_spans_give_what_all_at_once_do(
    passes: Callable[[Spec], Passes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = passes(ROUNDED["moe"])
    whole = {u: (p.store.folder / f"{u}.safetensors") for u in p.rounded("q4").units()}
    before = {u: path.read_bytes() for u, path in whole.items()}
    for path in whole.values():
        path.unlink()
    for i in range(p.spec.depth + 1):  # the pass over a layer drops its input
        (p.store.work / f"measured.{i}.safetensors").unlink()
    for i in range(p.spec.depth + 1):
        p.measured.step(i)
    monkeypatch.setattr(sizes, "HESSIANS", 3 * 4 * 32 * 32)
    p.rounded("q4")
    assert before == {u: path.read_bytes() for u, path in whole.items()}
