"""Which backends and precision levels carry a spec: every backend's `support`, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backends import REGISTRY, get, has, part
from backends.base import PORTABLE, Support
from spec.config import Spec
from spec.errors import UserError, nearest


@dataclass(frozen=True)
class Target:
    """Levels of one backend that are carried, or refused, in the same way."""

    backend: str
    levels: tuple[str, ...]
    carrier: str
    folds: tuple[str, ...]
    refusals: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether it is carried."""
        return not self.refusals

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with `ok`."""
        return {**asdict(self), "ok": self.ok}


def targets(spec: Spec, backends: Sequence[str] = (), levels: Sequence[str] = ()) -> list[Target]:
    """One line for each backend and distinct answer, in the registry's order; all backends and levels by default.

    Raises `UserError` for a backend that is not there or a level that none of the backends asked for knows.
    """
    chosen = [get(name) for name in backends] if backends else [b for b in REGISTRY if has(b, "support")]
    known = {b.name: _levels(part(b, "support")) for b in chosen}
    unknown = [level for level in levels if not any(level in ls for ls in known.values())]
    if unknown:
        everything = sorted({level for ls in known.values() for level in ls})
        raise UserError(f"{unknown[0]}: no such precision level ({nearest(unknown[0], everything)})")
    out: list[Target] = []
    for b in chosen:
        answers: dict[tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]], list[str]] = {}
        for level in known[b.name]:
            if not levels or level in levels:
                s: Support = part(b, "support").support(spec, level)
                answers.setdefault((s.carrier, s.folds, s.refusals, s.notes), []).append(level)
        out += [Target(b.name, tuple(ls), *answer) for answer, ls in answers.items()]
    return out


def _levels(support: Any) -> tuple[str, ...]:
    return support.levels() if hasattr(support, "levels") else PORTABLE
