"""The spec that an artifact computes: the source's, with every part that its carrier always has switched on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backends.hf.carriers import Carrier
from spec.config import Norm, Spec
from spec.params import params

NO_SINK = -32768.0
"""A sink that takes no part: exp of it is zero beside any score, and every float format holds it."""


@dataclass(frozen=True)
class Origin:
    """Where a stored tensor's values come from: a tensor of the source plus a constant, or a constant alone."""

    name: str | None
    add: float = 0.0

    @property
    def fill(self) -> float:
        """The constant of a tensor that the source lacks."""
        return self.add


def ship(spec: Spec, c: Carrier) -> Spec:
    """`spec` in the carrier's own terms: the same function of weights that `origins` describes."""
    data: dict[str, Any] = spec.model_dump(mode="json")
    blocks = [b.model_dump(mode="json") for b in spec.layers]
    on = _switched(spec, c)
    for b in blocks:
        _norm(b["norm"], c)
        bias, mlp = b["attention"]["bias"], b["mlp"]["bias"]
        for part in on - {"head"}:
            if part in bias:
                bias[part] = True
            elif part != "gate" or b["mlp"]["gated"]:
                mlp[part] = True
        if b["attention"]["qk_norm"] is not None:
            b["attention"]["qk_norm"] |= {"weight": True, "bias": c.qk_bias, "offset": c.offset}
        b["attention"]["sinks"] = c.sinks == "required"
        b["shared_norm"] = b["shared_norm"] and "shared" in c.flow
        if c.mixture is not None and b["mlp"]["kind"] == "moe":
            b["mlp"]["router"] |= {"bias": c.mixture.bias, "correction": c.mixture.correction}
    for n in (data["final_norm"], data["embedding"]["norm"]):
        if n is not None:
            _norm(n, c)
    data["head"]["bias"] = "head" in on
    return Spec.model_validate(data | {"block": blocks[0], "pattern": blocks, "overrides": {}})


def _norm(n: dict[str, Any], c: Carrier) -> None:
    n |= {"weight": c.norm_weight, "bias": c.norm_bias, "offset": c.offset if c.norm_weight else 0.0}


def _switched(spec: Spec, c: Carrier) -> set[str]:
    """Parts that have a bias in the carrier."""
    has = {"head"} if spec.head.bias else set()
    for b in spec.layers:
        has |= {n for n in ("q", "k", "v", "o") if getattr(b.attention.bias, n)}
        has |= {n for n in ("gate", "up", "down") if getattr(b.mlp.bias, n)}
    return {p for key, parts in c.biases for p in parts.split() if not key or has & set(parts.split())}


def origins(source: Spec, shipped: Spec) -> dict[str, Origin]:
    """For every tensor of the shipped spec, where its values come from."""
    known = {p.name for p in params(source)}
    before, after = offsets(source), offsets(shipped)
    out: dict[str, Origin] = {}
    for p in params(shipped):
        norm = p.name.removesuffix(".weight")
        gain = after.get(norm, 0.0) if p.role == "gain" else 0.0
        twin = p.name.replace(".mlp_norm.", ".attn_norm.")  # a norm that both branches shared
        if p.name in known or twin in known:
            name = p.name if p.name in known else twin
            own = before.get(name.removesuffix(".weight"), 0.0) if p.role == "gain" else 0.0
            out[p.name] = Origin(name, own - gain)
        else:
            out[p.name] = Origin(None, {"gain": 1.0 - gain, "sinks": NO_SINK}.get(p.role, 0.0))
    return out


def offsets(spec: Spec) -> dict[str, float]:
    """The offset of every norm's gain, by canonical module."""
    out: dict[str, float] = {}

    def put(name: str, n: Norm | None) -> None:
        if n is not None:
            out[name] = n.offset

    put("final_norm", spec.final_norm)
    put("embed_norm", spec.embedding.norm)
    for i, b in enumerate(spec.layers):
        for name in ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"):
            put(f"layers.{i}.{name}", b.norm)
        for name in ("q_norm", "k_norm"):
            put(f"layers.{i}.attn.{name}", b.attention.qk_norm)
    return out
