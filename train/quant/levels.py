"""What a run quantizes: the recipe in `convert`'s words, and the level that it gives each parameter.

The one door from the trainer to `convert.recipe`.
"""

from __future__ import annotations

from backends.base import Planned
from convert.recipe import Recipe, plan
from spec.config import Spec
from spec.errors import UserError
from train import config


def recipe(q: config.Quant) -> Recipe:
    """What `convert` is asked for with the same words."""
    return Recipe(q.level, q.overrides, q.bits)


def planned(q: config.Quant, spec: Spec) -> list[Planned]:
    """Every parameter with its level; none where nothing is quantized. Raises `UserError` for a recipe that the spec
    does not take."""
    if not q.on:
        return []
    try:
        return plan(spec, recipe(q))
    except UserError as e:
        raise UserError(str(e).replace("--override ", "quant.override: ").replace("--bits", "quant.bits")) from None


def levels(q: config.Quant, spec: Spec) -> dict[str, str]:
    """The level of every parameter that is rounded. Raises `UserError`."""
    return {p.name: p.level for p in planned(q, spec) if p.level != "f32"}
