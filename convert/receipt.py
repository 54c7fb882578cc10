"""What goes into an artifact about itself: what it was made from, how, and what was measured."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import backends
from backends.base import Backend, Planned, Support
from convert import calibrated
from convert.levels import LEVELS
from convert.recipe import Recipe
from convert.sources import Source
from convert.sources.base import weights_hash

if TYPE_CHECKING:
    from convert.verify import Report

FORMAT = 1


def receipt(
    source: Source,
    backend: Backend,
    support: Support,
    recipe: Recipe,
    options: Mapping[str, str],
    planned: Sequence[Planned],
    source_hashes: Mapping[str, str],
    hashes: Mapping[str, str],
    own: Mapping[str, str],
) -> dict[str, Any]:
    """The receipt of a conversion. `hashes` are the `ContentHash`es of what was stored, for portable levels; `own` are
    those of bytes in a backend's own types, where it takes some.

    Nothing in it depends on when or where it was made, so equal conversions give equal files.
    """
    known = {**{p.name: own[p.name] for p in planned if p.level not in LEVELS and p.name in own}, **hashes}
    stored = {p.name: [p.level, known[p.name]] if p.name in known else [p.level] for p in planned}
    return {
        "format": FORMAT,
        "spec_hash": source.spec.hash,
        "source": {
            "name": source.name,
            **(source.origin or {}),
            "hash": weights_hash((n, source_hashes[n]) for n in source.names()),
            "dtypes": source.dtypes(),
            **({"adapters": list(source.adapters)} if source.adapters else {}),
        },
        "backend": backend.name,
        "carrier": support.carrier,
        "folds": list(support.folds),
        "level": recipe.level,
        **({} if recipe.plain else {"recipe": recipe.to_dict()}),
        **({} if source.rounding is None else {"rounding": calibrated.told(source.rounding)}),
        **({"imatrix": dict(source.importance.record)} if source.importance and source.importance.record else {}),
        "options": {k: v for k, v in options.items() if v},
        "levels": dict(sorted(Counter(p.level for p in planned).items())),
        "weights_hash": weights_hash((n, hashes[n]) for n in source.names()) if len(hashes) == len(stored) else None,
        "tensors": stored,
        "versions": versions(backend),
    }


def versions(backend: Backend) -> dict[str, str]:
    """Versions of everything that had a hand in it."""
    own = Backend("allotrope", "", "", "", packages=("allotrope", "numpy"))
    return {"python": platform.python_version(), **backends.versions(own), **backends.versions(backend)}


def parity(report: Report | None) -> dict[str, Any]:
    """What was measured, short enough for the metadata: status, value and gate of each check."""
    if report is None:
        return {"verified": False}
    checks = {
        c.name: {"status": str(c.status), **({"measured": c.measured} if c.measured is not None else {}),
                 **({"gate": c.gate} if c.gate is not None else {})}
        for c in report.checks
    }  # fmt: skip
    return {"verified": True, "tokens": report.tokens, "checks": checks}
