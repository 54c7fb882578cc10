"""Routers and rounding: which tokens' experts are certain, and which a runtime's rounding may turn.

A router's choice is a step. Where the last expert chosen and the first one left out are nearly equal, rounding decides,
and either choice is right; the token's own residual stream then jumps by far more than rounding, and later tokens see
it through attention. So controls take the reference's experts, and results are compared where experts are certain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.numpy.ops import largest
from spec.config import MoE, Spec

Array = NDArray[Any]

MARGIN = 8.0
"""A choice is certain if the scores on its two sides lie further apart than this many times what rounding moved any
score of the layer by in the control."""


class Scores(dict[str, Array]):
    """Taps that keep nothing but the routers' scores."""

    def __setitem__(self, name: str, value: Array) -> None:
        if name.endswith(".mlp.scores"):
            super().__setitem__(name, value)


def mixtures(spec: Spec) -> dict[str, MoE]:
    """The mixtures of a spec by their layer's scope (`L3.`)."""
    return {f"L{i}.": b.mlp for i, b in enumerate(spec.layers) if isinstance(b.mlp, MoE)}


def chosen(spec: Spec, scores: Mapping[str, Array]) -> dict[str, Array]:
    """The experts [B, T, k] that these scores choose, as `NumpyOps.forced` takes them."""
    return {scope: largest(scores[f"{scope}mlp.scores"], m.router.top_k) for scope, m in mixtures(spec).items()}


def certain(spec: Spec, exact: Mapping[str, Array], rounded: Mapping[str, Array]) -> NDArray[np.bool_]:
    """[T] whether a token's experts are certain in every layer. Scores are [B, T, E]: those of the reference, whose
    first batch row counts, and those of controls that took its experts."""
    out: NDArray[np.bool_] | None = None
    for scope, m in mixtures(spec).items():
        name, k = f"{scope}mlp.scores", m.router.top_k
        s = exact[name][:1]
        here = np.ones(s.shape[1], bool)
        if k < m.experts:
            noise = np.abs(rounded[name] - s).max()
            ordered = -np.sort(-s[0], -1)
            here = ordered[:, k - 1] - ordered[:, k] > MARGIN * noise
        out = here if out is None else out & here
    return np.ones(0, bool) if out is None else out


def certain_prefix(spec: Spec, exact: Mapping[str, Array], rounded: Mapping[str, Array], tokens: int) -> int:
    """How many of the `tokens` come before the first whose experts are not certain."""
    sure = certain(spec, exact, rounded)
    return tokens if sure.all() else int(sure.argmin())
