"""Every family that is read: the rows that it is written by (backends/hf/carriers.py), and what they do not say.

Defaults are those of transformers 5.23's config classes (a test compares every one). Adding a family is a row there
and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.hf.carriers import BY_ARCH
from convert.families import expert_table, quirks
from convert.families.config import Family
from convert.families.quirks import alternating, windowed_from

USUAL: Mapping[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False, "num_key_value_heads": None,
    "head_dim": None, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5, "hidden_dropout": 0.0, "layer_types": None, "use_sliding_window": False,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0,
}  # fmt: skip
"""Of keys that a family reads, the value where config.json is silent and the family's row says nothing else."""
TIED = {"tie_word_embeddings": True}
GEMMA = {**TIED, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256}
GEMMA2 = {**TIED, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256,
          "sliding_window": 4096, "num_key_value_heads": 4}  # fmt: skip
CAUSAL = {"use_bidirectional_attention": (None, False)}
SCALES = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0}
GLM = {"partial_rotary_factor": 0.5, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07,
       "attention_bias": True}  # fmt: skip
NEOX_MASKS = r"(gpt_neox\.)?layers\.\d+\.attention\.(masked_)?bias"
GPT2_MASKS = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias"

EXPERTS = expert_table.TRAINING | expert_table.FURTHER


def _family(arch: str, covers: str, defaults: Mapping[str, Any] | None = None, **fields: Any) -> Family:
    return Family(carriers=BY_ARCH[arch], covers=covers, defaults={**USUAL, **(defaults or {})}, **fields)


ROWS: tuple[Family, ...] = (
    _family("llama", "Llama 1, 2, 3, 3.1, 3.2 (text), 3.3; SmolLM 1 and 2, TinyLlama, Yi, and others of its code"),
    _family("mistral", "Mistral 7B, Nemo, Small", {"num_key_value_heads": 8, "sliding_window": 4096}),
    _family("ministral", "Ministral",
            {"num_key_value_heads": 8, "sliding_window": 4096}, layer_types=quirks.all_windowed),
    _family("qwen2", "Qwen 1.5, 2, 2.5; QwQ",
            {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
            layer_types=windowed_from, ignored=frozenset({"max_window_layers"})),
    _family("qwen3", "Qwen 3 (dense)",
            {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
            layer_types=windowed_from, ignored=frozenset({"max_window_layers"})),
    _family("smollm3", "SmolLM3",
            {**TIED, "num_key_value_heads": 4, "rope_theta": 2000000.0, "sliding_window": None,
             "no_rope_layers": None, "no_rope_layer_interval": 4},
            layer_types=quirks.windowed_where_still, ignored=frozenset({"max_window_layers"})),
    _family("granite", "Granite 3", SCALES),
    _family("granite_swa", "Granite with windows and sinks",
            {**SCALES, **TIED, "rms_norm_eps": 1e-5, "num_key_value_heads": 4, "sliding_window": 128,
             "layer_rope_theta": None},
            layer_types=alternating(4, first=True)),
    _family("arcee", "AFM 4.5B", {"hidden_act": "relu2", "rms_norm_eps": 1e-5}),
    _family("seed_oss", "Seed-OSS",
            {"attention_bias": True, "attention_out_bias": False, "attention_dropout": 0.1,
             "residual_dropout": 0.1, "num_key_value_heads": 8, "head_dim": 128}),
    _family("helium", "Helium 1",
            {"rms_norm_eps": 1e-8, "num_key_value_heads": 20, "head_dim": 128, "rope_theta": 1e5}),
    _family("ernie4_5", "ERNIE 4.5 (dense)",
            {**TIED, "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "head_dim": 128, "rope_theta": 5e5,
             "use_bias": False}),
    _family("phi3", "Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
            {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "sliding_window": None},
            scalings={"yarn": "longrope"},
            neutral={"attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,),
             "full_attn_mod": (1,), "interpolate_factor": (1,), "use_sliding_window": (None,)}),
    _family("glm", "GLM-4 9B (chat-hf)", GLM),
    _family("gemma", "Gemma 1 and 1.1, CodeGemma",
            {**GEMMA, "num_key_value_heads": 16}, tidy=quirks.gemma, neutral=CAUSAL),
    _family("vaultgemma", "VaultGemma",
            {**GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            layer_types=alternating(2), neutral=CAUSAL),
    _family("gemma2", "Gemma 2",
            {**GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            layer_types=alternating(2), tidy=quirks.gemma2, neutral=CAUSAL),
    _family("gemma3_text", "Gemma 3 1B and 270M (text)",
            {**GEMMA2, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
             "final_logit_softcapping": None},
            layer_types=alternating(6, "sliding_window_pattern"), tidy=quirks.gemma3,
            ignored=frozenset({"_sliding_window_pattern", "sliding_window_pattern"}),
            neutral={**CAUSAL, "attn_logit_softcapping": (None,)}),
    _family("glm4", "GLM-4 0414", GLM),
    _family("olmo2", "OLMo 2", {"rms_norm_eps": 1e-5}),
    _family("olmo3", "OLMo 3",
            {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_local_base_freq": 5e5, "sliding_window": 4096},
            layer_types=alternating(4), tidy=quirks.olmo3),
    _family("exaone4", "EXAONE 4.0",
            {"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096,
             "sliding_window_pattern": 4},
            layer_types=quirks.exaone4, ignored=frozenset({"sliding_window_pattern"})),
    _family("gpt2", "GPT-2",
            {**TIED, "n_inner": None, "activation_function": "gelu_new", "attn_pdrop": 0.1, "resid_pdrop": 0.1,
             "embd_pdrop": 0.1},
            hidden_times=4, recomputed=GPT2_MASKS, tidy=quirks.gpt2, classes=("GPT2LMHeadModel",),
            ignored=frozenset({"n_ctx", "summary_type", "summary_use_proj", "summary_activation",
             "summary_proj_to_labels", "summary_first_dropout", "reorder_and_upcast_attn"}),
            neutral={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}),
    _family("opt", "OPT (not 350M)",
            {**TIED, "activation_function": "relu", "dropout": 0.1, "init_std": 0.02, "enable_bias": True,
             "do_layer_norm_before": True, "layer_norm_elementwise_affine": True},
            tidy=quirks.opt, ignored=frozenset({"layerdrop", "activation_dropout"}),
            neutral={"_remove_final_layer_norm": (False,)}),
    _family("stablelm", "StableLM 2, StableLM 3B",
            {"partial_rotary_factor": 0.25, "num_key_value_heads": 32, "use_qkv_bias": False,
             "qk_layernorm": False, "use_parallel_residual": False}),
    _family("olmo", "OLMo 1", {"clip_qkv": None}),
    _family("starcoder2", "StarCoder2",
            {**TIED, "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.018042,
             "norm_epsilon": 1e-5, "num_key_value_heads": 2, "use_bias": True, "sliding_window": None,
             "residual_dropout": 0.0, "embedding_dropout": 0.0},
            ignored=frozenset({"activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
             "layer_norm_epsilon"}),
            neutral={"norm_type": ("layer_norm",), "mlp_type": ("default",), "scale_attn_weights": (True,)}),
    _family("gpt_neox", "Pythia, GPT-NeoX 20B, RedPajama INCITE",
            {"hidden_act": "gelu", "attention_bias": True, "use_parallel_residual": True,
             "rotary_emb_base": 10000.0, "rotary_pct": 0.25},
            theta="rotary_emb_base", fraction="rotary_pct", recomputed=NEOX_MASKS,
            ignored=frozenset({"classifier_dropout"})),
    _family("phi", "Phi-1, Phi-1.5, Phi-2",
            {"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "qk_layernorm": False}),
    _family("persimmon", "Persimmon 8B", {"hidden_act": "relu2", "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    _family("nemotron", "Nemotron 4, Minitron",
            {"hidden_act": "relu2", "norm_eps": 1e-5, "initializer_range": 0.0134,
             "partial_rotary_factor": 0.5}),
    _family("jais2", "Jais 2", {"hidden_act": "relu2", "attention_bias": True, "mlp_bias": True}),
    _family("cohere", "Command-R, Aya 23 (not Command-R+)",
            {**TIED, "rope_theta": 5e5, "logit_scale": 0.0625, "use_qk_norm": False}),
    _family("cohere2", "Command-R7B, Command A",
            {**TIED, "logit_scale": 0.0625, "sliding_window": 4096, "sliding_window_pattern": 4},
            layer_types=alternating(4, "sliding_window_pattern"),
            ignored=frozenset({"sliding_window_pattern", "layer_switch", "use_embedding_sharing",
             "use_parallel_embedding"}),
            tidy=quirks.cohere2,
            neutral={"order_of_interleaved_layers": ("local_attn_first",), "position_embedding_type": ("rope_gptj",),
             "rotary_pct": (1.0,), "use_gated_activation": (True,), "use_parallel_block": (True,),
             "use_qk_norm": (False,)}),
    _family("falcon", "Falcon 7B, 11B, 40B, 180B (not with ALiBi)",
            {**TIED, "num_kv_heads": None, "ffn_hidden_size": None, "activation": "gelu", "bias": False,
             "alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True,
             "num_ln_in_parallel_attn": None, "max_position_embeddings": 2048},
            hidden_times=4, tidy=quirks.falcon, ignored=frozenset({"n_embed", "num_kv_heads"}),
            neutral={"apply_residual_connection_post_layernorm": (False,), "num_ln_in_parallel_attn": (None, 1)}),
    _family("mpt", "MPT 7B and 30B",
            {**TIED, "layer_norm_epsilon": 1e-5, "max_seq_len": 2048, "expansion_ratio": 4, "no_bias": True,
             "attn_config.alibi": True, "attn_config.alibi_bias_max": 8, "attn_config.clip_qkv": None,
             "attn_config.softmax_scale": None, "attn_config.attn_pdrop": 0.0},
            tidy=quirks.mpt, classes=("MPTForCausalLM",),
            ignored=frozenset({"init_config", "init_device", "verbose", "learned_pos_emb", "attn_config.attn_impl",
             "emb_pdrop", "resid_pdrop", "attn_config.attn_pdrop"}),
            neutral={"attn_config.attn_type": ("multihead_attention",), "attn_config.prefix_lm": (False,),
             "attn_config.qk_ln": (False,), "attn_config.attn_uses_sequence_id": (False,),
             "embedding_fraction": (1.0,), "logit_scale": (None,),
             "norm_type": ("low_precision_layernorm", "layernorm")}),
    _family("bloom", "BLOOM, BLOOMZ",
            TIED, tidy=quirks.bloom,
            ignored=frozenset({"attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion",
             "offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "n_inner"}),
            neutral={"apply_residual_connection_post_layernorm": (False,)}),
    *(_family(arch, expert_table.COVERS.get(arch, ""), defaults,
              **{**fields, "ignored": EXPERTS | fields.get("ignored", frozenset())})
      for arch, defaults, fields in expert_table.ROWS),
)  # fmt: skip

FAMILIES: Mapping[str, Family] = {f.name: f for f in ROWS}
"""By config.json's model_type."""
