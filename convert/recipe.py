"""Which tensor is stored how at a portable level. No calibration: a fixed order decides what gets int8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from backends.base import Planned
from convert.levels import CODES, GROUPS, LEVELS, fits, takes
from spec.config import Spec
from spec.errors import UserError, nearest
from spec.params import Param, params

BUDGET = 4.95
"""Bits per weight that `q4` may spend over all matrices, scales counted."""

PAYS_MOST = ("head.weight", "embed.weight", "attn.v.weight", "mlp.down.weight", "mlp.shared.down.weight",
             "attn.o.weight", "attn.k.weight")  # fmt: skip
"""`q4` upgrades these to int8 while the budget lasts: what the logits are read from, then what sums up many terms
or passes straight into the residual stream. Within a kind, outer layers come first (they are the sensitive ones)."""


@dataclass(frozen=True)
class Held:
    """What a source holds as codes and scales already."""

    levels: Mapping[str, str] = field(default_factory=dict)
    """Tensor to `q4`, `q4-g128` or `q8`."""
    wide: bool = False
    """Whether its scales are those of another program: 11 significant bits, of any sign."""


def plan(spec: Spec, level: str, held: Held | None = None) -> list[Planned]:
    """Every parameter in canonical order with its storage at a portable level.

    Vectors stay f32. Position tables and matrices whose rows are no whole groups are f16 where others are quantized.
    What the source holds at 4 bits is not upgraded to 8, which could not bring anything back.
    """
    held = held or Held()
    if level not in LEVELS:
        raise UserError(f"{level}: no portable level ({nearest(level, LEVELS)})")
    chosen = {p.name: _level(p, level) for p in params(spec)}
    if CODES.get(level) == 4:
        chosen.update(dict.fromkeys(_upgrades(spec, level, chosen, held), "q8"))
    return [
        Planned(p.name, p.shape, chosen[p.name], held.wide and kept(held.levels.get(p.name), chosen[p.name]))
        for p in params(spec)
    ]


def kept(held: str | None, level: str) -> bool:
    """Whether codes and scales go on as they are: to the same level, from 4 bits to 8, from groups of 128 to 32."""
    return held is not None and held in GROUPS and takes(level, CODES[held], GROUPS[held])


def _level(p: Param, level: str) -> str:
    if not p.matrix:
        return "f32"
    if level in GROUPS and (not fits(level, p.shape[-1]) or p.name == "positions.weight"):
        return "f16"
    return level


def _upgrades(spec: Spec, level: str, chosen: Mapping[str, str], held: Held) -> Iterator[str]:
    """Matrices that become int8, greedily in the fixed order, each only if it still fits."""
    matrices = {p.name: p.size for p in params(spec) if p.matrix}
    spent = sum(n * LEVELS[chosen[name]].stored for name, n in matrices.items())
    allowed = BUDGET * sum(matrices.values())
    for name in _order(spec):
        if chosen.get(name) != level or kept(held.levels.get(name), level):
            continue
        extra = matrices[name] * (LEVELS["q8"].stored - LEVELS[level].stored)
        if spent + extra <= allowed:
            spent += extra
            yield name


def _order(spec: Spec) -> Iterator[str]:
    layers = sorted(range(spec.depth), key=lambda i: (_rank(i, spec.depth), i))
    for kind in PAYS_MOST:
        if kind.startswith(("attn.", "mlp.")):
            yield from (f"layers.{i}.{kind}" for i in layers)
        else:
            yield kind


def _rank(i: int, depth: int) -> int:
    """0: the first and last eighth; 1: every third layer between; 2: the others (llama.cpp's mixtures do likewise)."""
    eighth = max(1, depth // 8)
    if i < eighth or i >= depth - eighth:
        return 0
    return 1 if (i - eighth) % 3 == 2 else 2


def _quantizable(p: Planned) -> bool:
    """Whether it is a matrix that levels apply to: not a vector, nor what chooses experts."""
    return len(p.shape) > 1 and not p.name.endswith((".router.weight", ".shared_gate.weight"))


def bits_per_weight(planned: Sequence[Planned], stored: Mapping[str, float] | None = None) -> float:
    """Stored bits per weight over all matrices; `stored` gives the bits of native levels."""
    bits = {name: level.stored for name, level in LEVELS.items()} | dict(stored or {})
    matrices = [p for p in planned if _quantizable(p)]
    total = sum(prod(p.shape) for p in matrices)
    return sum(prod(p.shape) * bits[p.level] for p in matrices) / total


def notes(spec: Spec, planned: Sequence[Planned], level: str) -> list[str]:
    """What a user should know about a portable plan."""
    out = []
    odd = [p for p in planned if _quantizable(p) and p.level == "f16" != level and p.name != "positions.weight"]
    if odd:
        names = ", ".join(f"{p.name} [{p.shape[0]}, {p.shape[1]}]" for p in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        out.append(f"stays f16 (width no multiple of {GROUPS.get(level, 32)}): {names}{more}")
    if CODES.get(level) == 4:
        bits = bits_per_weight(planned)
        if bits > BUDGET:
            out.append(f"{bits:.2f} bits/weight: more than {BUDGET}, because of what stays f16")
    return out
