"""Families with experts that are read, as rows of convert/families/table.py: model_type, defaults, and the rest.

Defaults are those of transformers 5.23's config classes. What only trains a router (losses, noise) is known not to
matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.hf.rotary import FULL, LOCAL
from convert.families import quirks
from convert.families.config import Config

TRAINING = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
FURTHER = frozenset({"num_nextn_predict_layers", "num_mtp_layers"})
"""Layers that predict tokens beyond the next one: no part of the function."""


def every_second(c: Config, depth: int) -> list[str]:
    """Qwen2-MoE: of the layers below `max_window_layers` every second has a window, if there is one."""
    below, on = c.take("max_window_layers", int), c.peek("use_sliding_window")
    return [LOCAL if on and i % 2 == 0 and below is not None and i < below else FULL for i in range(depth)]


def windowed_from(c: Config, depth: int) -> list[str]:
    """dots1: windows from `max_window_layers` on, if there is a window."""
    first, window = c.take("max_window_layers", int, optional=True), c.peek("sliding_window")
    return [LOCAL if window is not None and i >= (first or 0) else FULL for i in range(depth)]


def counted(c: Config) -> None:
    """The number of experts has two names."""
    c.rename("num_local_experts", "num_experts")


def gpt_oss(c: Config) -> None:
    """The first release says the experts of a token twice; without rotary settings the class has its own."""
    c.rename("experts_per_token", "num_experts_per_tok")
    if c.data.get("rope_parameters") is None and not c.data.get("rope_scaling"):
        c.data["rope_parameters"] = {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        }  # fmt: skip


def minimax(c: Config) -> None:
    """The first release counts the rotated dimensions of a head."""
    turning, head_dim = c.data.pop("rotary_dim", None), c.peek("head_dim")
    if isinstance(turning, int) and isinstance(head_dim, int) and head_dim > 0:
        c.data.setdefault("partial_rotary_factor", turning / head_dim)
    elif turning is not None:
        c.bad("rotary_dim", turning, "is no number of dimensions", "partial_rotary_factor says the share of a head")


QWEN = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False, "sliding_window": 4096}
SCALES = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0}
GROUPS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
SHARED = {"shared_intermediate_size": 0}

ROWS: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
    ("mixtral", {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None}, {}),
    ("qwen2_moe", {**QWEN, "num_key_value_heads": 16, "max_window_layers": 28, "qkv_bias": True},
     {"layer_types": every_second, "tidy": counted, "ignored": frozenset({"max_window_layers"})}),
    ("qwen3_moe", {**QWEN, "num_key_value_heads": 4},
     {"tidy": counted, "ignored": frozenset({"max_window_layers"})}),
    ("olmoe", {"rms_norm_eps": 1e-5, "norm_topk_prob": False}, {"tidy": counted, "neutral": {"clip_qkv": (None,)}}),
    ("flex_olmo", {"rope_theta": 5e5, "norm_topk_prob": False}, {"tidy": counted}),
    ("granitemoe", SCALES, {}),
    ("granitemoeshared", {**SCALES, **SHARED}, {}),
    ("granitemoe_swa", {**SCALES, **SHARED, "sliding_window": 128, "layer_rope_theta": None},
     {"layer_types": quirks.alternating(4, first=True)}),
    ("gpt_oss", {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 64, "attention_bias": True,
                 "sliding_window": 128, "rope_theta": 150000.0, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
     {"tidy": gpt_oss, "layer_types": quirks.alternating(2), "ignored": frozenset({"initial_context_length"}),
      "neutral": {"hidden_act": ("silu",)}}),
    ("glm4_moe", {**GROUPS, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "partial_rotary_factor": 0.5,
                  "use_qk_norm": False, "first_k_dense_replace": 1, "n_shared_experts": 1},
     {"recomputed": r"model\.layers\.(46|92)\..*"}),
    ("dots1", {**GROUPS, "num_key_value_heads": 32, "norm_topk_prob": False, "first_k_dense_replace": 0,
               "sliding_window": 4096, "max_window_layers": 62},
     {"layer_types": windowed_from, "ignored": frozenset({"max_window_layers"})}),
    ("solar_open", {**GROUPS, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6,
                    "n_shared_experts": 1},
     {"ignored": frozenset({"intermediate_size", "first_k_dense_replace"})}),
    ("exaone_moe", {**GROUPS, "rms_norm_eps": 1e-5, "num_key_value_heads": 32, "routed_scaling_factor": 2.5,
                    "sliding_window": 4096, "sliding_window_pattern": 4, "mlp_layer_types": None,
                    "first_k_dense_replace": 1, "num_shared_experts": 1},
     {"tidy": counted, "layer_types": quirks.exaone4, "ignored": frozenset({"sliding_window_pattern"}),
      "recomputed": r"mtp.*"}),
    ("ernie4_5_moe", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "num_key_value_heads": 4, "rope_theta": 5e5,
                      "use_bias": False, "moe_norm_min": 1e-12, "moe_layer_start_index": 1, "moe_layer_end_index": -1,
                      "moe_layer_interval": 1, "moe_num_shared_experts": 2},
     {"recomputed": r"(.*\.)?mtp.*", "ignored": frozenset({"moe_capacity"}),
      "neutral": {"moe_gate": ("topk",), "moe_use_aux_free": (True,)}}),
    ("minimax_m2", {"num_key_value_heads": 8, "head_dim": 128, "rope_theta": 5e6},
     {"tidy": minimax,
      "neutral": {"scoring_func": ("sigmoid",), "use_routing_bias": (True,), "use_qk_norm": (True,),
                  "qk_norm_type": ("per_layer",), "shared_intermediate_size": (0,)}}),
)  # fmt: skip

UNREAD: Mapping[str, str] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
                     "kimi_k2", "axk1", "axk2", "mistral4", "mistral_large4"),
                    "its attention keeps keys and values in a latent space (MLA), for which the spec has no field"),
    "llama4": "its attention sees chunks, and its experts' inputs are scaled by the router",
    "llama4_text": "its attention sees chunks, and its experts' inputs are scaled by the router",
    "phimoe": "its router is SparseMixer, whose weights depend on which scores lie near the best one",
    **dict.fromkeys(("hunyuan_v1_moe", "hunyuan_v1_dense"), "it norms queries and keys after their rotation"),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "granitemoehybrid", "jamba", "nemotron_h",
                     "minimax", "lfm2_moe", "bailing_hybrid", "kimi_linear"),
                    "some of its layers are no attention"),
}  # fmt: skip
"""Mixtures that the spec does not express, and why."""

COVERS: Mapping[str, str] = {
    "mixtral": "Mixtral 8x7B and 8x22B", "qwen2_moe": "Qwen 1.5 MoE, Qwen 2 57B-A14B", "qwen3_moe": "Qwen 3 MoE",
    "olmoe": "OLMoE", "flex_olmo": "FlexOlmo", "granitemoe": "Granite 3 MoE", "granitemoeshared": "Granite MoE shared",
    "granitemoe_swa": "Granite MoE with windows", "gpt_oss": "GPT-OSS 20B and 120B", "glm4_moe": "GLM 4.5 and 4.6",
    "dots1": "dots.llm1", "solar_open": "Solar Open", "exaone_moe": "EXAONE MoE", "ernie4_5_moe": "ERNIE 4.5 MoE",
    "minimax_m2": "MiniMax M2",
}  # fmt: skip
"""Models by their own names, for the documentation."""
