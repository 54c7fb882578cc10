"""What a run will quantize, said and refused before anything is built."""

from __future__ import annotations

from collections import Counter

from convert.levels import GROUPS, fits
from convert.recipe import bits_per_weight, notes
from spec.config import Spec
from spec.errors import UserError
from spec.params import params
from train import config, estimate
from train.parallel import Degrees
from train.quant.levels import planned, recipe


def describe(c: config.TrainConfig, spec: Spec, d: Degrees) -> str:
    """What is quantized, for people; empty where nothing is.

    Raises `UserError` for a recipe that the spec does not take, and for groups that ranks would have to share.
    """
    q = c.quant
    if not q.on:
        return ""
    found, own = planned(q, spec), {p.name: p for p in params(spec)}
    counts = Counter(p.level for p in found if p.level in GROUPS)
    if not counts:
        raise UserError(f"quant: {q.level} quantizes no matrix of {spec.name}, whose widths are no whole groups")
    for p in found:
        at = estimate.placement(own[p.name], d)
        if p.level in counts and at.columns and not fits(p.level, p.shape[-1] // at.divided):
            raise UserError(
                f"quant: {p.level} has a scale for {GROUPS[p.level]} weights of a row, and parallel.tp={d.tp} cuts the "
                f"{p.shape[-1]} columns of {p.name} into parts of {p.shape[-1] // at.divided} "
                "(a smaller parallel.tp, or a width whose parts are whole groups)"
            )
    begin = f"after {c.rounds_from} steps in full precision" if c.rounds_from else "from the first step"
    matrices = " and ".join(f"{n} matrices at {level}" for level, n in counts.items())
    bits = f"{bits_per_weight(found):.2f} bits/weight"
    return "; ".join([f"{q.level} {begin}: {matrices}, {bits}", *notes(spec, found, recipe(q))])
