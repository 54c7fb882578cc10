"""Mixtures of experts in llama.cpp's terms: whether a carrier computes them, and the metadata that says so."""

from __future__ import annotations

from typing import Any

from backends.carriers import Fold, distinct
from backends.gguf.carriers import Carrier, Experts
from backends.gguf.found import Found, needs
from spec.config import FeedForward, MoE, Spec

MAX_EXPERTS = 1024
"""llama.cpp's LLAMA_MAX_EXPERTS."""

GATING = {"softmax": 1, "sigmoid": 2}
"""`expert_gating_func` by score."""

NEUTRAL_WIDTH = 32
"""Inner width of a shared expert of zeros, where its width is free."""


def mixtures(spec: Spec) -> list[MoE]:
    """Those of all layers that have one."""
    return [b.mlp for b in spec.layers if isinstance(b.mlp, MoE)]


def leading_dense(spec: Spec) -> int:
    """How many layers come before the first mixture."""
    kinds = [isinstance(b.mlp, MoE) for b in spec.layers]
    return kinds.index(True) if any(kinds) else spec.depth


def experts(spec: Spec, c: Carrier) -> Found:
    """Compare the mixtures of a spec with what the carrier's graph has."""
    found, x = mixtures(spec), c.experts
    if not found:
        if x is not None and x.layers in ("all", "leading"):
            yield f"block.mlp.kind: dense, where llama.cpp's {c.arch} has mixtures"
        return
    if x is None:
        yield f"block.mlp.kind: moe, which llama.cpp's {c.arch} lacks"
        return
    yield from _layers(spec, c, x)
    for where, b in distinct(spec):
        if isinstance(b.mlp, MoE):
            yield from _router(f"{where}.mlp.router", b.mlp, c, x)
            yield from _networks(f"{where}.mlp", b.mlp, c, x)
    for name in ("experts", "hidden", "router", "shared"):
        if len({str(getattr(m, name)) for m in found}) > 1:
            yield f"block.mlp.{name}: differs from layer to layer; llama.cpp's {c.arch} has one"


def _layers(spec: Spec, c: Carrier, x: Experts) -> Found:
    kinds = [isinstance(b.mlp, MoE) for b in spec.layers]
    fits = {"any": True, "leading": all(kinds[leading_dense(spec) :])}.get(x.layers, all(kinds))
    if not fits:
        where = "behind the first dense layers" if x.layers == "leading" else "in every layer"
        yield f"layers[{kinds.index(False)}].mlp.kind: dense, where llama.cpp's {c.arch} has mixtures {where}"


def _router(at: str, m: MoE, c: Carrier, x: Experts) -> Found:
    r = m.router
    if r.score not in x.score:
        yield f"{at}.score: {r.score}, where llama.cpp's {c.arch} has {' or '.join(x.score)}"
    if x.renormalise is not None and r.renormalise != x.renormalise and not _immaterial(m):
        has = "divides" if x.renormalise else "does not divide"
        yield f"{at}.renormalise: {r.renormalise}, where llama.cpp's {c.arch} {has} weights by their sum"
    if r.scale != 1 and not x.scale:
        yield f"{at}.scale: {r.scale:g}, which llama.cpp's {c.arch} lacks"
    if m.experts > MAX_EXPERTS:
        yield f"{at.removesuffix('.router')}.experts: {m.experts}, where llama.cpp has at most {MAX_EXPERTS}"
    yield from needs(f"{at}.bias", r.bias, True, x.bias, f"{at}: zero biases are stored (exact)", c)
    zeros = f"{at}: corrections of zero are stored (exact)"
    yield from needs(f"{at}.correction", r.correction, True, x.correction, zeros, c)


def _immaterial(m: MoE) -> bool:
    """Whether dividing softmax's weights by their sum does nothing: all experts are chosen."""
    return m.router.score == "softmax" and m.router.top_k == m.experts


def _networks(at: str, m: MoE, c: Carrier, x: Experts) -> Found:
    own = {name: FeedForward.model_fields[name].default for name in ("alpha", "limit")}
    if not m.gated or m.activation != x.activation:
        mine = "gated" if m.gated else "plain"
        yield f"{at}.activation: {mine} {m.activation}, where llama.cpp's {c.arch} has gated {x.activation} experts"
    elif m.activation == "clamped_swiglu":
        for name, value in own.items():
            if getattr(m, name) != value:
                yield f"{at}.{name}: {getattr(m, name):g}, where llama.cpp's {c.arch} has {value:g}"
    biases = [n for n in ("gate", "up", "down") if getattr(m.bias, n)]
    if biases and x.expert_bias == "no":
        yield f"{at}.bias: {', '.join(biases)}, which llama.cpp's {c.arch} lacks in experts"
    if x.expert_bias == "required" and len(biases) < 3:
        yield Fold(f"{at}: zero biases of experts are stored (exact)", cost=0)
    yield from _shared(f"{at}.shared", m, c, x)


def _shared(at: str, m: MoE, c: Carrier, x: Experts) -> Found:
    s = m.shared
    if s is None:
        if x.shared_gate:  # a gate of zeros gives 0 / 0 there
            yield f"{at}: none, and llama.cpp's {c.arch} requires it"
        elif x.shared == "required":
            yield Fold(f"{at}: a shared expert of zeros is stored, {shared_width(m, x)} wide (exact)", cost=3)
    elif x.shared == "no":
        yield f"{at}: {s.hidden} wide, which llama.cpp's {c.arch} lacks"
    else:
        if s.gate != x.shared_gate:
            has = "always has one" if x.shared_gate else "lacks one"
            yield f"{at}.gate: {s.gate}, where llama.cpp's {c.arch} {has}"
        if x.shared_hidden == "multiple" and s.hidden % m.hidden:
            yield f"{at}.hidden: {s.hidden} is no multiple of an expert's {m.hidden}, as llama.cpp's {c.arch} needs"


def shared_width(m: MoE, x: Experts) -> int:
    """Inner width of the shared expert in a file; 0 without one."""
    if m.shared is not None:
        return m.shared.hidden
    if x.shared != "required":
        return 0
    return m.hidden if x.shared_hidden == "multiple" else NEUTRAL_WIDTH


def keys(spec: Spec, c: Carrier) -> dict[str, Any]:
    """Metadata of the mixtures, without the architecture's prefix."""
    found, x = mixtures(spec), c.experts
    if not found or x is None:
        return {}
    m = found[0]
    r, width = m.router, shared_width(m, x)
    out: dict[str, Any] = {"expert_count": m.experts, "expert_used_count": r.top_k}
    if x.hidden == "own":
        out["expert_feed_forward_length"] = m.hidden
    if x.layers == "leading":
        out["leading_dense_block_count"] = leading_dense(spec)
    if width and x.shared_hidden == "own":
        out["expert_shared_feed_forward_length"] = width
    if width and x.shared_hidden == "multiple":
        out["expert_shared_count"] = width // m.hidden
    if len(x.score) > 1:
        out["expert_gating_func"] = GATING[r.score]
    if x.renormalise is None:
        out["expert_weights_norm"] = r.renormalise
    if x.scale:
        out["expert_weights_scale"] = r.scale
    return out


def floored(spec: Spec) -> bool:
    """Whether the sum of weights can fall under the 2^-14 that llama.cpp divides by at least."""
    return any(m.router.renormalise and (m.router.score == "sigmoid" or m.router.correction) for m in mixtures(spec))
