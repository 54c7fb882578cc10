"""Rotary settings of a config.json, in both layouts: `rope_theta` + `rope_scaling`, and transformers 5's
`rope_parameters`. Formulas of the defaults: transformers' modeling_rope_utils (checked against it in the tests)."""

from __future__ import annotations

import math
from typing import Any

from backends.hf.carriers import Carrier
from backends.hf.rotary import FULL, LOCAL
from convert.families.config import Config
from spec.errors import nearest
from spec.rope import longrope_attention_factor

FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        (),
        ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
         "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
}  # fmt: skip
"""Required and optional numbers of each type."""
COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
BOOLEAN = {"truncate"}
LENGTHS = {"original_max_position_embeddings"}
ALIASES = {"su": "longrope"}

Position = dict[str, Any]


def rope(c: Config, row: Carrier, context: int | None) -> Position:
    """The `position` field of a spec. Problems are noted on the config under the key that has them."""
    theta, fraction = _top(c)
    original = c.take(row.original_context or "original_max_position_embeddings", int, optional=True)
    key, given = _given(c)
    if any(isinstance(v, dict) for v in given.values()):
        c.bad(key, None, "has settings by layer type, which this family does not use", "")
        return {}
    return _position(c, row, key, given, theta, fraction, original, context)


def rope_by_window(c: Config, row: Carrier, context: int | None) -> tuple[Position, Position]:
    """`position` of layers without and with a window, in families whose scaling holds for the first kind alone."""
    theta, fraction = _top(c)
    local = c.number("rope_local_base_freq", optional=True)
    key, given = _given(c)
    if key == "rope_parameters" and given and not any(isinstance(v, dict) for v in given.values()):
        c.bad(key, None, f"has no settings by kind of layer, which {row.arch} reads alone", f"{FULL} and {LOCAL}")
    if any(isinstance(v, dict) for v in given.values()):
        out = []
        for kind, base in ((FULL, theta), (LOCAL, local)):
            inner = given.pop(kind, {}) or {}
            if not isinstance(inner, dict):
                c.bad(f"{key}.{kind}", inner, "is no mapping", "correct config.json")
                return {}, {}
            out.append(_position(c, row, f"{key}.{kind}", inner, base, fraction, None, context))
        for name, value in given.items():
            c.bad(f"{key}.{name}", value, "is an unknown kind of layer", nearest(name, (FULL, LOCAL)))
        return out[0], out[1]
    return (
        _position(c, row, key, given, theta, fraction, None, context),
        _position(c, row, key, {}, local, fraction, None, context),
    )


def _top(c: Config) -> tuple[Any, Any]:
    """Base and share of a head as config.json has them outside any object."""
    return c.number(c.family.theta, optional=True), c.number(c.family.fraction, optional=True)


def _given(c: Config) -> tuple[str, dict[str, Any]]:
    """The key and contents of the object with rotary settings."""
    new, old = c.take("rope_parameters", dict, optional=True), c.take("rope_scaling", dict, optional=True)
    if new and old and new != old:
        c.bad("rope_scaling", None, "and rope_parameters differ", "keep one of them")
    return ("rope_parameters", new) if new else ("rope_scaling", dict(old or {}))


def _position(
    c: Config,
    row: Carrier,
    key: str,
    given: dict[str, Any],
    theta: Any,
    fraction: Any,
    original: int | None,
    context: int | None,
) -> Position:
    given = {k: v for k, v in given.items() if v is not None}
    theta, fraction = given.get("rope_theta", theta), given.get("partial_rotary_factor", fraction)
    for name, value in (("rope_theta", theta), ("partial_rotary_factor", fraction)):
        if value is not None and not _positive(value):
            c.bad(f"{key}.{name}" if name in given else name, value, "is no positive number")
            return {}
    fraction = 1.0 if fraction is None else fraction
    if fraction != 1 and not row.partial:
        where = f"{key}.partial_rotary_factor" if "partial_rotary_factor" in given else c.family.fraction
        c.bad(where, fraction, f"is not used by {row.arch}, which rotates whole heads", "leave it out")
        return {}
    if original is not None and row.original_context:
        given = {**given, "original_max_position_embeddings": original}
    elif original is not None and given.get("original_max_position_embeddings", original) == original:
        plain = given.get("rope_type", given.get("type", "default")) in ("default", "linear")
        if not plain and "original_max_position_embeddings" not in given:
            c.bad("original_max_position_embeddings", original, "is read by transformers 4 here, and not by 5",
                  f"move it into {key}")  # fmt: skip
    elif original is not None:
        c.bad("original_max_position_embeddings", original, f"and {key}'s differ", f"keep that of {key}")
    scaling = _scaling(c, row, key, given, context)
    return {"kind": "rope", "theta": float(theta if theta is not None else 10000.0), "fraction": fraction,
            "scaling": scaling}  # fmt: skip


def _scaling(c: Config, row: Carrier, key: str, given: dict[str, Any], context: int | None) -> dict[str, Any] | None:
    kind = given.get("rope_type", given.get("type", "default"))
    kind = c.family.scalings.get(kind, ALIASES.get(kind, kind)) if isinstance(kind, str) else str(kind)
    if kind not in FIELDS:
        c.bad(f"{key}.rope_type", kind, "is no scaling that is read", nearest(kind, FIELDS))
        return None
    if kind != "default" and kind not in row.scaling:
        c.bad(f"{key}.rope_type", kind, f"is no scaling of {row.arch}", nearest(kind, row.scaling))
        return None
    required, optional = FIELDS[kind]
    lists = ("short_factor", "long_factor")
    g = {n: v for n, v in given.items() if n not in COMMON}
    spare = {"original_max_position_embeddings"} if kind in ("default", "linear") else set()
    for name in sorted(set(g) - set(required) - set(optional) - spare):
        c.bad(f"{key}.{name}", g[name], f"is an unknown key of {kind}", nearest(name, (*required, *optional)))
    for name in required:
        if name not in g:
            c.bad(f"{key}.{name}", None, "is missing", f"{kind} needs it")
    for name, value in g.items():
        numbers = value if name in lists and isinstance(value, list) else [value]
        if name in BOOLEAN and not isinstance(value, bool):
            c.bad(f"{key}.{name}", value, "is neither true nor false")
        elif name in LENGTHS and (type(value) is not int or value < 2):
            c.bad(f"{key}.{name}", value, "is no number of tokens")
        elif name not in BOOLEAN and not all(map(_positive, numbers)):
            c.bad(f"{key}.{name}", value, "is no positive number")
    if row.rope_by == "window" and g.get("truncate") is False:
        c.bad(f"{key}.truncate", False, f"is not read by transformers' {row.arch}", "leave it out")
    if c.problems or kind == "default" or context is None or context < 1:
        return None
    original = g.get("original_max_position_embeddings", context)
    if kind == "linear":
        return {"kind": kind, "factor": g["factor"]}
    if kind == "dynamic":  # transformers takes max_position_embeddings for the original context
        return {"kind": kind, "factor": g["factor"], "original_context": context}
    if kind == "llama3":
        return {"kind": kind, **{n: g[n] for n in required}, "original_context": original}
    ratio = g.get("factor", context / original)
    if kind == "yarn":
        factor = g.get("attention_factor", _yarn_attention(ratio, g.get("mscale"), g.get("mscale_all_dim")))
        return {
            "kind": kind, "factor": ratio, "original_context": original, "attention_factor": factor,
            "beta_fast": g.get("beta_fast") or 32, "beta_slow": g.get("beta_slow") or 1,
            "truncate": g.get("truncate", True),
        }  # fmt: skip
    factor = g.get("attention_factor", longrope_attention_factor(max(1, ratio) * original, original))
    return {"kind": kind, "short_factor": g["short_factor"], "long_factor": g["long_factor"],
            "original_context": original, "attention_factor": factor}  # fmt: skip


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _yarn_attention(factor: float, mscale: float | None, all_dim: float | None) -> float:
    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(all_dim) if mscale and all_dim else of(1.0)
