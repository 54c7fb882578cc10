"""Tiny random models of every family, made and saved by transformers itself, in odd shapes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.hf.carriers import BY_ARCH

V, CONTEXT = 61, 320
"""A vocabulary that is no multiple of anything, and room for 256 tokens."""

FREE: dict[str, Any] = {"hidden_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}
GQA: dict[str, Any] = {"hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12}
SQUARE: dict[str, Any] = {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1}
EVEN: dict[str, Any] = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}
"""Where the number of heads must divide the width."""
MHA: dict[str, Any] = {"hidden_size": 36, "num_attention_heads": 3}
BASE: dict[str, Any] = {"vocab_size": V, "num_hidden_layers": 4, "intermediate_size": 52,
                        "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0,
                        "pad_token_id": None}  # fmt: skip

HALF = 6
"""Frequencies of a head of 12."""


def scaling(kind: str, theta: float = 1e4, half: int = HALF, **more: Any) -> dict[str, Any]:
    """`rope_parameters` with a boundary at 32 tokens."""
    fields: dict[str, dict[str, Any]] = {
        "default": {}, "linear": {"factor": 4.0}, "dynamic": {"factor": 2.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 32},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        "longrope": {"factor": 10.0, "original_max_position_embeddings": 32,
                     "short_factor": [1.0 + i / 8 for i in range(half)],
                     "long_factor": [2.0 + i for i in range(half)]},
    }  # fmt: skip
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields[kind], **more}}


def partial(fraction: float, kind: str = "default") -> dict[str, Any]:
    return scaling(kind, half=int(12 * fraction) // 2, partial_rotary_factor=fraction)


def by_window(**full: Any) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": 100.0}
    return {"rope_parameters": {"sliding_attention": local, "full_attention": {**scaling("default")["rope_parameters"],
                                                                               **full}}}  # fmt: skip


def scaled(shape: dict[str, Any], *kinds: str) -> dict[str, dict[str, Any]]:
    """A variant for each scaling."""
    return {k: {**shape, **scaling(k)} for k in kinds or ("linear", "dynamic", "llama3", "yarn", "longrope")}


LISTED = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}
WINDOW = {"sliding_window": 17}
SWITCH = {"use_sliding_window": True, **WINDOW}
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GEMMA = {**EVEN, **WINDOW, "query_pre_attn_scalar": 12}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 13.0}
GPT2 = {"n_embd": 36, "n_head": 3, "n_layer": 4, "n_positions": CONTEXT}
MPT = {"d_model": 36, "n_heads": 3, "n_layers": 4, "max_seq_len": CONTEXT}
BLOOM = {"hidden_size": 36, "n_head": 3, "n_layer": 4, "seq_length": CONTEXT}
OPT = {**MHA, "ffn_dim": 52, "word_embed_proj_dim": 36}
NEW_FALCON = {"new_decoder_architecture": True, "hidden_size": 72, "num_attention_heads": 6, "num_kv_heads": 3,
              "ffn_hidden_size": 52}  # fmt: skip

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"plain": EVEN, "tied-biased": {**EVEN, **BIASED, **TIED}, "gelu": {**EVEN, "hidden_act": "gelu"},
              **scaled(EVEN)},
    "mistral": {"window": {**FREE, **WINDOW}, "no-window": {**GQA, "sliding_window": None}, **scaled(FREE, "yarn")},
    "ministral": {"windows": {**FREE, **WINDOW, **LISTED}, "default": {**GQA, **WINDOW}, **scaled(GQA, "yarn")},
    "qwen2": {"plain": FREE, "windows": {**GQA, **SWITCH, "max_window_layers": 1}, **scaled(FREE, "dynamic", "yarn"),
              "tied": {**FREE, **TIED}},
    "qwen3": {"plain": FREE, "windows": {**GQA, **SWITCH, **LISTED}, "biased": {**FREE, "attention_bias": True},
              **scaled(GQA, "yarn")},
    "smollm3": {"nope": SQUARE, "listed": {**SQUARE, "no_rope_layers": [1, 0, 1, 1], **UNTIED},
                "windows": {**SQUARE, **SWITCH, "no_rope_layer_interval": 2, **BIASED}, **scaled(SQUARE, "yarn")},
    "granite": {"plain": {**SQUARE, "attention_multiplier": 0.3}, "scales": {**SQUARE, **SCALES, **TIED, **BIASED},
                **scaled({**SQUARE, "attention_multiplier": 0.3}, "llama3")},
    "granite_swa": {"default": {**SQUARE, **WINDOW, **SCALES},
                    "nope": {**SQUARE, **WINDOW, "layer_rope_theta": [1e4, 100.0, 0, 1e4], **UNTIED, **BIASED}},
    "arcee": {"plain": EVEN, "biased": {**EVEN, **BIASED, **TIED}, **scaled(EVEN, "yarn")},
    "seed_oss": {"plain": FREE, "biased": {**GQA, **BIASED, "attention_out_bias": True, **TIED},
                 **scaled(FREE, "yarn")},
    "helium": {"plain": {**SQUARE, "head_dim": 12}, "biased": {**SQUARE, "head_dim": 12, **BIASED, **TIED},
               **scaled({**SQUARE, "head_dim": 12}, "linear")},
    "ernie4_5": {"plain": FREE, "biased": {**GQA, "use_bias": True, **UNTIED}, **scaled(FREE, "dynamic")},
    "phi3": {"plain": {**SQUARE, **WINDOW}, "partial": {**SQUARE, **partial(0.5), **TIED},
             "longrope": {**SQUARE, **scaling("longrope"), "original_max_position_embeddings": 32},
             "longrope-partial": {**SQUARE, "sliding_window": 2 * CONTEXT, **partial(0.5, "longrope"),
                                  "original_max_position_embeddings": 32}},
    "glm": {"plain": FREE, "no-bias": {**GQA, "attention_bias": False, **partial(1.0), **TIED},
            **{k: {**FREE, **partial(0.5, k)} for k in ("linear", "yarn")}},
    "gemma": {"plain": FREE, "untied-biased": {**GQA, **UNTIED, "attention_bias": True}, **scaled(FREE, "linear")},
    "vaultgemma": {"default": GEMMA, "listed": {**GEMMA, **LISTED, **UNTIED}},
    "gemma2": {"default": GEMMA, "scalar": {**GEMMA, "query_pre_attn_scalar": 11}, **scaled(GEMMA, "linear"),
               "uncapped": {**GEMMA, **LISTED, "attn_logit_softcapping": None, "final_logit_softcapping": None},
               "untied": {**GEMMA, **UNTIED}},
    "gemma3_text": {"default": {**GEMMA, "num_hidden_layers": 7}, "scalar": {**GEMMA, "query_pre_attn_scalar": 11},
                    "listed": {**GEMMA, **LISTED, **by_window(), **UNTIED, "attention_bias": True},
                    "linear": {**GEMMA, **LISTED, **by_window(rope_type="linear", factor=8.0)},
                    "capped": {**GEMMA, "final_logit_softcapping": 5.0}},
    "glm4": {"plain": FREE, "no-bias": {**GQA, "attention_bias": False, **TIED}, "yarn": {**FREE,
                                                                                       **partial(0.5, "yarn")}},
    "olmo2": {"plain": SQUARE, "biased": {**SQUARE, "attention_bias": True, **TIED}, **scaled(SQUARE, "yarn")},
    "olmo3": {"default": {**SQUARE, **WINDOW},
              "yarn": {**SQUARE, **WINDOW, **LISTED, **by_window(rope_type="yarn", factor=4.0, beta_fast=16.0,
                                                                original_max_position_embeddings=32)}},
    "exaone4": {"default": {**FREE, **WINDOW}, "no-window": {**GQA, "sliding_window": None,
                                                             "layer_types": ["full_attention"] * 4},
                "listed": {**GQA, **WINDOW, **LISTED, **scaling("llama3"), **TIED}},
    "gpt2": {"plain": GPT2, "inner": {**GPT2, "n_inner": 52, "activation_function": "gelu", **UNTIED}},
    "opt": {"plain": OPT, "unbiased": {**OPT, "enable_bias": False, **UNTIED, "activation_function": "gelu"}},
    "stablelm": {"plain": {**SQUARE, **partial(0.5)},
                 "parallel": {**SQUARE, **partial(1.0), "use_parallel_residual": True, "use_qkv_bias": True, **TIED},
                 "yarn": {**SQUARE, **partial(0.5, "yarn")}},
    "olmo": {"plain": SQUARE, "clip": {**SQUARE, "clip_qkv": 0.4, **TIED, "attention_bias": True},
             **scaled(SQUARE, "linear")},
    "starcoder2": {"plain": SQUARE, "window": {**SQUARE, **WINDOW, **UNTIED}, "unbiased": {**SQUARE, "use_bias": False},
                   **scaled(SQUARE, "yarn")},
    "gpt_neox": {"parallel": {**MHA, **partial(0.5)},
                 "sequential": {**MHA, "use_parallel_residual": False, **partial(1.0)},
                 "unbiased": {**MHA, "attention_bias": False, **TIED, **partial(0.5, "linear")}},
    "phi": {"plain": SQUARE, "qk-norm": {**SQUARE, "qk_layernorm": True}, "linear": {**SQUARE,
                                                                                      **partial(0.5, "linear")}},
    "persimmon": {"plain": MHA, "no-qk-norm": {**MHA, "qk_layernorm": False, **TIED, "hidden_act": "gelu"}},
    "nemotron": {"plain": {**SQUARE, "head_dim": 12}, "free": FREE, "biased": {**GQA, **BIASED, **TIED},
                 "linear": {**FREE, **partial(0.5, "linear")}},
    "jais2": {"plain": {**SQUARE, "head_dim": 12}, **scaled(EVEN, "yarn"),
              "unbiased": {**EVEN, "attention_bias": False, "mlp_bias": False, **TIED}},
    "cohere": {"plain": SQUARE, "biased": {**SQUARE, "attention_bias": True, **UNTIED, "logit_scale": 0.5},
               **scaled(SQUARE, "dynamic")},
    "cohere2": {"default": {**SQUARE, **WINDOW}, "listed": {**SQUARE, **WINDOW, **LISTED, **UNTIED}},
    "falcon": {"multi-query": {**MHA, "ffn_hidden_size": 52}, "multi-query-sequential": {**MHA, "parallel_attn": False,
                                                                                         "bias": True},
               "many-heads": {**MHA, "multi_query": False, **UNTIED},
               "many-heads-sequential": {**MHA, "multi_query": False, "parallel_attn": False, "bias": True},
               "two-norms": NEW_FALCON, "one-norm": {**NEW_FALCON, "num_ln_in_parallel_attn": 1, "bias": True},
               **scaled(NEW_FALCON, "dynamic")},
    "mpt": {"plain": MPT, "clip": {**MPT, "attn_config": {"clip_qkv": 0.4, "softmax_scale": 0.2}, **UNTIED}},
    "bloom": {"plain": BLOOM, "untied": {**BLOOM, **UNTIED}},
}  # fmt: skip
"""Variants of each family by its own config's arguments, over `BASE`."""


def model(family: str, variant: str) -> Any:
    """A float32 model in which every parameter is random: no gain is 1, no bias 0, no score far from the others."""
    import torch
    import transformers

    config_class = transformers.CONFIG_MAPPING[family]
    usual = set(config_class().to_dict())
    base = {k: v for k, v in BASE.items() if k in usual}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(**{**base, **MODELS[family][variant]})
        out = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(5)
    mean = 0.8 - BY_ARCH[family][0].offset
    with torch.no_grad():
        for name, p in out.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.dim() > 1 else noise * 0.3 + mean * name.endswith("weight"))
    return out.eval()


def save(family: str, variant: str, path: Path) -> Any:
    """The model, saved by transformers itself."""
    made = model(family, variant)
    made.save_pretrained(path)
    return made


def float64_logits(made: Any, ids: NDArray[Any]) -> NDArray[np.float64]:
    """transformers in float64, but for what it computes in float32 in any model: rotary tables, RMSNorm, softmax."""
    import torch

    with torch.no_grad():
        return made.double()(torch.from_numpy(ids), use_cache=False).logits.numpy()
