"""Mixtures of experts of a config.json, by the row that it is written by: the inverse of backends/hf/mixture.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from backends.hf.mixture import Dense, Mixture
from convert.families.config import Config

KINDS = ("dense", "sparse")


def mixture(c: Config, m: Mixture) -> dict[str, Any]:
    """The fields of a spec's `mlp` that make it a mixture. Problems are noted on the config."""
    hidden = c.take(m.hidden, int)
    renormalise = c.take(m.renormalise, bool) if m.renormalise else True
    scale = _positive(c, m.scale) if m.scale else 1.0
    numbers = {name: _positive(c, key) for name, key in (("alpha", m.alpha), ("limit", m.limit)) if key}
    return {
        "kind": "moe", "experts": c.take(m.experts, int), "hidden": hidden, "shared": _shared(c, m, hidden), **numbers,
        "router": {
            "top_k": c.take(m.top_k, int), "score": m.score, "renormalise": renormalise, "scale": scale,
            "bias": m.bias, "correction": m.correction,
        },
    }  # fmt: skip


def _positive(c: Config, key: str) -> Any:
    value = c.number(key)
    if value is not None and value <= 0:
        c.bad(key, value, "must be positive", "correct config.json")
    return value


def _shared(c: Config, m: Mixture, hidden: int | None) -> dict[str, Any] | None:
    if m.shared == "no":
        return None
    width = c.take(m.shared_hidden, int, optional=m.shared == "optional")
    if width is not None and width < (m.shared == "required"):
        c.bad(m.shared_hidden, width, f"is no width that transformers' {c.family.name} has", "1 or more")
    if not width:
        return None
    return {"hidden": width * (hidden or 1) if m.shared_times else width, "gate": m.shared_gate}


def sparse(c: Config, m: Mixture, depth: int | None) -> list[bool]:
    """For every layer whether it is a mixture."""
    found = READERS[m.dense](c, depth or 0)
    if depth is not None and not c.problems and not any(found):
        c.bad("num_hidden_layers", depth, "leaves no layer with experts", "a dense family reads such a model")
    return found


def _first(c: Config, depth: int) -> list[bool]:
    n = c.take("first_k_dense_replace", int) or 0
    return [i >= n for i in range(depth)]


def _steps(c: Config, depth: int) -> list[bool]:
    step, dense = c.take("decoder_sparse_step", int), c.take("mlp_only_layers", list, optional=True) or []
    if step is None or step < 1:
        c.bad("decoder_sparse_step", step, "is no number of layers", "1 is usual")
        return []
    return [i not in dense and (i + 1) % step == 0 for i in range(depth)]


def _listed(c: Config, depth: int) -> list[bool]:
    kinds = c.take("mlp_layer_types", list, optional=True)
    if kinds is None:
        return _first(c, depth)
    c.taken.add("first_k_dense_replace")
    odd = sorted({str(k) for k in kinds} - set(KINDS))
    if odd or len(kinds) != depth:
        c.bad("mlp_layer_types", odd[0] if odd else f"{len(kinds)} entries", "does not describe the layers",
              f"{depth} of {' or '.join(KINDS)}")  # fmt: skip
        return []
    return [k == "sparse" for k in kinds]


def _span(c: Config, depth: int) -> list[bool]:
    first, last, every = (
        c.take(f"moe_layer_{n}", int, optional=True) for n in ("start_index", "end_index", "interval")
    )
    if first is None or last is None or every is None or every < 1:
        c.bad("moe_layer_interval", every, "is no number of layers", "1 is usual")
        return []
    last = depth - 1 if last == -1 else last
    return [first <= i <= last and (i + 1) % every == 0 for i in range(depth)]


READERS: Mapping[Dense, Callable[[Config, int], list[bool]]] = {
    "none": lambda c, depth: [True] * depth,
    "first": _first,
    "steps": _steps,
    "list": _listed,
    "span": _span,
}
"""config.json's keys for which layers are mixtures."""
