"""The carrier of a spec: the first of mlx-lm's architectures that computes it exactly, else the bundled model.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.mlx import rotary
from backends.mlx.carriers import CARRIERS, Carrier
from backends.mlx.checks import PLAIN, moe
from backends.mlx.layout import BUNDLED, Fit, Piece, Slot, bundled, fold_text, offsets, whole, without_offsets
from backends.mlx.levels import FLOATS, NATIVE, unpacked
from spec.config import Rope, Spec
from spec.errors import UserError
from spec.levels import CODES
from spec.params import Param, params

NORMS = ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "final_norm")
"""Norms over the width."""


def choose(spec: Spec, level: str, compute: str, without: frozenset[str] = frozenset()) -> Fit:
    """How a folder carries `spec` at a level, computing in a dtype; by none of some model types."""
    rows = (c for c in CARRIERS if c.model_type not in without)
    found = next((c for c in rows if not obstacles(c, spec, level, compute)), None)
    return bundled(spec, compute) if found is None else native(found, spec)


def named(carrier: str, spec: Spec, compute: str, where: Path) -> Fit:
    """The fit with a carrier that a folder names. Raises `UserError` where that cannot be."""
    if carrier == BUNDLED:
        return bundled(spec, compute)
    for c in CARRIERS:
        if c.model_type == carrier and not _fields(c, spec):
            return native(c, spec)
    raise UserError(f"{where}: model_type {carrier} does not carry the spec in it")


def nearest(spec: Spec, level: str, compute: str) -> tuple[str, tuple[str, ...]]:
    """The architecture that lacks least, and what it lacks."""
    best = min(CARRIERS, key=lambda c: len(obstacles(c, spec, level, compute)))
    return best.model_type, obstacles(best, spec, level, compute)


def obstacles(c: Carrier, spec: Spec, level: str, compute: str) -> tuple[str, ...]:
    """What an architecture does not carry, by field."""
    return (*_fields(c, spec), *_precision(c, spec, level, compute))


def _precision(c: Carrier, spec: Spec, level: str, compute: str) -> tuple[str, ...]:
    """mlx-lm's layers promote where dtypes meet: everything must have the one that it computes in."""
    if level in FLOATS and level != compute:
        return (f"compute {compute} on {level} weights",)
    if unpacked(spec, level) and compute != "f16":
        return (f"compute {compute} beside matrices that stay f16",)
    if level in NATIVE and NATIVE[level].mode != "affine" and compute != "bf16":
        return (f"compute {compute} with {level}, whose embedding it reads in bf16",)
    if CODES.get(level) == 4 and c.fused:
        return (f"{level}, which mixes 4 and 8 bits in one joined matrix",)
    return ()


def _fields(c: Carrier, spec: Spec) -> tuple[str, ...]:
    s = spec if c.offset else without_offsets(spec)
    if len({_bare(s, i) for i in range(s.depth)}) > 1:
        return ("layers that differ",)
    return tuple(path for path, check in {**PLAIN, **c.takes}.items() if not check(s, s.layers[0]))


def _bare(s: Spec, i: int) -> str:
    """A layer without what rows judge over all layers."""
    b = s.layers[i]
    plain = b.attention.model_copy(update={"window": None, "position": Rope()})
    return b.model_copy(update={"attention": plain}).model_dump_json()


def native(c: Carrier, spec: Spec) -> Fit:
    """A fit with one of mlx-lm's architectures."""
    graph = spec if c.offset else without_offsets(spec)
    add = {} if c.offset else offsets(spec)
    folds = [] if c.offset else list(fold_text(spec))
    slots = _slots(c, graph, add)
    if any(s.neutral for s in slots):
        folds.append("gains and biases that the architecture has and the spec has not are 1 and 0")
    if any(_permuted(c, graph, i) for i in range(graph.depth)):
        folds.append("rows of q and k in the order that its rotation pairs them")
    config = {"model_type": c.model_type, **c.config(graph)}
    return Fit(c.model_type, shipped(c, graph), tuple(slots), config, tuple(folds), c.offset, c.traditional)


def shipped(c: Carrier, s: Spec) -> Spec:
    """The spec with every gain and bias that the architecture has."""
    biased = c.biases(s)
    blocks = [b.model_dump(mode="json") for b in s.layers]
    data = s.model_dump(mode="json")
    for b in blocks:
        mixture = b["mlp"]["kind"] == "moe"
        if mixture:
            b["mlp"]["router"]["bias"] = "mlp.router" in biased
        for part, fields in (
            ("attn", b["attention"]["bias"]), ("mlp.experts" if mixture else "mlp", b["mlp"]["bias"]),
        ):  # fmt: skip
            fields |= {x: f"{part}.{x}" in biased and (x != "gate" or b["mlp"]["gated"]) for x in fields}
        if b["attention"]["qk_norm"] is not None:
            b["attention"]["qk_norm"]["weight"] = True
    for n in (data["final_norm"], *(b["norm"] for b in blocks)):
        n |= {"weight": True, "bias": "norm" in biased}
    return Spec.model_validate(data | {"block": blocks[0], "pattern": blocks, "overrides": {}})


def _slots(c: Carrier, s: Spec, add: dict[str, float]) -> list[Slot]:
    have = {p.name: p for p in params(s)}
    biased = c.biases(s)
    groups: dict[str, list[tuple[int, str]]] = {}  # mlx-lm's module to layers and modules of ours
    for i in (None, *range(s.depth)):
        for module, file in c.names.items():
            if ("{i}" in file) == (i is not None) and _exists(s, i, module):
                groups.setdefault(file.format(i=i), []).append((-1 if i is None else i, module))
    out = []
    for file, members in groups.items():
        module = members[0][1]
        if module == "attn.sinks":
            ((i, _),) = members
            out.append(whole(have[f"layers.{i}.{module}"], file))
            continue
        out.append(_slot(c, s, have, add, file, members, "weight", 1 - c.offset))
        if module in biased or ("norm" in biased and module in NORMS):
            out.append(_slot(c, s, have, add, file, members, "bias", 0.0))
    return out


def _exists(s: Spec, i: int | None, module: str) -> bool:
    """Whether a spec has the module, with or without parameters."""
    if i is None:
        return not (module == "head" and s.head.tied)
    b = s.layers[i]
    normed = b.attention.qk_norm is not None
    return {
        "attn_norm": b.pre, "mlp_norm": b.pre and not b.shared_norm, "attn_post_norm": b.post, "mlp_post_norm": b.post,
        "attn.q_norm": normed, "attn.k_norm": normed, "mlp.gate": b.mlp.gated,
    }.get(module, True)  # fmt: skip


def _slot(
    c: Carrier, s: Spec, have: dict[str, Param], add: dict[str, float], file: str, members: list[tuple[int, str]],
    leaf: str, fill: float,
) -> Slot:  # fmt: skip
    pieces, neutral, at, width = [], [], 0, ()
    for i, module in members:
        name = f"{module}.{leaf}" if i < 0 else f"layers.{i}.{module}.{leaf}"
        p = have.get(name)
        rows = _rows(c, s, i, module, have)
        if p is not None:
            width = p.shape[1:]
            pieces.append(Piece(name, at + rows, add.get(name, 0.0)))
        else:
            neutral.append(Piece(name, at + rows))
        at += len(rows)
    module = members[0][1]
    experts = moe(s.layers[members[0][0]]).experts if module.startswith("mlp.experts.") else 0
    kept = "compute" if module in ("mlp.router", "mlp.shared_gate") else ""
    return Slot(f"{file}.{leaf}", (at, *width), tuple(pieces), tuple(neutral), fill, experts, kept)


def _rows(c: Carrier, s: Spec, i: int, module: str, have: dict[str, Param]) -> NDArray[np.intp]:
    """Where the rows of a module go, within it."""
    if i < 0 or module in NORMS:
        p = have.get(f"{module}.weight")
        return np.arange(p.shape[0] if p is not None else s.width)
    a = s.layers[i].attention
    assert a.kv_heads is not None
    kind, _, norm = module.removeprefix("attn.").partition("_")
    if kind in ("q", "k"):
        head = norm and a.qk_norm is not None and a.qk_norm.over == "head"
        heads = 1 if head else a.heads if kind == "q" else a.kv_heads
        return rotary.rows(a, heads, traditional=c.traditional, proportional=c.proportional)
    return np.arange(have[f"layers.{i}.{module}.weight"].shape[0])


def _permuted(c: Carrier, s: Spec, i: int) -> bool:
    a = s.layers[i].attention
    rows = rotary.rows(a, 1, traditional=c.traditional, proportional=c.proportional)
    return bool((np.diff(rows) != 1).any())
