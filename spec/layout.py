"""How a format names and arranges the parameters: one table a format, read in both directions.

A `Rule` says which canonical tensors become which external ones, and how: every operation rearranges whole rows, so
a bound rule is one gather over rows, its inverse is derived, and either side can be streamed in row blocks. `{i}`
in a name stands for the layer, `{e}` in an external one for each of its experts. Operations read from canonical to
external.

    RULES = (
        Rule("embed.weight",                  "model.embed_tokens.weight"),
        Rule(("layers.{i}.attn.q.weight",
              "layers.{i}.attn.k.weight",
              "layers.{i}.attn.v.weight"),    "h.{i}.attn.c_attn.weight", Concat(), Transpose()),
        Rule("layers.{i}.attn.q.weight",      "blk.{i}.attn_q.weight", RopeInterleave()),
        Rule("layers.{i}.mlp.experts.down.weight", "h.{i}.experts.{e}.down.weight", Split()),
    )
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec.config import Block, MoE, Rope, Spec
from spec.params import Param, params

Index = NDArray[np.intp]
Fetch = Callable[[str, int, int], NDArray[np.float32]]
"""Rows start..stop of an external tensor (leading axes of a stacked one flattened), as float32."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor as a gather: row r is row `row[r]` of input number `tensor[r]`; `shape` is the whole tensor's."""

    tensor: Index
    row: Index
    shape: tuple[int, ...]

    def take(self, order: Index, shape: tuple[int, ...] | None = None) -> Rows:
        """Its rows in another order."""
        return Rows(self.tensor[order], self.row[order], shape or (len(order), *self.shape[1:]))


def _joined(parts: Sequence[Rows], order: Index | None = None) -> Rows:
    whole = Rows(
        np.concatenate([p.tensor for p in parts]),
        np.concatenate([p.row for p in parts]),
        (sum(p.shape[0] for p in parts), *parts[0].shape[1:]),
    )
    return whole if order is None else whole.take(order)


class Op:
    """One step of a rule: tensors as gathers in, tensors as gathers out. `layer` is none outside the layers."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        raise NotImplementedError


@dataclass(frozen=True)
class Transpose(Op):
    """[out, in] to [in, out], of stacked matrices each; the last step of a rule (vectors are left alone)."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        return parts  # whole rows keep their order: `Bound.transposed` says how they lie


@dataclass(frozen=True)
class Concat(Op):
    """Several tensors, one below the other: q, k, v to qkv."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        return [_joined(parts)]


@dataclass(frozen=True)
class Split(Op):
    """One tensor cut into equal pieces of rows, as many as the rule has external names."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        (whole,) = parts
        assert whole.shape[0] % outputs == 0, f"{whole.shape[0]} rows do not split into {outputs}"
        return [whole.take(piece) for piece in np.split(np.arange(whole.shape[0]), outputs)]


@dataclass(frozen=True)
class ConcatGrouped(Op):
    """q, k, v to one tensor in which each kv-head follows its own queries: [G, (H/G + 2) * K, D] (GPT-NeoX, Falcon)."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        assert layer is not None and layer.attention.kv_heads is not None, "attention's own rows only"
        return [_joined(parts, _alternating(parts, layer.attention.kv_heads))]


@dataclass(frozen=True)
class Interleave(Op):
    """Rows of several tensors of one size in turn: gate and up to g0 u0 g1 u1 ... (GPT-OSS)."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        return [_joined(parts, _alternating(parts, parts[0].shape[0]))]


@dataclass(frozen=True)
class Stack(Op):
    """n tensors [r, c] to one [n, r, c]: experts."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        assert len({p.shape for p in parts}) == 1, "only equal shapes stack"
        whole = _joined(parts)
        return [Rows(whole.tensor, whole.row, (len(parts), *parts[0].shape))]


@dataclass(frozen=True)
class StackExperts(Op):
    """The experts of a layer apart: tensors [E * r, c] to one [E, r + r + ..., c], in which each expert's rows of one
    follow its rows of the other (gate, up); vectors to [E, r + ...]."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        n = experts(layer)
        whole = _joined(parts, _alternating(parts, n))
        return [Rows(whole.tensor, whole.row, (n, len(whole.row) // n, *parts[0].shape[1:]))]


def experts(layer: Block | None) -> int:
    """How many experts a layer has."""
    assert layer is not None and isinstance(layer.mlp, MoE), "a mixture's own rows only"
    return layer.mlp.experts


@dataclass(frozen=True)
class RopeInterleave(Op):
    """Rows of rotated heads from half-split pairs (i, i + rotary/2) to neighbours (2i, 2i + 1); biases and QK-norm
    gains too. Rows beyond the rotary dimensions of a head stay where they are."""

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        assert layer is not None, "attention's own rows only"
        return [p.take(self.rows(p.shape[0], layer)) for p in parts]

    @staticmethod
    def rows(rows: int, layer: Block) -> Index:
        """Order such that `external = canonical[order]`, for `rows` rows of whole heads of a resolved layer; a
        `QuantizedTensor` takes it too."""
        a = layer.attention
        assert a.head_dim is not None, "a resolved layer"
        return rope_order(rows, a.head_dim, a.position.rotary_dim(a.head_dim) if isinstance(a.position, Rope) else 0)


def rope_order(rows: int, head_dim: int, rotary: int) -> Index:
    """Row order that turns half-split heads into interleaved ones; np.argsort of it turns them back."""
    assert rows % head_dim == 0, f"{rows} rows are no whole heads of {head_dim}"
    head = np.arange(head_dim)
    head[:rotary] = head[:rotary].reshape(2, rotary // 2).T.reshape(-1)
    return (np.arange(0, rows, head_dim)[:, None] + head).reshape(-1)


@dataclass(frozen=True)
class Add(Op):
    """A constant added on the way out, in float32: a norm that stores 1 + w. One way, since it rounds."""

    value: float

    def apply(self, parts: list[Rows], layer: Block | None, outputs: int) -> list[Rows]:
        return parts


def _alternating(parts: Sequence[Rows], groups: int) -> Index:
    """Order of the joined rows in which each of `groups` equal shares of every part comes in turn."""
    starts = np.cumsum([0] + [p.shape[0] for p in parts])
    shares = []
    for start, p in zip(starts, parts, strict=False):
        assert p.shape[0] % groups == 0, f"{p.shape[0]} rows do not split into {groups} groups"
        shares.append((start + np.arange(p.shape[0])).reshape(groups, -1))
    return np.concatenate(shares, axis=1).reshape(-1)


@dataclass(frozen=True, init=False)
class Rule:
    """`canonical` tensors become `external` ones through `ops`. A rule whose canonical tensors a spec lacks is idle."""

    canonical: tuple[str, ...]
    external: tuple[str, ...]
    ops: tuple[Op, ...]

    def __init__(self, canonical: str | Sequence[str], external: str | Sequence[str], *ops: Op) -> None:
        object.__setattr__(self, "canonical", (canonical,) if isinstance(canonical, str) else tuple(canonical))
        object.__setattr__(self, "external", (external,) if isinstance(external, str) else tuple(external))
        object.__setattr__(self, "ops", ops)


@dataclass(frozen=True)
class Run:
    """Consecutive rows start .. start + len(take) of `tensor`, which are rows `take` of the block at hand."""

    tensor: str
    start: int
    take: Index


@dataclass(frozen=True)
class Bound:
    """A rule for one spec and layer."""

    canonical: tuple[Param, ...]
    external: tuple[str, ...]
    ops: tuple[Op, ...]
    layer: Block | None

    @property
    def transposed(self) -> bool:
        """Whether external matrices are [in, out]."""
        return any(isinstance(op, Transpose) for op in self.ops) and len(self.canonical[0].shape) == 2

    @property
    def folded(self) -> bool:
        """Whether vectors lie outside as matrices, whose rows are several of their elements."""
        return len(self.canonical[0].shape) == 1 and not self.plain and len(self._outside[0].shape) > 1

    @property
    def added(self) -> float:
        """Constant added to canonical values on the way out."""
        return sum(op.value for op in self.ops if isinstance(op, Add))

    @property
    def plain(self) -> bool:
        """Whether rows lie outside as they do inside."""
        return not self.ops

    @property
    def _gathers(self) -> tuple[list[Rows], list[Rows]]:
        layer: Any = self.layer  # a frozen model hashes
        return _moved(self.ops, tuple(p.shape for p in self.canonical), len(self.external), layer)

    @property
    def _outside(self) -> list[Rows]:
        found = self._gathers[0]
        assert len(found) == len(self.external), f"{self.external}: {len(found)} tensors for {len(self.external)} names"
        return found

    @property
    def _inside(self) -> list[Rows]:
        """The inverse gather: where outside each canonical row lies."""
        return self._gathers[1]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """External names and their shapes."""
        if self.plain:
            return {self.external[0]: self.canonical[0].shape}
        shapes = [(*r.shape[:-2], *r.shape[:-3:-1]) if self.transposed else r.shape for r in self._outside]
        return dict(zip(self.external, shapes, strict=True))

    def runs(self, name: str, start: int, stop: int) -> list[Run]:
        """Where outside rows start..stop of the canonical tensor `name` lie, as few consecutive pieces as possible."""
        if self.plain:
            return [Run(self.external[0], start, np.arange(stop - start))]
        rows = self._inside[[p.name for p in self.canonical].index(name)]
        tensor, row = rows.tensor[start:stop], rows.row[start:stop]
        order = np.lexsort((row, tensor))
        breaks = np.flatnonzero((np.diff(row[order]) != 1) | (np.diff(tensor[order]) != 0)) + 1
        return [Run(self.external[tensor[take[0]]], int(row[take[0]]), take) for take in np.split(order, breaks)]

    def apply(self, values: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Whole canonical tensors to whole external ones."""
        out = []
        for rows in self._outside:
            block = np.empty((len(rows.row), *values[0].shape[1:]), values[0].dtype)
            for n, v in enumerate(values):
                mine = rows.tensor == n
                block[mine] = v[rows.row[mine]]
            block = block.reshape(rows.shape)
            block = block.swapaxes(-1, -2) if self.transposed else block
            out.append(block + np.float32(self.added) if self.added else block)
        return out

    def inverse(self, values: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Whole external tensors to whole canonical ones."""
        flat = {n: v.reshape(-1, *v.shape[1:][-1:]) for n, v in zip(self.external, values, strict=True)}
        return [self.read(p.name, 0, p.shape[0], lambda n, a, b: flat[n][a:b]) for p in self.canonical]

    def read(self, name: str, start: int, stop: int, fetch: Fetch) -> NDArray[np.float32]:
        """Rows start..stop of a canonical tensor from the external side."""
        assert not self.added, f"{self.external}: an added constant does not come back exactly"
        runs = self.runs(name, start, stop)
        if self.transposed:
            fetch = self._columns(fetch)
        elif self.folded:
            fetch = self._elements(fetch)
        if len(runs) == 1 and (np.diff(runs[0].take) == 1).all():
            return fetch(runs[0].tensor, runs[0].start, runs[0].start + stop - start)
        return _gather(runs, stop - start, fetch)

    def _columns(self, fetch: Fetch, budget: int = 1 << 22) -> Fetch:
        shapes = self.shapes()

        def columns(name: str, start: int, stop: int) -> NDArray[np.float32]:
            rows, cols = shapes[name][-2:]
            out = np.empty((stop - start, rows), np.float32)
            step = max(1, budget // cols)
            for n in range(start // cols, (stop - 1) // cols + 1):  # matrices of a stack
                left, right = max(start, n * cols), min(stop, (n + 1) * cols)
                for a in range(0, rows, step):
                    b = min(rows, a + step)
                    block = fetch(name, n * rows + a, n * rows + b)[:, left - n * cols : right - n * cols]
                    out[left - start : right - start, a:b] = block.T
            return out

        return columns

    def _elements(self, fetch: Fetch) -> Fetch:
        shapes = self.shapes()

        def elements(name: str, start: int, stop: int) -> NDArray[np.float32]:
            n = shapes[name][-1]
            first = start // n
            return fetch(name, first, -(-stop // n)).reshape(-1)[start - first * n : stop - first * n]

        return elements


@lru_cache(maxsize=16)
def _moved(
    ops: tuple[Op, ...], shapes: tuple[tuple[int, ...], ...], outputs: int, layer: Block | None
) -> tuple[list[Rows], list[Rows]]:
    """The gathers of a rule, outwards and back. Layers alike share theirs: those of many experts are large."""
    parts = [Rows(np.full(shape[0], n), np.arange(shape[0]), shape) for n, shape in enumerate(shapes)]
    for op in ops:
        parts = op.apply(parts, layer, outputs)
    back = [Rows(np.full(shape[0], -1), np.empty(shape[0], np.intp), shape) for shape in shapes]
    for n, rows in enumerate(parts):
        for m, mine in enumerate(back):
            here = np.flatnonzero(rows.tensor == m)
            mine.tensor[rows.row[here]] = n
            mine.row[rows.row[here]] = here
    assert all((r.tensor >= 0).all() for r in back), f"{ops}: rows are lost"
    return parts, back


def _gather(runs: Sequence[Run], rows: int, fetch: Fetch, waste: int = 4) -> NDArray[np.float32]:
    """A block from several runs; runs that lie close together are read as one stretch."""
    out: NDArray[np.float32] | None = None
    n = 0
    while n < len(runs):
        m, used = n + 1, len(runs[n].take)
        while m < len(runs) and runs[m].tensor == runs[n].tensor:
            end = runs[m].start + len(runs[m].take)
            if end - runs[n].start > waste * (used + len(runs[m].take)):
                break
            used += len(runs[m].take)
            m += 1
        first = runs[n].start
        got = fetch(runs[n].tensor, first, runs[m - 1].start + len(runs[m - 1].take))
        out = np.empty((rows, *got.shape[1:]), got.dtype) if out is None else out
        for run in runs[n:m]:
            out[run.take] = got[run.start - first : run.start - first + len(run.take)]
        n = m
    assert out is not None, "no rows asked for"
    return out


class Layout:
    """A format's table bound to a spec: every parameter is claimed by exactly one rule (asserted)."""

    def __init__(self, rules: Iterable[Rule], spec: Spec) -> None:
        self.spec = spec
        self.rules = tuple(_bind(rules, spec))
        self.of = {p.name: b for b in self.rules for p in b.canonical}
        """The bound rule of each canonical name."""
        claimed = [p.name for b in self.rules for p in b.canonical]
        wanted = [p.name for p in params(spec)]
        assert len(claimed) == len(set(claimed)), f"claimed twice: {_repeated(claimed)}"
        assert set(claimed) == set(wanted), f"no rule for {sorted(set(wanted) - set(claimed))}"
        outside = [n for b in self.rules for n in b.external]
        assert len(outside) == len(set(outside)), f"written twice: {_repeated(outside)}"

    @cached_property
    def external(self) -> dict[str, tuple[int, ...]]:
        """Every external tensor and its shape."""
        return {n: s for b in self.rules for n, s in b.shapes().items()}

    def read(self, name: str, start: int, stop: int, fetch: Fetch) -> NDArray[np.float32]:
        """Rows start..stop of a canonical tensor, read from the external side by row ranges."""
        return self.of[name].read(name, start, stop, fetch)

    def runs(self, name: str, start: int, stop: int) -> list[Run]:
        """Where outside rows start..stop of a canonical tensor go."""
        return self.of[name].runs(name, start, stop)


def _bind(rules: Iterable[Rule], spec: Spec) -> Iterator[Bound]:
    known = {p.name: p for p in params(spec)}
    for rule in rules:
        layered = any("{i}" in n for n in rule.canonical)
        for i, layer in enumerate(spec.layers) if layered else ((0, None),):
            names = [n.format(i=i) for n in rule.canonical]
            present = [n for n in names if n in known]
            if not present:
                continue
            assert len(present) == len(names), f"{rule.external}: the spec has {present} and not the rest of {names}"
            outside = [m.format(i=i, e="{e}") for m in rule.external]
            outside = [m.format(e=e) for m in outside for e in (range(experts(layer)) if "{e}" in m else (0,))]
            yield Bound(tuple(known[n] for n in names), tuple(outside), rule.ops, layer)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({n for n in names if names.count(n) > 1})
