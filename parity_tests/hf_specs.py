"""For each transformers architecture of the table, random specs that use what its code has; and folders of weights."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Floats, Tokenizer
from backends.hf.build import writer_for
from backends.hf.carriers import ACTIVATIONS, Carrier
from backends.hf.fit import Fit
from backends.hf.mixture import Mixture
from convert.recipe import plan
from convert.stream import rounded
from spec import Spec, parse

CARRIED = {
    "llama": "llama", "tied": "llama", "mha": "llama", "mqa": "llama", "odd_heads": "mistral",
    "head_dim_free": "mistral", "uneven_width": "llama", "qkv_bias": "qwen2", "all_bias": "llama",
    "rope_theta": "llama", "rope_partial": "phi3", "rope_linear": "llama", "rope_dynamic": "llama",
    "rope_llama3": "llama", "rope_yarn": "llama", "rope_longrope": "llama", "rope_longrope_short": "llama",
    "local_theta": "granite_swa", "nope_per_layer": "smollm3", "rms_offset": "llama", "rms_no_weight": "llama",
    "layernorm": "stablelm", "layernorm_bias": "stablelm", "layernorm_no_weight": "olmo", "norm_sandwich": "glm4",
    "attn_scale": "granite", "window": "mistral", "window_pattern": "ministral", "sinks": "granite_swa",
    "mlp_plain": "arcee", "mlp_plain_bias": "arcee", "gelu": "llama", "gelu_tanh": "llama", "quick_gelu": "llama",
    "relu2": "arcee", "embed_scale": "granite", "residual_scale": "granite", "logit_scale": "granite", "gpt2": "gpt2",
    "olmo2": "olmo2", "neox": "gpt_neox", "moe": "mixtral", "moe_shared_gate": "qwen2_moe", "moe_sinks": "gpt_oss",
}  # fmt: skip
"""Features that transformers computes, and the architecture that does."""


def spec_for(c: Carrier, seed: int, width: int = 64) -> Spec:
    """A spec that carrier `c` computes, with a random choice of what is optional there. width: a multiple of 32."""
    rng = random.Random(f"{c.arch}-{seed}")

    def some(allowed: bool = True) -> bool:
        return allowed and rng.random() < 0.5

    n = width // 16
    heads, kv, head_dim = rng.choice([(n, n // 2, 16), (n, n, 16), (n, 1, 16), (n // 2, n // 2, 32)])
    if not c.gqa:
        kv = heads
    if c.mqa:
        kv = 1
    if not c.square and some():
        head_dim = 24
    if not c.square and not c.divisible and some():
        heads, kv, head_dim = 6, 3, 12
    weight = c.norm_weight and (rng.random() < 0.8 or c.arch in ("qwen3", "gemma3_text"))
    norm = {"kind": c.norm, "eps": c.eps or rng.choice([1e-5, 1e-3]), "bias": c.norm_bias and some(), "weight": weight,
            "offset": c.offset if weight else 0.0}  # fmt: skip
    on = {part for key, parts in c.biases if not key or some() for part in parts.split() if key or some()}
    rope, pattern = _positions(c, rng, head_dim)
    attention: dict[str, Any] = {
        "heads": heads, "kv_heads": kv, "head_dim": head_dim, "position": rope,
        "bias": {n: n in on for n in "qkvo"},
        "scale": {"": None, "value": rng.choice([None, 0.3]), "inverse_square": rng.choice([None, 11**-0.5])}[c.scale],
        "softcap": 3.0 if some(bool(c.softcap)) else None, "clip": 1.0 if some(bool(c.clip)) else None,
        "sinks": c.sinks == "required" and some(),
        "window": 7 if some(c.window == "all") else None,
    }  # fmt: skip
    if c.qk_norm == "required" or some(c.qk_norm == "optional"):
        attention["qk_norm"] = {"kind": c.qk_kind, "over": c.qk_over, "eps": norm["eps"], "bias": c.qk_bias and some(),
                                "offset": c.offset}  # fmt: skip
    flow = rng.choice(list(c.flow))
    activation = c.activation or rng.choice([a for a in ACTIVATIONS if a not in c.lacks])
    hidden = c.hidden_times * width or 96
    mlp = {"hidden": hidden, "gated": c.gated, "activation": activation,
           "bias": {n: n in on for n in ("gate", "up", "down")}}  # fmt: skip
    return parse({
        "name": f"{c.arch}-{seed}", "vocab_size": 97, "width": width, "depth": 4, "context": 64,
        "embedding": {
            "scale": width**0.5 if c.embed_scale == "sqrt_width" else 3.0 if some(bool(c.embed_scale)) else None,
            "positions": None if c.positions is None else {"offset": c.positions},
            "norm": norm if c.embed_norm else None,
        },
        "block": {
            "attention": attention, "norm": norm, "placement": c.placement,
            "parallel": flow != "sequential", "shared_norm": flow == "shared",
            "residual_scale": 0.4 if some(bool(c.residual_scale)) else 1.0,
            "mlp": mlp if c.mixture is None else {**mlp, **_mixture(c.mixture, rng)},
        },
        "pattern": pattern,
        "overrides": {} if c.mixture is None else _dense(c.mixture, mlp, rng),
        "final_norm": norm,
        "head": {
            "tied": some(), "bias": "head" in on, "scale": 0.3 if some(bool(c.logit_scale)) else None,
            "softcap": 5.0 if some(bool(c.logit_softcap)) else None,
        },
    })  # fmt: skip


def _mixture(m: Mixture, rng: random.Random) -> dict[str, Any]:
    """The fields of a mixture: experts of one and of several groups, some chosen alone."""
    experts, top_k = rng.choice([(5, 2), (3, 1), (4, 3)])
    hidden = rng.choice([32, 64, 20])
    shared = m.shared == "required" or (m.shared == "optional" and rng.random() < 0.5)
    return {
        "kind": "moe", "experts": experts, "hidden": hidden,
        "shared": {"hidden": hidden * 2 if m.shared_times else 96, "gate": m.shared_gate} if shared else None,
        **({"alpha": rng.choice([1.702, 1.3]), "limit": rng.choice([7.0, 0.9])} if m.limit else {}),
        "router": {
            "top_k": top_k, "score": m.score, "renormalise": not m.renormalise or rng.random() < 0.5,
            "scale": rng.choice([1.0, 2.5]) if m.scale else 1.0, "bias": m.bias and rng.random() < 0.7,
            "correction": m.correction and rng.random() < 0.7,
        },
    }  # fmt: skip


def _dense(m: Mixture, mlp: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Layers without experts where the architecture has any."""
    places = {"none": [[]], "first": [[], [0], [0, 1]], "steps": [[], [0, 2], [3]], "list": [[], [1], [0, 3]],
              "span": [[], [0], [0, 2], [3]]}  # fmt: skip
    return {str(i): {"mlp": {"kind": "dense", **mlp}} for i in rng.choice(places[m.dense])}


def _positions(c: Carrier, rng: random.Random, head_dim: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Positions of the block, and a pattern of layers with and without windows and rotation."""
    if c.rope == "none":
        return {"kind": "alibi"} if c.alibi else {"kind": "none"}, []
    fraction = rng.choice([0.5, 1.0]) if c.partial else 1.0
    half = int(head_dim * fraction) // 2
    longrope = {"short_factor": [1.0] * half, "long_factor": [1.0 + i / 2 for i in range(half)]}
    kinds: dict[str, dict[str, Any]] = {
        "linear": {"factor": 2.0}, "dynamic": {"factor": 2.0, "original_context": rng.choice([16, 64, 128])},
        "llama3": {"factor": 8.0, "original_context": 32},
        "yarn": {"factor": 4.0, "original_context": 16, "truncate": c.rope_by == "window" or rng.random() < 0.5},
        "longrope": {"original_context": rng.choice([16, 64]), **longrope},
    }  # fmt: skip

    def rope(theta: float) -> dict[str, Any]:
        kind = rng.choice([None, *(k for k in kinds if k in c.scaling)])
        scaling = None if kind is None else {"kind": kind, **kinds[kind]}
        return {"kind": "rope", "theta": theta, "fraction": fraction, "scaling": scaling}

    main, still = rope(rng.choice([500.0, 10000.0])), {"attention": {"position": {"kind": "none"}}}
    local: dict[str, Any] = {"attention": {"window": 7}} if c.window == "layers" and rng.random() < 0.7 else {}
    if c.rope_by == "window" and local:
        local["attention"]["position"] = rope(100.0)
    if c.rope_by == "layer" and rng.random() < 0.5:
        local.setdefault("attention", {})["position"] = {**main, "theta": 100.0}
    if c.no_position == "global":
        return main, [local, still] if local else [still]
    if c.no_position == "windowed" and local:
        return main, [local, still]
    if c.no_position in ("list", "theta") and rng.random() < 0.6:
        return main, [local, still, {}]
    return main, [local, {}] if local else []


def write_folder(
    spec: Spec,
    weights: Mapping[str, Floats],
    path: Path,
    level: str,
    fit: Fit,
    tokenizer: Tokenizer | None = None,
    rows: int = 24,
) -> Path:
    """A folder of these weights by a carrier of one's own choice, in blocks that cut through heads."""
    planned = plan(spec, level)
    out = writer_for(fit, spec, planned, tokenizer, path, level=level)
    for p in planned:
        x = np.ascontiguousarray(weights[p.name], np.float32)
        step = rows if len(p.shape) > 1 else len(x)
        for start in range(0, len(x), step):
            out.write(p.name, start, rounded(p.name, p.level, start, x[start : start + step]))
    out.close({"level": level, "backend": "hf"})
    return path
