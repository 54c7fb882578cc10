"""Rotary settings in the layout that transformers 5 reads: one `rope_parameters`, or one for each kind of layer.

transformers chooses length-dependent tables by the current length and keeps what is in the cache, where the spec
chooses once a session. LongRoPE keeps both of its lists, so that a sequence is computed as a session of its own length
(our runtime pins the list for the session that was asked for). Dynamic scaling past its original context becomes the
base of sessions as long as the context: its table is nothing but that base's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from backends.carriers import layer_path
from backends.hf.carriers import Carrier
from spec.config import Attention, DynamicScaling, LongRopeScaling, Rope, Spec, YarnScaling

LOCAL, FULL = "sliding_attention", "full_attention"


def layer_types(spec: Spec) -> list[str]:
    """The kind of every layer."""
    return [FULL if b.attention.window is None else LOCAL for b in spec.layers]


def _ropes(spec: Spec, layers: Iterator[int] | range) -> list[Rope]:
    """The distinct rotations of some layers."""
    found = (spec.layers[i].attention.position for i in layers)
    return list(dict.fromkeys(p for p in found if isinstance(p, Rope)))


def _groups(spec: Spec, c: Carrier) -> dict[str, list[Rope]]:
    """Rotations by what has settings of its own."""
    everything = range(spec.depth)
    if c.rope_by != "window":
        return {"": _ropes(spec, everything)}
    kinds = layer_types(spec)
    return {kind: _ropes(spec, (i for i in everything if kinds[i] == kind)) for kind in (FULL, LOCAL)}


def refusals(spec: Spec, c: Carrier) -> Iterator[str]:
    """What the carrier cannot be told of the rotations."""
    at = f"{layer_path(spec, 0)}.attention.position"
    for kind, ropes in _groups(spec, c).items():
        shapes = {(r.fraction, r.scaling) for r in ropes} if c.rope_by == "layer" else set(ropes)
        if len(shapes) > 1:
            which = f" of {kind}" if kind else ""
            yield f"{at}: {len(shapes)} different rotations among layers{which}; transformers' {c.arch} has one"
        for r in ropes:
            if r.fraction != 1 and not c.partial:
                yield f"{at}.fraction: {r.fraction:g}, where transformers' {c.arch} rotates whole heads"
            s = r.scaling
            if s is None or (isinstance(s, DynamicScaling) and _fixed(r, spec)):
                continue
            if s.kind not in c.scaling:
                yield f"{at}.scaling.kind: {s.kind}, which transformers' {c.arch} does not compute"
            if isinstance(s, YarnScaling) and not s.truncate and c.rope_by == "window":
                yield f"{at}.scaling.truncate: false, which transformers' {c.arch} does not read"


def _fixed(r: Rope, spec: Spec) -> bool:
    """Whether a dynamic scaling is stored as the base that it comes to."""
    return isinstance(r.scaling, DynamicScaling) and r.scaling.original_context != spec.context


def session(spec: Spec, c: Carrier) -> int | None:
    """The context, where a dynamic table was fixed for sessions of that length."""
    ropes = _ropes(spec, range(spec.depth)) if c.rope != "none" else []
    grown = [
        r for r in ropes if isinstance(r.scaling, DynamicScaling) and (r.scaling.original_context or 0) < spec.context
    ]
    return spec.context if grown else None


def chosen_by_length(spec: Spec) -> int | None:
    """The length beyond which transformers takes LongRoPE's other list; none where the context does not reach it."""
    found = [
        r.scaling.original_context for r in _ropes(spec, range(spec.depth)) if isinstance(r.scaling, LongRopeScaling)
    ]
    return next((n for n in found if n < spec.context), None)


def theta(r: Rope, a: Attention, spec: Spec) -> float:
    """The base, a dynamic scaling that is fixed folded in (as `spec.rope.rope_table` does)."""
    s = r.scaling
    if not (isinstance(s, DynamicScaling) and _fixed(r, spec)):
        return r.theta
    assert s.original_context and a.head_dim
    dim = r.rotary_dim(a.head_dim)
    grown = s.factor * max(spec.context, s.original_context) / s.original_context - (s.factor - 1)
    return r.theta * grown ** (dim / (dim - 2))


def settings(spec: Spec, c: Carrier) -> dict[str, Any]:
    """Keys of config.json: `rope_parameters` and what else tells where and how layers rotate."""
    if c.rope == "none":
        return {}
    first = spec.layers[0].attention
    found = {
        kind: _parameters(ropes[0] if ropes else Rope(), first, spec, c) for kind, ropes in _groups(spec, c).items()
    }
    out: dict[str, Any] = {"rope_parameters": found.get("", found)}
    longrope = [r.scaling for r in _ropes(spec, range(spec.depth)) if isinstance(r.scaling, LongRopeScaling)]
    if c.original_context:
        out[c.original_context] = longrope[0].original_context if longrope else spec.context
    turning = [b.attention.position for b in spec.layers]
    if c.rope_by == "layer":
        out["layer_rope_theta"] = [theta(p, first, spec) if isinstance(p, Rope) else 0 for p in turning]
    if c.no_position == "list":
        out["no_rope_layers"] = [int(isinstance(p, Rope)) for p in turning]
    return out


def _parameters(r: Rope, a: Attention, spec: Spec, c: Carrier) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": theta(r, a, spec)}
    if c.partial:
        out["partial_rotary_factor"] = r.fraction
    s = r.scaling
    if s is None or _fixed(r, spec):
        return out
    fields = s.model_dump(mode="json", exclude_none=True)
    original = fields.pop("original_context", None)
    if original is not None and not isinstance(s, DynamicScaling):
        fields["original_max_position_embeddings"] = original
    if isinstance(s, LongRopeScaling):
        fields["factor"] = max(1.0, spec.context / s.original_context)
    return out | {"rope_type": fields.pop("kind"), **fields}
