"""For each llama.cpp architecture, random specs that use what its graph has; and files of random weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Planned, Tokenizer
from backends.gguf.build import writer_for
from backends.gguf.carriers import Carrier
from backends.gguf.fit import Fit, choose
from backends.gguf.importance import Lookup
from spec import Spec, params, parse


def spec_for(c: Carrier, seed: int) -> Spec:
    """A spec that carrier `c` computes, with a random choice of what is optional there."""
    rng = random.Random(f"{c.arch}-{seed}")

    def has(need: str) -> bool:
        return need == "required" or (need == "optional" and rng.random() < 0.5)

    heads, kv, head_dim = rng.choice([(4, 2, 16), (4, 4, 16), (4, 1, 16), (2, 2, 32)])
    if not c.square and rng.random() < 0.4:
        head_dim = 24
    width = 64
    norm = {"kind": c.norm, "eps": 1e-5, "bias": has(c.norm_bias)}
    position, windows = _position(c, rng, head_dim)
    scale = 0.3 if c.scale and rng.random() < 0.5 else None
    attention: dict[str, Any] = {
        "heads": heads, "kv_heads": kv, "head_dim": head_dim,
        "bias": dict.fromkeys("qkv", has(c.qkv_bias)) | {"o": has(c.o_bias)},
        "position": position, "scale": scale,
        "softcap": 3.0 if has(c.softcap) else None, "clip": 1.0 if c.clip and rng.random() < 0.5 else None,
        "sinks": has(c.sinks),
    }  # fmt: skip
    if has(c.qk_norm):
        over = "width" if c.qk_over == "width" else "head"
        attention["qk_norm"] = {"kind": c.qk_kind, "over": over, "eps": 1e-5, "bias": has(c.qk_bias)}
    if c.every_head:
        attention["kv_heads"] = heads
    flow = rng.choice(c.flow)
    dense = {"hidden": 96, "gated": c.gated, "activation": c.activation, "bias": has(c.mlp_bias)}
    mixture, overrides = _mixture(c, rng, dense)
    return parse({
        "name": f"{c.arch}-{seed}", "vocab_size": 96, "width": width, "depth": 4, "context": 64,
        "embedding": {
            "scale": {"no": None, "key": 3.0, "sqrt_width": width**0.5}[c.embed_scale],
            "positions": {"offset": rng.choice([0, 2])} if has(c.positions) else None,
            "norm": norm if c.embed_norm else None,
        },
        "block": {
            "attention": attention, "norm": norm, "placement": c.placement,
            "parallel": flow != "sequential", "shared_norm": flow == "shared",
            "residual_scale": 0.4 if c.residual_scale else 1.0,
            "mlp": mixture or dense,
        },
        "pattern": windows,
        "overrides": overrides,
        "final_norm": norm,
        "head": {
            "tied": c.tied == "forced" or (c.tied == "optional" and rng.random() < 0.5),
            "bias": has(c.head_bias), "scale": 0.5 if c.logit_scale != "no" else None,
            "softcap": 5.0 if has(c.logit_softcap) else None,
        },
    })  # fmt: skip


def _mixture(c: Carrier, rng: random.Random, dense: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A mixture of what the graph has, and layers that are dense; nothing where it has none (or may have none)."""
    x = c.experts
    if x is None or (x.layers in ("none_or_all", "any") and rng.random() < 0.4):
        return {}, {}

    def has(need: str) -> bool:
        return need == "required" or (need == "optional" and rng.random() < 0.5)

    score = rng.choice(x.score)
    shared = has(x.shared) and (x.shared_gate or rng.random() < 0.7)
    width = 64 if x.shared_hidden == "multiple" else 40
    mixture = {
        "kind": "moe", "experts": rng.choice([5, 8]), "hidden": 32, "activation": x.activation,
        "bias": has(x.expert_bias),
        "router": {
            "top_k": rng.choice([1, 2, 3]), "score": score, "bias": has(x.bias),
            "renormalise": rng.random() < 0.5 if x.renormalise is None else x.renormalise,
            "scale": rng.choice([1.0, 2.5]) if x.scale else 1.0,
            "correction": x.correction != "no" and rng.random() < 0.6,
        },
        "shared": {"hidden": width, "gate": x.shared_gate} if shared else None,
    }  # fmt: skip
    layers = {"leading": ["0", "0..1", ""], "any": ["0", "2", ""]}.get(x.layers, [""])
    chosen = rng.choice(layers)
    return mixture, {chosen: {"mlp": {"kind": "dense"} | dense}} if chosen else {}


def _position(c: Carrier, rng: random.Random, head_dim: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Positions of the block, and a pattern of layers with and without windows."""
    if c.rope == "none":
        alibi = c.alibi == "8" or (c.alibi == "key" and rng.random() < 0.5)
        bias = 8.0 if c.alibi == "8" else rng.choice([4.0, 8.0])
        return {"kind": "alibi", "max_bias": bias} if alibi else {"kind": "none"}, []
    fraction = rng.choice([0.5, 1.0]) if c.partial else 1.0
    rope: dict[str, Any] = {"kind": "rope", "theta": rng.choice([500.0, 10000.0]), "fraction": fraction}
    windowed = c.window == "required" or (c.window == "optional" and rng.random() < 0.7)
    kinds: list[dict[str, Any] | None] = [None, None]
    if "linear" in c.scaling:
        kinds.append({"kind": "linear", "factor": 2.0})
    if "yarn" in c.scaling and not (windowed and c.window_theta):
        kinds.append({"kind": "yarn", "factor": 4.0, "original_context": 16})
    if c.freqs in ("freqs", "both"):
        kinds.append({"kind": "llama3", "factor": 8.0, "original_context": 32})
    if c.freqs != "no" and not (windowed and c.window_theta):
        half = int(head_dim * fraction) // 2
        factors = {"short_factor": [1.0] * half, "long_factor": [1.0 + i / 2 for i in range(half)]}
        kinds.append({"kind": "longrope", "original_context": 16, **factors})
    rope["scaling"] = rng.choice(kinds)
    if not windowed:
        return rope, []
    local: dict[str, Any] = {"attention": {"window": 7}}
    if c.window_theta:
        theta = 100.0 if c.window_theta == "own" else rope["theta"]
        local["attention"]["position"] = {"kind": "rope", "theta": theta, "fraction": fraction, "scaling": None}
    if c.no_position == "global":
        return rope, [local, {"attention": {"position": {"kind": "none"}}}]
    return rope, [local, {}]


def write_file(
    spec: Spec,
    weights: dict[str, NDArray[np.float32]],
    path: Path,
    level: str = "f32",
    fit: Fit | None = None,
    tokenizer: Tokenizer | None = None,
    planned: list[Planned] | None = None,
    importance: Lookup | None = None,
) -> Path:
    """A GGUF file of these weights: portable levels by the portable quantizer, native ones by ggml's."""
    from backends.gguf.recipe import recipe
    from backends.gguf.types import PORTABLE
    from convert.quantize import quantize

    if planned is None:
        if level in PORTABLE:
            planned = [Planned(p.name, p.shape, _level(p, level)) for p in params(spec)]
        else:
            kinds = recipe(spec, level, importance=importance is not None)
            planned = [Planned(p.name, p.shape, kinds[p.name]) for p in params(spec)]
    out = writer_for(fit or choose(spec), spec, planned, tokenizer, path, metadata={}, threads=2, importance=importance)
    for p in planned:
        x = weights[p.name]
        for start in range(0, len(x), 24):  # blocks that cut through heads
            rows = x[start : start + 24]
            if len(p.shape) == 1:
                rows, start = x, 0
            bits = {"q8": 8, "q4": 4}.get(p.level)
            out.write(p.name, start, quantize(rows, bits) if bits else rows)
            if len(p.shape) == 1:
                break
    out.close({"level": level})
    return path


def _level(p: Any, level: str) -> str:
    if not p.matrix:
        return "f32"
    return "f16" if level in ("q8", "q4") and p.shape[-1] % 32 else level
