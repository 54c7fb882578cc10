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
    mixture,
    mlp_biases,
    moe,
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
from spec.config import Block, NoPosition, Rope, Spec, YarnScaling

HF: Mapping[str, str] = {
    "embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm", "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "attn.q": "model.layers.{i}.self_attn.q_proj", "attn.k": "model.layers.{i}.self_attn.k_proj",
    "attn.v": "model.layers.{i}.self_attn.v_proj", "attn.o": "model.layers.{i}.self_attn.o_proj",
    "attn.q_norm": "model.layers.{i}.self_attn.q_norm", "attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    "mlp.gate": "model.layers.{i}.mlp.gate_proj", "mlp.up": "model.layers.{i}.mlp.up_proj",
    "mlp.down": "model.layers.{i}.mlp.down_proj",
}  # fmt: skip


def _experts(block: str, router: str, experts: str) -> dict[str, str]:
    """The names of an architecture whose layers hold a mixture in `block`."""
    parts = {f"mlp.experts.{n}": f"model.layers.{{i}}.{block}.{experts}.{n}_proj" for n in ("gate", "up", "down")}
    rest = {module: name for module, name in HF.items() if not module.startswith("mlp.")}
    return {**rest, "mlp.router": f"model.layers.{{i}}.{block}.{router}", **parts}


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
GLUS = frozenset({"mlp.experts.gate", "mlp.experts.up", "mlp.experts.down"})
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


def _moe(s: Spec, count: str = "num_experts") -> dict[str, Any]:
    m = moe(s.layers[0])
    return {count: m.experts, "num_experts_per_tok": m.router.top_k}


def _granite(s: Spec) -> dict[str, Any]:
    return {
        **_rms(s), "attention_bias": attention_biases(s), "attention_multiplier": s.layers[0].attention.scale,
        "embedding_multiplier": s.embedding.scale or 1.0, "residual_multiplier": s.layers[0].residual_scale,
        "logits_scaling": 1 / (s.head.scale or 1.0),
    }  # fmt: skip


def _both_windows(s: Spec, b: Block) -> bool:
    """Layers with a window and layers without."""
    return one_window(s, b) and len(set(windows(s))) == 2


def _plain_or_yarn(s: Spec, b: Block) -> bool:
    """As far as mlx-lm's settings give the table: its YaRN has whole dimensions alone, and GPT-OSS's own has not."""
    p = b.attention.position
    yarn = isinstance(p, Rope) and p.fraction == 1 and isinstance(p.scaling, YarnScaling)
    return rotary.plain(b.attention) or (yarn and rotary.configured(s, b.attention) is not None)


def _oai(s: Spec, b: Block) -> bool:
    m = b.mlp
    return m.activation == "clamped_swiglu" and (m.alpha, m.limit) == (1.702, 7.0)


GRANITE: Mapping[str, Check] = {
    "block.attention.head_dim": square, "block.attention.scale": ANY, "block.residual_scale": ANY,
    "embedding.scale": ANY, "head.scale": ANY,
}  # fmt: skip
PLAIN_ROPE: Mapping[str, Check] = {
    "block.attention.position": uniform(lambda s, b: rotary.plain(b.attention)),
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
        "granite", {**GRANITE, "block.mlp.bias": ANY}, lambda s: {**_granite(s), "mlp_bias": mlp_biases(s)},
        _llama_biases,
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
    Carrier(
        "mixtral", {**mixture(), **PLAIN_ROPE, "block.attention.head_dim": square, "block.attention.bias": no_bias},
        lambda s: {**_rms(s), **_moe(s, "num_local_experts")}, names=_experts("block_sparse_moe", "gate", "switch_mlp"),
    ),
    Carrier(
        "qwen3_moe", {
            **mixture(None), **PLAIN_ROPE, "block.attention.qk_norm": qk_norm("head"),
            "block.attention.bias": no_bias,
        },
        lambda s: {
            **_rms(s), **_moe(s), "moe_intermediate_size": s.layers[0].mlp.hidden, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "norm_topk_prob": moe(s.layers[0]).router.renormalise,
        }, names=_experts("mlp", "gate", "switch_mlp"),
    ),
    Carrier(
        "qwen2_moe", {
            **mixture(False, shared=True), **PLAIN_ROPE, "block.attention.head_dim": square,
            "block.attention.bias": qkv_bias, "head.tied": lambda s, b: not s.head.tied,
        },
        lambda s: {
            **_rms(s), **_moe(s), "moe_intermediate_size": s.layers[0].mlp.hidden, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "norm_topk_prob": False,
            "shared_expert_intermediate_size": x.hidden if (x := moe(s.layers[0]).shared) else 0,
        }, lambda s: QKV, {
            **_experts("mlp", "gate", "switch_mlp"), "mlp.shared_gate": "model.layers.{i}.mlp.shared_expert_gate",
            **{f"mlp.shared.{n}": f"model.layers.{{i}}.mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")},
        },
    ),
    Carrier(
        "olmoe", {**mixture(None), "block.attention.qk_norm": qk_norm("width"), "block.mlp.bias": ANY},
        lambda s: {
            **_rms(s), **_moe(s), "norm_topk_prob": moe(s.layers[0]).router.renormalise,
            "attention_bias": attention_biases(s), "mlp_bias": mlp_biases(s),
        },
        lambda s: (QKVO if attention_biases(s) else frozenset()) | (GLUS if mlp_biases(s) else frozenset()),
        _experts("mlp", "gate", "switch_mlp"),
    ),
    Carrier(
        "granitemoe", {**GRANITE, **mixture()}, lambda s: {**_granite(s), **_moe(s, "num_local_experts")},
        lambda s: QKVO if attention_biases(s) else frozenset(),
        _experts("block_sparse_moe", "router.layer", "switch_mlp"),
    ),
    Carrier(
        "gpt_oss", {
            **mixture(bias=True), "block.mlp.activation": _oai, "block.mlp.bias": ANY,
            "block.attention.sinks": lambda s, b: b.attention.sinks, "block.attention.window": _both_windows,
            "block.attention.position": uniform(_plain_or_yarn), "head.tied": lambda s, b: not s.head.tied,
        },
        lambda s: {**_llama_config(s), **_moe(s, "num_local_experts")}, lambda s: QKVO | GLUS | {"mlp.router"},
        {**_experts("mlp", "router", "experts"), "attn.sinks": "model.layers.{i}.self_attn.sinks"},
    ),
)  # fmt: skip
