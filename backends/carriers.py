"""What backends share whose runtimes own their graphs: a spec is carried by the architecture whose code computes it.

Each has a table of carriers and a `Fit` of a spec to a carrier; here is how one is chosen, and what a refusal says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from spec.config import Block, Spec


@dataclass(frozen=True)
class Fold:
    """A rewrite that leaves the function as it is. `cost` ranks carriers."""

    text: str
    cost: int = 1


class Fit(Protocol):
    """How a carrier suits a spec; it carries it if `refusals` is empty."""

    @property
    def carrier(self) -> Any:
        """A row of the backend's table; `arch` is its name."""
        ...

    @property
    def refusals(self) -> tuple[str, ...]:
        """Each begins with a field's path and a colon."""
        ...

    @property
    def cost(self) -> int: ...


F = TypeVar("F", bound=Fit)


class ByHash:
    """A spec as a cache key: two that compute the same function are one."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def __hash__(self) -> int:
        return hash(self.spec.hash)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByHash) and other.spec.hash == self.spec.hash


def best(fits: Iterable[F]) -> F:
    """The fit with the fewest rewrites, or, where none carries the spec, the one that comes nearest."""
    return min(fits, key=lambda f: (len(f.refusals), f.cost))


def layer_path(spec: Spec, i: int) -> str:
    """The path of layer i: the block's where all are alike."""
    return "block" if len(set(map(id, spec.layers))) == 1 else f"layers[{i}]"


def distinct(spec: Spec) -> Iterator[tuple[str, Block]]:
    """Each different layer once, with its path."""
    seen: set[int] = set()
    for i, b in enumerate(spec.layers):
        if id(b) not in seen:
            seen.add(id(b))
            yield layer_path(spec, i), b


SHOWN = 3
"""Fields that an alternative's refusals name."""


def explained(fit: Fit, fits: Sequence[Fit], runtime: str) -> list[str]:
    """A fit's refusals, a field refused in several layers once, each with the carrier that has this field and what it
    would refuse instead. fits: the spec's to every carrier. runtime: whose architectures they are."""
    once = {_field(_path(r)): r for r in reversed(fit.refusals)}  # the first of several layers
    return [_with_alternative(r, fits, runtime) for r in reversed(once.values())]


def _path(refusal: str) -> str:
    return refusal.split(":", 1)[0]


def _field(path: str) -> str:
    """A refusal's path without the layer, to compare carriers by."""
    return path.split("]", 1)[-1].removeprefix("block").strip(".")


def _with_alternative(refusal: str, fits: Sequence[Fit], runtime: str) -> str:
    field = _field(_path(refusal))
    others = [f for f in fits if field not in {_field(_path(r)) for r in f.refusals}]
    if not others:
        return f"{refusal} (no {runtime} architecture has it: change this field)"
    other = min(others, key=lambda f: len(f.refusals))
    paths = list({_field(_path(r)): _path(r) for r in reversed(other.refusals)}.values())
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return f"{refusal} (nearest: {other.carrier.arch} has it, but not this {', '.join(paths[:SHOWN])}{more})"
