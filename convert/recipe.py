"""Which tensor is stored how: a level, globs that override it, and a budget that int8 is spent in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from backends.base import Planned
from convert import budget
from convert.budget import BUDGET
from convert.levels import CODES, GROUPS, LEVELS, fits, takes
from spec.config import Spec
from spec.errors import UserError, nearest
from spec.params import Param, params

__all__ = ["BUDGET", "Held", "Native", "Recipe", "bits_per_weight", "kept", "notes", "plan"]

Gains = Mapping[str, float]
"""Expected KL divergence that int8 instead of the recipe's level saves, by tensor."""


@dataclass(frozen=True)
class Recipe:
    """What a user asks for."""

    level: str
    """A portable level, or one of the target's own."""
    overrides: tuple[tuple[str, str], ...] = ()
    """(glob over canonical names, with or without `.weight`; level): the last that matches a matrix holds."""
    bits: float | None = None
    """Bits per weight over all matrices, scales counted, that are spent instead of 4.95."""
    size: int | None = None
    """Bytes of the largest artifact that are spent instead."""

    @property
    def plain(self) -> bool:
        """Whether it is a level and nothing else."""
        return self == Recipe(self.level)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, what is not said left out: as a recipe file has it."""
        given = {"level": self.level, "overrides": dict(self.overrides), "bits": self.bits, "size": self.size}
        return {k: v for k, v in given.items() if v}


@dataclass(frozen=True)
class Held:
    """What a source holds as codes and scales already."""

    levels: Mapping[str, str] = field(default_factory=dict)
    """Tensor to `q4`, `q4-g128` or `q8`."""
    wide: bool = False
    """Whether its scales are those of another program: 11 significant bits, of any sign."""
    recipe: Recipe | None = None
    """What a checkpoint was trained for, through these levels' grid."""


@dataclass(frozen=True)
class Native:
    """A target's own types."""

    target: str
    levels: Sequence[str]
    types: Callable[[str], Mapping[str, str]]
    """What a level makes of every tensor."""
    bits: Callable[[str], float]
    """Stored bits per weight of a type."""


def plan(
    spec: Spec,
    recipe: Recipe | str,
    held: Held | None = None,
    gains: Gains | None = None,
    native: Native | None = None,
    sized: Callable[[Sequence[Planned]], int] | None = None,
) -> list[Planned]:
    """Every parameter in canonical order with its storage.

    Vectors stay f32. Position tables and matrices whose rows are no whole groups are f16 where others are quantized.
    At 4 bits, matrices that no override names become int8 while the budget lasts: in order of `gains`, where they were
    measured, else in a fixed order. What the source holds at 4 bits is not among them, as int8 could not bring anything
    back; and what a checkpoint was trained for stays as it is. native: the types of the one target. sized: bytes of the
    largest artifact of a plan, which a recipe with a size needs.

    Raises `UserError` for a level that does not exist, an override that changes nothing, and a budget out of reach.
    """
    asked, held = Recipe(recipe) if isinstance(recipe, str) else recipe, held or Held()
    chosen, own = _base(spec, asked.level, native), trained(asked, held)
    if own is not None:
        chosen |= _overridden(spec, own.overrides, native) | dict(held.levels)
    fixed = _overridden(spec, asked.overrides, native)
    chosen |= fixed

    def planned(upgraded: budget.Upgrades = ()) -> list[Planned]:
        levels = chosen | dict.fromkeys(upgraded, "q8")
        return [
            Planned(p.name, p.shape, levels[p.name], held.wide and kept(held.levels.get(p.name), levels[p.name]))
            for p in params(spec)
        ]

    if own is not None:
        return planned()
    if CODES.get(asked.level) != 4:
        for option, value in (("bits", asked.bits), ("size", asked.size)):
            if value is not None:
                raise UserError(f"--{option}: a budget is spent on int8 beside 4 bits, and {asked.level} has one width "
                                "for all (use --quant q4 or q4-g128)")  # fmt: skip
        return planned()
    free = [n for n, level in chosen.items() if level == asked.level and n not in fixed]
    free = [n for n in free if not kept(held.levels.get(n), asked.level)]
    return planned(_upgraded(spec, asked, chosen, free, gains, native, sized and (lambda u: sized(planned(u)))))


def trained(asked: Recipe, held: Held) -> Recipe | None:
    """What the checkpoint was trained for, where that is what is asked for, but for overrides."""
    own = held.recipe
    if own is None or own.level != asked.level:
        return None
    return own if (asked.bits, asked.size) in ((None, None), (own.bits, own.size)) else None


def _upgraded(
    spec: Spec,
    asked: Recipe,
    chosen: Mapping[str, str],
    free: Sequence[str],
    gains: Gains | None,
    native: Native | None,
    sized: Callable[[budget.Upgrades], int] | None,
) -> budget.Upgrades:
    """Which of the free matrices become int8."""
    matrices = {p.name: p.size for p in params(spec) if p.matrix}
    costs = {n: matrices[n] * (LEVELS["q8"].stored - LEVELS[asked.level].stored) for n in free}
    names = budget.order(spec, free, every=gains is not None or asked.bits is not None or asked.size is not None)
    if gains is not None:
        names = budget.by_gain(names, gains, costs)
    smaller = "--quant q4-g128 takes less" if asked.level == "q4" else "that is all of it at 4 bits"
    hint = "fewer or smaller overrides take less" if asked.overrides else smaller
    if asked.size is not None:
        if asked.bits is not None:
            raise UserError("--bits and --size: two budgets (give one)")
        assert sized is not None, "who asks for a size can tell that of a plan"
        return budget.to_size(asked.size, sized, names, costs, hint)
    spent, total = (
        sum(n * _stored(chosen[name], native and native.bits) for name, n in matrices.items()),
        sum(matrices.values()),
    )
    if asked.bits is not None:
        return budget.to_bits(asked.bits, spent, total, names, costs, hint)
    return budget.fill(names, costs, BUDGET * total - spent)


def kept(held: str | None, level: str) -> bool:
    """Whether codes and scales go on as they are: to the same level, from 4 bits to 8, from groups of 128 to 32."""
    return held is not None and held in GROUPS and takes(level, CODES[held], GROUPS[held])


def _base(spec: Spec, level: str, native: Native | None) -> dict[str, str]:
    """Every parameter at one level."""
    if level in LEVELS:
        return {p.name: _level(p, level) for p in params(spec)}
    if native is None or level not in native.levels:
        raise UserError(f"{level}: no portable level ({nearest(level, LEVELS)})")
    types = native.types(level)
    return {p.name: types[p.name] for p in params(spec)}


def _level(p: Param, level: str) -> str:
    if not p.matrix:
        return "f32"
    if level in GROUPS and (not fits(level, p.shape[-1]) or p.name == "positions.weight"):
        return "f16"
    return level


def _overridden(spec: Spec, overrides: Sequence[tuple[str, str]], native: Native | None) -> dict[str, str]:
    """The matrices that overrides name, with their levels. Raises `UserError`, a line for each override that does
    nothing."""
    out: dict[str, str] = {}
    problems = []
    for glob, level in overrides:
        try:
            out |= _override(spec, glob, level, native)
        except UserError as e:
            problems.append(f"--override {glob}={level}: {e}")
    if problems:
        raise UserError("\n".join(problems))
    return out


def _override(spec: Spec, glob: str, level: str, native: Native | None) -> dict[str, str]:
    known = (*LEVELS, *(native.levels if native else ()))
    if level not in known:
        raise UserError(f"no such level ({nearest(level, known)})")
    named = _matching(spec, glob)
    matrices = [p for p in named if p.matrix]
    if not named:
        if spec.head.tied and fnmatchcase("head", glob.removesuffix(".weight")):
            raise UserError(f"the head is tied to the embedding (use embed={level})")
        raise UserError(f"matches no tensor ({nearest(glob, _kinds(spec))})")
    if not matrices:
        what = "a router" if any(p.role == "router" for p in named) else "a vector"
        raise UserError(f"{named[0].name} is {what}, which stays f32 at every level ({nearest(glob, _kinds(spec))})")
    types = native.types(level) if native is not None and level not in LEVELS else None
    if types is not None:
        if all(types[p.name] == "f16" for p in matrices):
            raise UserError(f"{matrices[0].name}: stays f16 at {level} (f16, bf16, f32 and the portable q8 hold it)")
        return {p.name: types[p.name] for p in matrices}
    able = [p for p in matrices if _level(p, level) == level]
    if not able:
        p = matrices[0]
        why = (f"{p.shape[-1]} columns are no multiple of {GROUPS[level]}" if not fits(level, p.shape[-1])
               else "positions are never quantized")  # fmt: skip
        raise UserError(f"{p.name}: {why} (f16, bf16 and f32 hold it)")
    return {p.name: _level(p, level) for p in matrices}


def _matching(spec: Spec, glob: str) -> list[Param]:
    return [p for p in params(spec) if fnmatchcase(p.name, glob) or fnmatchcase(_short(p.name), glob)]


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _kinds(spec: Spec) -> list[str]:
    """What globs can name: every matrix once, layers as a star."""
    found = (_short(p.name).split(".") for p in params(spec) if p.matrix)
    return list(dict.fromkeys(".".join("*" if part.isdecimal() else part for part in parts) for parts in found))


def _quantizable(p: Planned) -> bool:
    """Whether it is a matrix that levels apply to: not a vector, nor what chooses experts."""
    return len(p.shape) > 1 and not p.name.endswith((".router.weight", ".shared_gate.weight"))


def _stored(level: str, bits: Callable[[str], float] | None) -> float:
    if level in LEVELS:
        return LEVELS[level].stored
    assert bits is not None, f"{level} is no portable level"
    return bits(level)


def bits_per_weight(planned: Sequence[Planned], bits: Callable[[str], float] | None = None) -> float:
    """Stored bits per weight over all matrices; `bits` gives those of a target's own types."""
    matrices = [p for p in planned if _quantizable(p)]
    return sum(prod(p.shape) * _stored(p.level, bits) for p in matrices) / sum(prod(p.shape) for p in matrices)


def notes(
    spec: Spec,
    planned: Sequence[Planned],
    recipe: Recipe | str,
    bits: Callable[[str], float] | None = None,
    held: Held | None = None,
) -> Iterator[str]:
    """What a user should know about a plan."""
    asked = Recipe(recipe) if isinstance(recipe, str) else recipe
    if held is not None and held.recipe is not None and trained(asked, held) is None:
        yield f"the checkpoint was trained for {held.recipe.level}: at {asked.level} its weights are rounded anew"
    if asked.level not in LEVELS:
        return
    wanted = {p.name: asked.level for p in params(spec)}
    for glob, level in asked.overrides:
        wanted |= {p.name: level for p in _matching(spec, glob)}
    odd = [p for p in planned if _quantizable(p) and p.level == "f16" and p.name != "positions.weight"]
    odd = [p for p in odd if wanted[p.name] in GROUPS]
    if odd:
        names = ", ".join(f"{p.name} [{p.shape[0]}, {p.shape[1]}]" for p in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        yield f"stays f16 (width no multiple of {GROUPS[wanted[odd[0].name]]}): {names}{more}"
    if CODES.get(asked.level) == 4 and asked.bits is None and asked.size is None:
        spent = bits_per_weight(planned, bits)
        if spent > BUDGET:
            why = "the overrides" if asked.overrides else "what stays f16"
            yield f"{spent:.2f} bits/weight: more than {BUDGET}, because of {why}"
