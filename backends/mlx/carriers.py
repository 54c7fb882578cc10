"""mlx-lm's own architectures: what each really carries (0.32; its models ignore some fields of their configurations,
and no row here relies on one of those). What none of them computes exactly goes with the bundled model.py.

A row says what it takes of each field; whatever it does not name must have the plain Llama's value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.mlx import rotary
from backends.mlx.checks import (
    ANY,
    GEMMA,
    LAYERNORM,
    LLAMA,
    Check,
    attention_biases,
    bfloat16,
    divisible,
    gaps,
    inverse_square,
    layernorm,
    local_global,
    mha,
    mlp_biases,
    no_bias,
    one_window,
    period,
    qk_norm,
    qkv_bias,
    square,
    uniform,
    window,
    windows,
)
from spec.config import NoPosition, Rope, Spec

HF: Mapping[str, str] = {
    "embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm", "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "attn.q": "model.layers.{i}.self_attn.q_proj", "attn.k": "model.layers.{i}.self_attn.k_proj",
    "attn.v": "model.layers.{i}.self_attn.v_proj", "attn.o": "model.layers.{i}.self_attn.o_proj",
    "attn.q_norm": "model.layers.{i}.self_attn.q_norm", "attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    "mlp.gate": "model.layers.{i}.mlp.gate_proj", "mlp.up": "model.layers.{i}.mlp.up_proj",
    "mlp.down": "model.layers.{i}.mlp.down_proj",
}  # fmt: skip
POST: Mapping[str, str] = {
    **{module: name for module, name in HF.items() if module not in ("attn_norm", "mlp_norm")},
    "attn_post_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}  # fmt: skip
SANDWICH: Mapping[str, str] = {
    **POST, "attn_norm": HF["attn_norm"], "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
}  # fmt: skip
GPT2: Mapping[str, str] = {
    "embed": "model.wte", "positions": "model.wpe", "final_norm": "model.ln_f",
    "attn_norm": "model.h.{i}.ln_1", "mlp_norm": "model.h.{i}.ln_2",
    "attn.q": "model.h.{i}.attn.c_attn", "attn.k": "model.h.{i}.attn.c_attn", "attn.v": "model.h.{i}.attn.c_attn",
    "attn.o": "model.h.{i}.attn.c_proj", "mlp.up": "model.h.{i}.mlp.c_fc", "mlp.down": "model.h.{i}.mlp.c_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Carrier:
    """One architecture."""

    model_type: str
    takes: Mapping[str, Check]
    """What differs from `PLAIN`."""
    config: Callable[[Spec], dict[str, Any]]
    biases: Callable[[Spec], frozenset[str]] = lambda s: frozenset()
    """Modules (and `norm`) that have a bias there; where the spec has none it is 0."""
    names: Mapping[str, str] = field(default_factory=lambda: HF)
    """Canonical modules to mlx-lm's; several of one name are joined, in this order."""
    offset: float = 0.0
    """What the architecture adds to gains itself; other offsets are folded into them where this is 0."""
    traditional: bool = False
    """Whether its rotation turns neighbours."""
    proportional: bool = True
    """Whether a partial rotation pairs dimensions over the whole head (`backends.mlx.rotary`)."""

    @property
    def fused(self) -> bool:
        return len(set(self.names.values())) < len(self.names)


def _base(s: Spec) -> dict[str, Any]:
    """What nearly every configuration has."""
    b = s.layers[0]
    return {
        "hidden_size": s.width, "num_hidden_layers": s.depth, "intermediate_size": b.mlp.hidden,
        "num_attention_heads": b.attention.heads, "num_key_value_heads": b.attention.kv_heads,
        "vocab_size": s.vocab_size, "max_position_embeddings": s.context, "tie_word_embeddings": s.head.tied,
    }  # fmt: skip


def _rms(s: Spec) -> dict[str, Any]:
    a = next(b.attention for b in s.layers if isinstance(b.attention.position, Rope))
    return {**_base(s), "rms_norm_eps": s.layers[0].norm.eps, "head_dim": a.head_dim, **(rotary.configured(s, a) or {})}


def _plain_rope(s: Spec) -> dict[str, Any]:
    p = s.layers[0].attention.position
    assert isinstance(p, Rope)
    return {"rope_theta": p.theta, "partial_rotary_factor": p.fraction}


def _llama_config(s: Spec) -> dict[str, Any]:
    found = windows(s)
    width = next((w for w in found if w is not None), None)
    local = {} if width is None else {
        "sliding_window": width,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in found],
    }  # fmt: skip
    return {**_rms(s), "attention_bias": attention_biases(s), "mlp_bias": mlp_biases(s), **local}


QKVO = frozenset({"attn.q", "attn.k", "attn.v", "attn.o"})
QKV = QKVO - {"attn.o"}
GLU = frozenset({"mlp.gate", "mlp.up", "mlp.down"})
NORM = frozenset({"norm"})


def _llama_biases(s: Spec) -> frozenset[str]:
    return (QKVO if attention_biases(s) else frozenset()) | (GLU if mlp_biases(s) else frozenset())


def _gemma3(s: Spec) -> dict[str, Any]:
    whole = next(b.attention for b in s.layers if window(s, b) is None)
    local = next((b.attention for b in s.layers if window(s, b) is not None), whole)
    assert isinstance(local.position, Rope)
    return {
        **_rms(s), **(rotary.configured(s, whole) or {}), "rope_local_base_freq": local.position.theta,
        "query_pre_attn_scalar": inverse_square(s.layers[0]), "sliding_window_pattern": period(s),
        "sliding_window": next((w for w in windows(s) if w is not None), s.context),
    }  # fmt: skip


CARRIERS: tuple[Carrier, ...] = (
    Carrier(
        "qwen2", {
            "block.attention.head_dim": square,
            "block.attention.bias": lambda s, b: qkv_bias(s, b) and attention_biases(s),
        }, _rms, lambda s: QKV,
    ),
    Carrier("llama", {**LLAMA, "block.attention.heads": divisible}, _llama_config, _llama_biases),
    # older transformers' tokenizers of this type get a warning and another split
    Carrier("mistral", LLAMA, lambda s: {**_llama_config(s), "transformers_version": "5.0.0"}, _llama_biases),
    Carrier(
        "smollm3", {**LLAMA, "block.attention.position": gaps},
        lambda s: {
            **_llama_config(s), "no_rope_layers": [int(isinstance(b.attention.position, Rope)) for b in s.layers],
        }, _llama_biases,
    ),
    Carrier("qwen3", {"block.attention.qk_norm": qk_norm("head"), "block.attention.bias": no_bias}, _rms),
    Carrier(
        "granite", {
            "block.attention.head_dim": square, "block.mlp.bias": ANY, "block.attention.scale": ANY,
            "block.residual_scale": ANY, "embedding.scale": ANY, "head.scale": ANY,
        },
        lambda s: {
            **_rms(s), "attention_bias": attention_biases(s), "mlp_bias": mlp_biases(s),
            "attention_multiplier": s.layers[0].attention.scale, "embedding_multiplier": s.embedding.scale or 1.0,
            "residual_multiplier": s.layers[0].residual_scale, "logits_scaling": 1 / (s.head.scale or 1.0),
        }, _llama_biases,
    ),
    Carrier(
        "olmo2", {
            "block.placement": lambda s, b: b.placement == "post", "block.attention.qk_norm": qk_norm("width"),
            "block.mlp.bias": ANY,
        },
        lambda s: {**_rms(s), "attention_bias": attention_biases(s), "mlp_bias": mlp_biases(s)}, _llama_biases, POST,
    ),
    Carrier(
        "olmo3", {
            "block.placement": lambda s, b: b.placement == "post", "block.attention.qk_norm": qk_norm("width"),
            "block.attention.window": lambda s, b: one_window(s, b) and len(set(windows(s))) == 2,
            "block.attention.position": uniform(lambda s, b: rotary.plain(b.attention)),
        },
        _llama_config, _llama_biases, POST,
    ),
    Carrier(
        "gemma2", {
            **GEMMA, "block.attention.softcap": lambda s, b: b.attention.softcap is not None,
            "block.attention.position": uniform(lambda s, b: rotary.plain(b.attention)),
            "embedding.scale": lambda s, b: math.isclose(s.embedding.scale or 0, s.width**0.5, rel_tol=1e-7),
            "head.tied": lambda s, b: s.head.tied, "head.softcap": lambda s, b: s.head.softcap is not None,
        },
        lambda s: {
            **_rms(s), "query_pre_attn_scalar": inverse_square(s.layers[0]),
            "attn_logit_softcapping": s.layers[0].attention.softcap, "final_logit_softcapping": s.head.softcap,
        }, names=SANDWICH, offset=1.0,
    ),
    Carrier(
        "gemma3_text", {
            **GEMMA, "block.attention.qk_norm": lambda s, b: qk_norm("head")(s, b)
            and b.attention.qk_norm is not None and b.attention.qk_norm.offset == 1,
            "block.attention.position": local_global, "block.attention.window": lambda s, b: period(s) > 0,
            "embedding.scale": lambda s, b: s.embedding.scale == bfloat16(s.width**0.5),
        },
        _gemma3, names=SANDWICH, offset=1.0,
    ),
    Carrier(
        "cohere", {
            **LAYERNORM, "block.parallel": lambda s, b: b.parallel and b.shared_norm,
            "block.attention.position": uniform(lambda s, b: rotary.plain(b.attention)),
            "head.tied": lambda s, b: s.head.tied, "head.scale": ANY,
        },
        lambda s: {
            **_base(s), **_plain_rope(s), "layer_norm_eps": s.layers[0].norm.eps, "logit_scale": s.head.scale or 1.0,
            "attention_bias": attention_biases(s), "layer_norm_bias": True, "use_qk_norm": False,
        },
        lambda s: (QKVO if attention_biases(s) else frozenset()) | NORM, traditional=True,
    ),
    Carrier(
        "stablelm", {
            **LAYERNORM, "block.parallel": lambda s, b: b.parallel == b.shared_norm, "block.attention.bias": qkv_bias,
            "block.attention.position": uniform(lambda s, b: rotary.plain(b.attention, partial=True)),
            "head.tied": lambda s, b: not s.head.tied,
        },
        lambda s: {
            **_base(s), **_plain_rope(s), "layer_norm_eps": s.layers[0].norm.eps, "use_qkv_bias": attention_biases(s),
            "use_parallel_residual": s.layers[0].parallel, "qk_layernorm": False,
        },
        lambda s: (QKV if attention_biases(s) else frozenset()) | NORM, proportional=False,
    ),
    Carrier(
        "starcoder2", {
            **LAYERNORM, "block.attention.position": uniform(lambda s, b: rotary.plain(b.attention)),
            "block.mlp.gated": lambda s, b: not b.mlp.gated, "block.mlp.bias": ANY,
            "block.mlp.activation": lambda s, b: b.mlp.activation == "gelu",
        },
        lambda s: {**_base(s), **_plain_rope(s), "norm_epsilon": s.layers[0].norm.eps},
        lambda s: QKVO | {"mlp.up", "mlp.down"} | NORM,
        {**HF, "mlp.up": "model.layers.{i}.mlp.c_fc", "mlp.down": "model.layers.{i}.mlp.c_proj"},
    ),
    Carrier(
        "nemotron", {
            "block.norm.kind": layernorm, "block.norm.bias": ANY,
            "block.norm.offset": lambda s, b: b.norm.offset == 1 and b.norm.weight,
            "block.attention.position": uniform(lambda s, b: rotary.plain(b.attention, partial=True)),
            "block.mlp.gated": lambda s, b: not b.mlp.gated, "block.mlp.bias": ANY,
            "block.mlp.activation": lambda s, b: b.mlp.activation == "relu2",
        },
        lambda s: {
            **_base(s), **_plain_rope(s), "norm_eps": s.layers[0].norm.eps, "hidden_act": "relu2",
            "head_dim": s.layers[0].attention.head_dim, "attention_bias": attention_biases(s),
            "mlp_bias": mlp_biases(s),
        },
        lambda s: _llama_biases(s) | NORM, offset=1.0, proportional=False,
    ),
    Carrier(
        "gpt2", {
            **LAYERNORM, "block.attention.kv_heads": mha, "block.mlp.bias": ANY,
            "block.attention.position": lambda s, b: all(
                isinstance(x.attention.position, NoPosition) for x in s.layers
            ),
            "block.mlp.gated": lambda s, b: not b.mlp.gated,
            "block.mlp.hidden": lambda s, b: b.mlp.hidden == 4 * s.width,
            "block.mlp.activation": lambda s, b: b.mlp.activation == "gelu_tanh",
            "embedding.positions": lambda s, b: (p := s.embedding.positions) is not None and p.offset == 0,
            "head.tied": lambda s, b: s.head.tied,
        },
        lambda s: {
            "n_ctx": s.context, "n_positions": s.position_rows, "n_embd": s.width, "n_layer": s.depth,
            "n_head": s.layers[0].attention.heads, "vocab_size": s.vocab_size,
            "layer_norm_epsilon": s.layers[0].norm.eps,
        },
        lambda s: QKVO | {"mlp.up", "mlp.down"} | NORM, GPT2,
    ),
)  # fmt: skip
