"""config.json files of families with experts as they were published, as in published_configs.py."""

from __future__ import annotations

from typing import Any

from convert.tests.published_configs import USUAL

COMMON: dict[str, Any] = {**USUAL, "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], **COMMON, "attention_dropout": 0.0, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0, "sliding_window": None, "vocab_size": 32000,
    },
    "qwen1.5-moe": {
        "architectures": ["Qwen2MoeForCausalLM"], **COMMON, "attention_dropout": 0.0, "decoder_sparse_step": 1,
        "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
        "model_type": "qwen2_moe", "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], **COMMON, "attention_bias": False, "attention_dropout": 0.0,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936,
    },
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], **COMMON, "attention_bias": False, "attention_dropout": 0.0,
        "clip_qkv": None, "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
        "vocab_size": 50304,
    },
    "granite-3.0-1b-a400m": {
        "architectures": ["GraniteMoeForCausalLM"], **COMMON, "attention_bias": False, "attention_dropout": 0.0,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_size": 1024, "intermediate_size": 512,
        "logits_scaling": 6.0, "max_position_embeddings": 4096, "model_type": "granitemoe", "num_attention_heads": 16,
        "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "output_router_logits": False, "residual_multiplier": 0.22, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.0, "tie_word_embeddings": True, "vocab_size": 49155,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"], **COMMON, "attention_bias": True, "attention_dropout": 0.0,
        "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880, "initial_context_length": 4096,
        "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "vocab_size": 201088,
    },
    "glm-4.5-air": {
        "architectures": ["Glm4MoeForCausalLM"], **COMMON, "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336], "first_k_dense_replace": 1, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 10944, "max_position_embeddings": 131072, "model_type": "glm4_moe",
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
        "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.0, "topk_group": 1,
        "use_qk_norm": False, "vocab_size": 151552,
    },
    "ernie-4.5-21b-a3b": {
        "architectures": ["Ernie4_5_MoeForCausalLM"], **COMMON, "hidden_size": 2560, "intermediate_size": 12288,
        "max_position_embeddings": 131072, "model_type": "ernie4_5_moe", "moe_capacity": [64, 64, 64],
        "moe_gate": "topk", "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_end_index": -1,
        "moe_layer_interval": 1, "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2,
        "moe_use_aux_free": True, "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "use_bias": False, "vocab_size": 103424,
    },
}  # fmt: skip

REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "olmoe-clip": ("olmoe-1b-7b", {"clip_qkv": 8.0}, r"clip_qkv: 8.0 changes the function and is not supported"),
    "glm-groups": ("glm-4.5-air", {"n_group": 8, "topk_group": 4}, r"n_group: 8 changes the function"),
    "ernie-bias": ("ernie-4.5-21b-a3b", {"use_bias": True}, r"use_bias: True changes the function"),
    "ernie-gate": ("ernie-4.5-21b-a3b", {"moe_gate": "top2"}, r"moe_gate: 'top2' changes the function"),
    "experts-of-a-token": ("gpt-oss-20b", {"experts_per_token": 2}, r"experts_per_token: 2 is an unknown key"),
    "gpt-oss-activation": ("gpt-oss-20b", {"hidden_act": "gelu"}, r"hidden_act: 'gelu' changes the function"),
    "no-experts": ("qwen3-30b-a3b", {"mlp_only_layers": list(range(48))}, r"leaves no layer with experts"),
    "no-step": ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, r"decoder_sparse_step: 0 is no number of layers"),
    "too-few": ("mixtral-8x7b", {"num_local_experts": 1}, r"router.top_k=2 exceeds experts=1"),
    "no-shared": ("glm-4.5-air", {"n_shared_experts": 0}, r"n_shared_experts: 0 is no width"),
    "latent": ("glm-4.5-air", {"model_type": "deepseek_v3"}, r"'deepseek_v3' is not read: .*latent space \(MLA\)"),
    "chunks": ("mixtral-8x7b", {"model_type": "llama4_text"}, r"'llama4_text' is not read: its attention sees chunks"),
    "sparsemixer": ("mixtral-8x7b", {"model_type": "phimoe"}, r"'phimoe' is not read: its router is SparseMixer"),
}  # fmt: skip
"""Options that are not carried: the config, changes to it, and what is said of them."""
