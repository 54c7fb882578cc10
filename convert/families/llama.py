"""Llama and its next of kin (Mistral, Qwen 2, Qwen 3): pre-norm RMSNorm, rotary GQA, gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from backends.hf.names import LLAMA as RULES
from convert.families.config import Config, Family
from convert.families.rope import rope
from spec.errors import nearest

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip

Extra = Callable[[Config, dict[str, Any], dict[str, Any]], None]
"""What a relative adds: reads its own keys into (attention, mlp)."""


def _base(c: Config, extra: Extra) -> dict[str, Any]:
    norm = {"kind": "rmsnorm", "eps": c.take("rms_norm_eps", (int, float))}
    heads, kv = c.take("num_attention_heads", int), c.take("num_key_value_heads", int, optional=True)
    activation = c.take("hidden_act", str)
    if activation is not None and activation not in ACTIVATIONS:
        c.bad("hidden_act", activation, "is no activation that is read", nearest(activation, ACTIVATIONS))
    attention = {
        "heads": heads,
        "kv_heads": kv if kv is not None else heads,
        "head_dim": c.take("head_dim", int, optional=True),
        "position": rope(c),
        "dropout": c.take("attention_dropout", (int, float), optional=True) or 0.0,
    }
    mlp: dict[str, Any] = {"hidden": c.take("intermediate_size", int), "activation": ACTIVATIONS.get(activation or "")}
    extra(c, attention, mlp)
    return {
        "vocab_size": c.take("vocab_size", int),
        "width": c.take("hidden_size", int),
        "depth": c.take("num_hidden_layers", int),
        "context": c.take("max_position_embeddings", int),
        "block": {"attention": attention, "mlp": mlp, "norm": norm},
        "final_norm": norm,
        "head": {"tied": c.take("tie_word_embeddings", bool)},
        "init": {"std": c.take("initializer_range", (int, float)) or 0.02, "depth_scaled": False},
    }


def llama(c: Config) -> dict[str, Any]:
    """LlamaForCausalLM."""

    def extra(c: Config, attention: dict[str, Any], mlp: dict[str, Any]) -> None:
        attention["bias"] = c.take("attention_bias", bool)
        mlp["bias"] = c.take("mlp_bias", bool)

    return _base(c, extra)


def mistral(c: Config) -> dict[str, Any]:
    """MistralForCausalLM: a sliding window in every layer, or none."""

    def extra(c: Config, attention: dict[str, Any], mlp: dict[str, Any]) -> None:
        attention["window"] = c.take("sliding_window", int, optional=True)

    return _base(c, extra)


def qwen2(c: Config) -> dict[str, Any]:
    """Qwen2ForCausalLM: biases on q, k and v."""
    return _windowed(c, lambda c, a, m: a.update(bias={"q": True, "k": True, "v": True}))


def qwen3(c: Config) -> dict[str, Any]:
    """Qwen3ForCausalLM: per-head QK-norm."""

    def extra(c: Config, attention: dict[str, Any], mlp: dict[str, Any]) -> None:
        attention["bias"] = c.take("attention_bias", bool)
        attention["qk_norm"] = {"kind": "rmsnorm", "eps": c.take("rms_norm_eps", (int, float)), "over": "head"}

    return _windowed(c, extra)


def _windowed(c: Config, extra: Extra) -> dict[str, Any]:
    """A sliding window in the layers that `layer_types` names, or in those from `max_window_layers` on."""
    data = _base(c, extra)
    used, window = c.take("use_sliding_window", bool), c.take("sliding_window", int, optional=True)
    first, types = c.take("max_window_layers", int), c.take("layer_types", list, optional=True)
    depth = data["depth"]
    if c.problems:
        return data
    if types is None:
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(depth)]
    odd = sorted({str(t) for t in types} - {"sliding_attention", "full_attention"})
    if odd or len(types) != depth:
        c.bad("layer_types", odd[0] if odd else f"{len(types)} entries", "does not describe the layers",
              f"{depth} of full_attention or sliding_attention")  # fmt: skip
        return data
    window = window if used else None
    if window is None:
        return data
    overrides: dict[str, Any] = {}
    start = 0
    for kind, run in groupby(types):
        stop = start + len(list(run))
        if kind == "sliding_attention":
            overrides[f"{start}..{stop - 1}"] = {"attention": {"window": window}}
        start = stop
    return {**data, "overrides": overrides}


_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_dropout": 0.0, "num_key_value_heads": None, "head_dim": None,
}  # fmt: skip
_BIASES = {"attention_bias": False, "mlp_bias": False}
_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_RECOMPUTED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"

FAMILIES = {
    f.name: f
    for f in (
        Family("llama", "LlamaForCausalLM", llama, RULES, {**_DEFAULTS, **_BIASES}, _RECOMPUTED),
        Family("mistral", "MistralForCausalLM", mistral, RULES,
               {**_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096}, _RECOMPUTED),
        Family("qwen2", "Qwen2ForCausalLM", qwen2, RULES, {**_DEFAULTS, **_WINDOWS, "num_key_value_heads": 32},
               _RECOMPUTED),
        Family("qwen3", "Qwen3ForCausalLM", qwen3, RULES,
               {**_DEFAULTS, **_WINDOWS, "attention_bias": False, "num_key_value_heads": 32, "head_dim": 128},
               _RECOMPUTED),
    )
}  # fmt: skip
