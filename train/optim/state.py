"""An optimizer's state by canonical names: `layers.0.attn.q.weight/exp_avg`.

Tensors that have a parameter's rows are sharded as it is; an owner's whole ones are in that rank's dictionary alone;
counters are scalars. Loading works on any number of ranks: each asks for what it needs (`wanted`), a checkpoint fills
that in place, and `load_state` takes it over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spec.errors import UserError
from train.optim.build import Optimizer, Part
from train.optim.shares import Local, part_of


def _set(holder: Any, key: Any, t: Tensor) -> None:
    holder[key] = type(holder[key])(t.item())


@dataclass(frozen=True)
class _Leaf:
    """A number or tensor of a library's state, and how to set it."""

    value: Tensor
    put: Callable[[Tensor], object]


def _leaves(part: Part, piece: Tensor, holder: Any, path: str = "") -> Iterator[tuple[str, _Leaf]]:
    """Everything in a library's state: tensors, quantized ones in parts, Python numbers, lists of them."""
    plain = getattr(part.inner, "plain", None)
    for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        name = f"{path}{key}"
        if key in part.kind.settings or value is None or isinstance(value, str):
            continue
        if isinstance(value, Tensor):
            tensors: Mapping[str, Tensor] = plain(piece, value) if plain is not None else {"": value}
            for sub, t in tensors.items():
                yield f"{name}/{sub}" if sub else name, _Leaf(t, t.copy_)
        elif isinstance(value, bool | int | float):
            kind = torch.float64 if isinstance(value, float) else torch.int64
            yield name, _Leaf(torch.tensor(value, dtype=kind), partial(_set, holder, key))
        elif isinstance(value, list | dict):
            yield from _leaves(part, piece, value, f"{name}/")
        else:
            raise UserError(f"optimizer.kind: its state {name} is a {type(value).__name__}, which can't be saved")


def _counters(part: Part, index: int) -> dict[str, Any]:
    """What a library counts in a parameter group rather than by parameter."""
    known = {"params", "peak", *part.inner.defaults}
    return {k: v for k, v in part.inner.param_groups[index].items() if k not in known}


def _of(part: Part, index: int, share: Local) -> dict[str, list[_Leaf]]:
    """A parameter's state by path, a leaf for each piece."""
    out: dict[str, list[_Leaf]] = defaultdict(list)
    for piece in share.pieces:
        state = part.inner.state.get(piece)
        if state:
            for path, leaf in _leaves(part, piece, state):
                out[path].append(leaf)
    if out:
        group = part.inner.param_groups[index]
        for key in _counters(part, index):
            for path, leaf in _leaves(part, share.pieces[0], {key: group[key]}):
                out[f"group.{path}"].append(_Leaf(leaf.value, partial(_set, group, key)))
    return out


def _shares(optimizer: Optimizer) -> Iterator[tuple[Part, int, Local]]:
    for part in optimizer.parts:
        for index, group in enumerate(part.groups):
            yield from ((part, index, share) for share in group if share.pieces)


@torch.no_grad()
def state(optimizer: Optimizer) -> dict[str, Tensor]:
    """All that this rank has of the optimizer's state, the average of the weights included, in its own memory where it
    can be: a later step changes it. Parameters that never had a gradient have none."""
    out: dict[str, Tensor] = {}
    for part, index, share in _shares(optimizer):
        for path, leaves in _of(part, index, share).items():
            out[f"{share.name}/{path}"] = share.entry([leaf.value for leaf in leaves])
    return {**out, **(optimizer.average.entries() if optimizer.average is not None else {})}


@torch.no_grad()
def wanted(optimizer: Optimizer, available: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which of the entries `available` (name -> whole shape) this rank needs, as tensors for a checkpoint to fill.

    The optimizer's own state is spoiled: `load_state` must follow. Raises `UserError` where the entries are those of
    another optimizer.
    """
    _begin(optimizer)
    ours = state(optimizer)
    _compare({k: tuple(t.shape) for k, t in ours.items()}, {k: tuple(v) for k, v in available.items()})
    return {k: t for k, t in ours.items() if k in available}


@torch.no_grad()
def load_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over entries by name, those of `wanted` filled or any whole ones; names of other ranks' are passed over.

    The average of the weights begins anew where the checkpoint has none: load the weights first. Raises `UserError`
    where the entries are those of another optimizer.
    """
    _begin(optimizer)
    ours = state(optimizer)
    _compare({k: tuple(t.shape) for k, t in ours.items()}, {k: tuple(t.shape) for k, t in tensors.items()})
    counted: set[tuple[int, int]] = set()
    for part, index, share in _shares(optimizer):
        found = _of(part, index, share)
        if not any(f"{share.name}/{path}" in tensors for path in found):
            for piece in share.pieces:
                part.inner.state.pop(piece, None)
            continue
        counted.add((id(part), index))
        for path, leaves in found.items():
            values = share.parts(tensors[f"{share.name}/{path}"], len(leaves))
            for leaf, value in zip(leaves, values, strict=True):
                leaf.put(value)
    for part in optimizer.parts:
        for index, group in enumerate(part.inner.param_groups):
            if (id(part), index) not in counted:
                for key in _counters(part, index):
                    del group[key]
    average = optimizer.average
    if average is not None:
        if "ema/updates" in tensors:
            average.updates = int(tensors["ema/updates"])
            for name, p in average.decoder.named_parameters():
                average.values[name].copy_(part_of(tensors[f"{name}/ema"], p))
        else:
            average.updates, average.values = 0, {}


def _begin(optimizer: Optimizer) -> None:
    """Make all state that there can be."""
    if any(piece not in part.inner.state for part, _, share in _shares(optimizer) for piece in share.pieces):
        optimizer.begin()
    if optimizer.average is not None and not optimizer.average.values:
        optimizer.average.begin()


def _compare(ours: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]) -> None:
    """Each parameter has all of its entries or none, of the same shapes."""
    mine, saved = (_by_name(t) for t in (ours, theirs))
    for name in mine.keys() & saved.keys():
        shapes = saved[name]
        if shapes.keys() != mine[name].keys():
            has, needs = sorted(shapes), sorted(mine[name])
            raise UserError(
                f"{name}: the checkpoint has the optimizer state {has}, and optimizer.kind needs {needs} "
                "(go on with the optimizer that the run began with)"
            )
        for path, shape in shapes.items():
            if mine[name][path] != shape:
                raise UserError(
                    f"{name}/{path}: {shape} in the checkpoint, and this run needs {mine[name][path]} (go on with the "
                    "optimizer.options and parallel.tp that the run began with)"
                )


def _by_name(entries: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Each parameter's state, without the average."""
    out: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for key, shape in entries.items():
        name, _, path = key.partition("/")
        if path != "ema" and name != "ema":
            out[name][path] = shape
    return out
