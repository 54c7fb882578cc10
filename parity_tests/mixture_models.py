"""Tiny random mixtures of experts of every family, made and saved by transformers itself, in odd shapes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parity_tests.family_models import CONTEXT, FREE, LISTED, SCALES, TIED, V, partial, scaling

BASE: dict[str, Any] = {
    "vocab_size": V, "num_hidden_layers": 4, "hidden_size": 20, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 12, "intermediate_size": 28, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
GQA: dict[str, Any] = {**FREE, "num_attention_heads": 6, "num_key_value_heads": 3}
SQUARE: dict[str, Any] = {"hidden_size": 36, "head_dim": 12}
WINDOW = {"sliding_window": 17}
SWITCH = {"use_sliding_window": True, **WINDOW}
FIVE = {"num_local_experts": 5, "num_experts_per_tok": 2}
ONE = {"num_local_experts": 3, "num_experts_per_tok": 1}
QWEN_FIVE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
QWEN_ONE = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
OLMO_FIVE = {"num_experts": 5, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 16}
DEEPSEEK_FIVE = {"n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 2}
DEEPSEEK_ONE = {"n_routed_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 12, "n_shared_experts": 1}
ERNIE_FIVE = {"moe_num_experts": 5, "moe_k": 2, "moe_intermediate_size": 12}
NORMED = {"norm_topk_prob": True}
PLAIN_WEIGHTS = {"norm_topk_prob": False}
YARN = scaling("yarn")

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {"five": FIVE, "one-window": {**GQA, **ONE, **WINDOW, **TIED}, "yarn": {**FIVE, **YARN}},
    "qwen2_moe": {
        "five": {**QWEN_FIVE, **SHARED},
        "one-windows": {**GQA, **QWEN_ONE, **SHARED, **NORMED, **SWITCH, "max_window_layers": 3},
        "dense-layers": {**QWEN_FIVE, **SHARED, "decoder_sparse_step": 2, **LISTED, **SWITCH, "qkv_bias": False},
        "listed": {**QWEN_FIVE, **SHARED, "mlp_only_layers": [0, 2], **TIED, **YARN},
    },
    "qwen3_moe": {
        "five": {**QWEN_FIVE, **NORMED},
        "one-window": {**GQA, **QWEN_ONE, **SWITCH, "attention_bias": True, **TIED},
        "dense-layers": {**QWEN_FIVE, "mlp_only_layers": [0, 3]},
        "yarn": {**QWEN_FIVE, "decoder_sparse_step": 2, **YARN},
    },
    "olmoe": {"five": {**SQUARE, **OLMO_FIVE}, "normed": {**SQUARE, **OLMO_FIVE, **NORMED, **TIED,
                                                          "attention_bias": True}},
    "flex_olmo": {"five": OLMO_FIVE, "normed": {**GQA, **OLMO_FIVE, **NORMED, **TIED, "attention_bias": True, **YARN}},
    "granitemoe": {"five": {**FIVE, **SCALES},
                   "one": {**GQA, **ONE, "attention_multiplier": 0.3, "attention_bias": True, **TIED, **YARN}},
    "granitemoeshared": {"shared": {**FIVE, **SCALES, "shared_intermediate_size": 16},
                         "unshared": {**GQA, **ONE, **SCALES, "attention_bias": True}},
    "granitemoe_swa": {"shared": {**FIVE, **SCALES, **WINDOW, "shared_intermediate_size": 16},
                       "nope": {**ONE, **SCALES, **WINDOW, "layer_rope_theta": [1e4, 100.0, 0, 1e4]}},
    "gpt_oss": {
        "five": {**FIVE, **WINDOW, **scaling("yarn", 150000.0, truncate=False)},
        "one": {**GQA, **ONE, **WINDOW, **LISTED, **TIED, "attention_bias": False, "swiglu_limit": 0.9,
                **scaling("default")},
        "alpha": {**FIVE, **WINDOW, "swiglu_alpha": 1.3, **scaling("default")},
    },
    "glm4_moe": {
        "five": DEEPSEEK_FIVE,
        "qk-norm": {**GQA, **DEEPSEEK_ONE, "attention_bias": True, **TIED, "use_qk_norm": True, **PLAIN_WEIGHTS,
                    "first_k_dense_replace": 2, "routed_scaling_factor": 2.5},
        "no-dense": {**DEEPSEEK_FIVE, "first_k_dense_replace": 0, **partial(0.5, "yarn")},
    },
    "dots1": {
        "five": {**DEEPSEEK_FIVE, **NORMED, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
        "windows": {**GQA, **DEEPSEEK_ONE, **WINDOW, "max_window_layers": 2, "attention_bias": True, **TIED},
    },
    "solar_open": {"five": DEEPSEEK_FIVE, "one": {**GQA, **DEEPSEEK_ONE, "attention_bias": True,
                                                  "routed_scaling_factor": 1.7, **PLAIN_WEIGHTS}},
    "exaone_moe": {
        "five": {**QWEN_FIVE, **WINDOW, "num_shared_experts": 2},
        "one": {**QWEN_ONE, **WINDOW, **LISTED, **TIED, "mlp_layer_types": ["sparse", "dense", "dense", "sparse"],
                "num_shared_experts": 1, **PLAIN_WEIGHTS},
    },
    "ernie4_5_moe": {
        "five": ERNIE_FIVE,
        "span": {**GQA, **ERNIE_FIVE, "moe_k": 1, "moe_num_shared_experts": 0, "moe_layer_interval": 2,
                 "tie_word_embeddings": False, "moe_layer_start_index": 0, **YARN},
    },
    "minimax_m2": {"five": FIVE, "partial": {**GQA, **ONE, **TIED, **partial(0.5)}},
}  # fmt: skip
"""Variants of each family by its own config's arguments, over `BASE`."""


def model(family: str, variant: str, dtype: str = "float32", changes: Mapping[str, Any] | None = None) -> Any:
    """A model in which every parameter and every correction is random: no gain is 1, no bias 0."""
    import torch
    import transformers

    config_class = transformers.CONFIG_MAPPING[family]
    usual = set(config_class().to_dict()) | {"head_dim"}
    arguments = {**{k: v for k, v in BASE.items() if k in usual}, **MODELS[family][variant], **(changes or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(**arguments)
        config._experts_implementation = "eager"
        out = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(5)
    tensors = [*out.named_parameters(), *((n, b) for n, b in out.named_buffers() if n.endswith("correction_bias"))]
    with torch.no_grad():
        for name, p in tensors:
            noise = torch.randn(p.shape, generator=generator)
            gain = p.dim() == 1 and name.endswith("weight")
            matrix = p.dim() > 1 and not name.endswith("bias")
            p.copy_(noise / p.shape[-1] ** 0.5 if matrix else noise * 0.3 + 0.8 * gain)
    return out.eval()


def save(family: str, variant: str, path: Path, dtype: str = "float32") -> Any:
    """The model, saved by transformers itself."""
    made = model(family, variant, dtype)
    made.save_pretrained(path)
    return made


def save_with(family: str, variant: str, changes: Mapping[str, Any], path: Path, dtype: str = "float32") -> None:
    """A model of other sizes."""
    model(family, variant, dtype, changes).save_pretrained(path)


def float64_logits(made: Any, ids: NDArray[Any]) -> NDArray[np.float64]:
    """transformers in float64, but for what it computes in float32 in any model: rotary tables, RMSNorm, softmax,
    routers."""
    import torch

    with torch.no_grad():
        return made.double()(torch.from_numpy(ids), use_cache=False).logits.numpy()
