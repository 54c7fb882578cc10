"""The model one layer at a time: `spec.forward` over torch modules that are filled from a source, used, and let go.

Everything is float32. Windows go through a layer a few at a time, always the same few, so that a result depends on
neither the memory nor on where a run was interrupted.

Shapes: N windows, T tokens of one, D model, E experts, n rows of a product.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from backends.torch.attention import Request, plan
from backends.torch.modules import Block, Experts, GroupedLinear, Norm, Rotary
from backends.torch.ops import TorchOps
from convert.calibrate import sizes
from convert.sources import Source
from spec import forward
from spec.errors import UserError
from spec.ops import Step
from spec.rope import rope_tables

GROUPS = (
    ("attn.q", "attn.k", "attn.v"),
    ("attn.o",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
    ("mlp.experts.gate", "mlp.experts.up"),
    ("mlp.experts.down",),
    ("mlp.shared.gate", "mlp.shared.up"),
    ("mlp.shared.down",),
)
"""Products of a layer in the order in which they run; those of a group have the same input."""

Observe = Callable[[Tensor, Tensor | None], None]
"""Called with the rows [n, in] that enter a product, and for stacked experts how many of them are each one's [E]."""


@dataclass
class Entered:
    """What entered a product."""

    x: Tensor
    """[n, in]; of stacked experts sorted by expert."""
    counts: Tensor | None
    """[E] how many of the rows are each expert's."""
    tokens: Tensor | None = None
    """[n] the token of each row, counted over the windows; none: in order."""
    shares: Tensor | None = None
    """[n] how much the expert of a row counts at its token."""

    def weights(self, energy: Tensor) -> Tensor:
        """[n] for the energies [tokens] of gradients at the product's output; at that of the mixture for experts."""
        if self.tokens is None or self.shares is None:
            return energy
        return energy[self.tokens] * self.shares.square()


class _Enough(Exception):
    """Nothing after a product is needed."""

    def __init__(self, found: Entered) -> None:
        self.found = found


def device_of(name: str) -> torch.device:
    """The device of `Settings.device`. Raises `UserError` where torch cannot use it."""
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(f"device={name!r}: torch cannot use it: {str(e).splitlines()[0]}") from None
    return where


@contextmanager
def computing(threads: int | None) -> Iterator[int]:
    """torch with so many threads (default: one for each core), without gradients and without TF32; gives their number
    and puts back what was set."""
    before, tf32 = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(tf32)


def groups(block: Block) -> list[tuple[str, ...]]:
    """The groups of products that a layer has."""
    own = dict(block.named_modules())
    return [
        found for g in GROUPS if (found := tuple(n for n in g if isinstance(own.get(n), nn.Linear | GroupedLinear)))
    ]


def product_weight(block: Block, name: str) -> Tensor:
    """The weight [out, in] of a product; [E * out, in] of stacked experts."""
    weight = block.get_submodule(name).weight
    assert isinstance(weight, Tensor), "a product"
    return weight


class Runner:
    """Runs windows of T tokens through parts of a source's model."""

    def __init__(self, source: Source, length: int, device: torch.device) -> None:
        spec = source.spec
        self.source, self.spec, self.length, self.device = source, spec, length, device
        self.kinds = list(dict.fromkeys(b.attention for b in spec.layers))
        self.rope = nn.ModuleList(Rotary(t) for t in rope_tables(spec, length)).to(device)
        self.windows = max(1, sizes.CHUNK // length)
        """Windows that go through a layer together."""

    def chunks(self, windows: int) -> Iterator[tuple[int, int]]:
        """(first, end) of the windows that go together."""
        return ((a, min(windows, a + self.windows)) for a in range(0, windows, self.windows))

    def block(self, i: int) -> Block:
        """A layer with its weights."""
        b = self.spec.layers[i]
        with torch.device("meta"):
            block = Block(b, self.spec.width, self.kinds.index(b.attention))
        return self._filled(block, f"layers.{i}.")

    def run(self, i: int, block: Block, x: Tensor) -> Tensor:
        """The residual stream [N, T, D] through layer i, the block given."""
        step = self._step(len(x))
        request = Request(step, 0, x.dtype, False, torch.is_grad_enabled())
        ops = TorchOps([plan(a, "auto", request) for a in self.kinds])
        tables: Any = self.rope
        w = SimpleNamespace(layers={i: block})
        return forward.blocks(ops, self.spec, w, x, step, tables, span=range(i, i + 1))[0]

    def enter(self, i: int, block: Block, name: str, x: Tensor) -> Entered:
        """Run layer i on the residual stream [N, T, D] as far as one of its products."""
        routed: dict[str, Tensor] = {}

        def route(_: nn.Module, args: Any) -> None:
            _, _, chosen, weights, _ = args
            order = chosen.flatten().argsort(stable=True)
            routed.update(tokens=order // chosen.shape[-1], shares=weights.flatten()[order].float())

        def before(_: nn.Module, args: Any, named: Any) -> None:
            counts = named.get("counts")
            raise _Enough(Entered(args[0].flatten(0, -2), counts, **(routed if counts is not None else {})))

        handles = [block.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True)]
        handles += [m.register_forward_pre_hook(route) for m in block.modules() if isinstance(m, Experts)]
        try:
            self.run(i, block, x)
        except _Enough as e:
            return e.found
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError(f"{name} did not run")

    def begin(self, ids: NDArray[np.int64], rows: Callable[[NDArray[np.int64]], NDArray[np.float32]]) -> Begin:
        """What makes the residual stream of ids [N, T]; `rows` gives rows of the embedding."""
        return Begin(self, ids, rows)

    def final_norm(self) -> Norm | None:
        """The norm before the head, where there is one."""
        norm = self.spec.final_norm
        if norm is None:
            return None
        with torch.device("meta"):
            module = Norm(norm, self.spec.width)
        return self._filled(module, "final_norm.")

    def end(self, norm: Norm | None, x: Tensor) -> Tensor:
        """The residual stream after the last layer, normed: the input of the head."""
        return forward.end(TorchOps([]), self.spec, SimpleNamespace(final_norm=norm), x)

    def logits(self, linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Logits of the head's input, scale and softcap included."""
        return forward.logits(TorchOps([]), self.spec, SimpleNamespace(head=linear), x)

    def scores(self) -> Callable[[Tensor], Tensor]:
        """The residual stream [n, D] after the last layer to log-probabilities [n, V]."""
        norm, weight = self.final_norm(), self.tensor(self.head)
        bias = self.tensor("head.bias") if self.spec.head.bias else None
        return lambda x: self.logits(lambda h: F.linear(h, weight, bias), self.end(norm, x)).log_softmax(-1)

    @property
    def head(self) -> str:
        """The matrix that logits come from."""
        return "embed.weight" if self.spec.head.tied else "head.weight"

    def tensor(self, name: str) -> Tensor:
        """A parameter of the source on the device."""
        out = torch.empty(self.source.shape(name), device=self.device)
        fill(out, self.source, name)
        return out

    def _step(self, windows: int) -> Step[Tensor]:
        slots = torch.arange(self.length, device=self.device).expand(windows, self.length)
        return Step("causal", slots, slots)

    def _filled(self, module: Any, prefix: str) -> Any:
        module = module.to_empty(device=self.device).requires_grad_(False).eval()
        for name, parameter in module.named_parameters():
            fill(parameter, self.source, prefix + name)
        return module


class Begin:
    """The residual stream before the first layer. Of the embedding only the rows of the ids are in memory."""

    def __init__(
        self, runner: Runner, ids: NDArray[np.int64], rows: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    ) -> None:
        self.runner, e = runner, runner.spec.embedding
        used, places = np.unique(ids, return_inverse=True)
        self.places = torch.from_numpy(places.reshape(ids.shape)).to(runner.device)
        self.w = SimpleNamespace(embed=_table(torch.from_numpy(rows(used)).to(runner.device)))
        if e.positions is not None:
            self.w.positions = _table(runner.tensor("positions.weight"))
        if e.norm is not None:
            with torch.device("meta"):
                norm = Norm(e.norm, runner.spec.width)
            self.w.embed_norm = runner._filled(norm, "embed_norm.")

    def __call__(self, start: int, stop: int) -> Tensor:
        """[N, T, D] of windows start..stop."""
        return self._of(self.w.embed, start, stop)

    def gradient(self, start: int, stop: int, g: Tensor) -> Tensor:
        """The gradient at the rows of the embedding [N, T, D] for that at the residual stream."""
        rows = self.w.embed(self.places[start:stop]).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self._of(lambda _: rows, start, stop), rows, g)[0]

    def _of(self, embed: Callable[[Tensor], Tensor], start: int, stop: int) -> Tensor:
        w = SimpleNamespace(**{**vars(self.w), "embed": embed})
        return forward.begin(
            TorchOps([]), self.runner.spec, w, self.places[start:stop], self.runner._step(stop - start)
        )


def _table(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda ids: weight[ids]


def fill(into: Tensor, source: Source, name: str) -> None:
    """A parameter's values from a source, a few rows at a time."""
    for start, rows in source.blocks(name):
        into[start : start + len(rows)] = torch.from_numpy(np.ascontiguousarray(rows)).to(into.device)


def embedding_rows(source: Source) -> Callable[[NDArray[np.int64]], NDArray[np.float32]]:
    """Rows of the source's embedding by ascending index."""

    def rows(index: NDArray[np.int64]) -> NDArray[np.float32]:
        out = np.empty((len(index), source.spec.width), np.float32)
        for start, block in source.blocks("embed.weight"):
            here = (index >= start) & (index < start + len(block))
            out[here] = block[index[here] - start]
        return out

    return rows


@contextmanager
def observing(block: Block, observers: dict[str, Observe]) -> Iterator[None]:
    """Calls an observer with what enters a product, by its name in the layer, as long as the context lasts."""
    own = dict(block.named_modules())
    handles = []
    try:
        for name, observe in observers.items():

            def before(_: nn.Module, args: Any, named: Any, observe: Observe = observe) -> None:
                observe(args[0].flatten(0, -2), named.get("counts"))

            handles.append(own[name].register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def parts(x: Tensor, counts: Tensor | None) -> Sequence[Tensor]:
    """The rows of each expert; of a product without experts, all."""
    return [x] if counts is None else x.split(counts.tolist())
