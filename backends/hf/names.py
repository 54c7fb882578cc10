"""Names and layouts of weights in transformers' architectures: one table each, read in both directions.

A row is a canonical module (or several that are stored as one) and the module that holds it; `.weight` and `.bias` are
the same on both sides. Rows of which a spec has nothing are idle, so relatives share a table.
"""

from __future__ import annotations

from collections.abc import Mapping

from spec.layout import Concat, ConcatGrouped, Op, RopeInterleave, Rule, Transpose

Target = str | tuple[str | Op, ...]
Rows = Mapping[str, Target]

QKV = "attn.q attn.k attn.v"
GATE_UP = "mlp.gate mlp.up"


def table(top: Rows, prefix: str, layer: Rows, sinks: str = "") -> tuple[Rule, ...]:
    """Rules of an architecture. Keys with blanks are several canonical modules that are stored as one; a tuple is the
    external name and the operations on the way. prefix: what a layer's names begin with."""
    out: list[Rule] = []
    for before, inside, rows in (("", "", top), ("layers.{i}.", prefix, layer)):
        for canonical, target in rows.items():
            name, *ops = (target,) if isinstance(target, str) else target
            for leaf in ("weight", "bias"):
                stems = [f"{before}{stem}.{leaf}" for stem in canonical.split()]
                out.append(Rule(stems, f"{inside}{name}.{leaf}", *(op for op in ops if isinstance(op, Op))))
    if sinks:
        out.append(Rule("layers.{i}.attn.sinks", prefix + sinks))
    return tuple(out)


MODEL: Rows = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
LAYERS = "model.layers.{i}."
PRE: Rows = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
POST: Rows = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
SANDWICH: Rows = {
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip
SEPARATE: Rows = {
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm", "attn.o": "self_attn.o_proj",
}  # fmt: skip
NEIGHBOURS: Rows = {
    **SEPARATE,
    "attn.q": ("self_attn.q_proj", RopeInterleave()),
    "attn.k": ("self_attn.k_proj", RopeInterleave()),
}
GLU: Rows = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
FUSED_GLU: Rows = {GATE_UP: ("mlp.gate_up_proj", Concat()), "mlp.down": "mlp.down_proj"}

LLAMA = table(MODEL, LAYERS, {**PRE, **SEPARATE, **GLU}, sinks="self_attn.sinks")
"""Llama and its many relatives."""
GEMMA2 = table(MODEL, LAYERS, {**SANDWICH, **SEPARATE, **GLU})
VAULTGEMMA = table(
    MODEL, LAYERS, {"attn_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm", **SEPARATE, **GLU}
)
OLMO2 = table(MODEL, LAYERS, {**POST, **SEPARATE, **GLU})
COHERE = table(MODEL, LAYERS, {**PRE, **NEIGHBOURS, **GLU})
GLM = table(MODEL, LAYERS, {**PRE, **NEIGHBOURS, **FUSED_GLU})
GLM4 = table(
    MODEL,
    LAYERS,
    {**PRE, "attn_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm",
     **NEIGHBOURS, **FUSED_GLU},
)  # fmt: skip
PHI3 = table(MODEL, LAYERS, {**PRE, QKV: ("self_attn.qkv_proj", Concat()), "attn.o": "self_attn.o_proj", **FUSED_GLU})
PHI = table(
    {**MODEL, "final_norm": "model.final_layernorm"},
    LAYERS,
    {**PRE, **SEPARATE, "attn.q_norm": "self_attn.q_layernorm", "attn.k_norm": "self_attn.k_layernorm",
     "attn.o": "self_attn.dense", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
)  # fmt: skip
PERSIMMON = table(
    {**MODEL, "final_norm": "model.final_layernorm"},
    LAYERS,
    {**PRE, QKV: ("self_attn.query_key_value", ConcatGrouped()), "attn.q_norm": "self_attn.q_layernorm",
     "attn.k_norm": "self_attn.k_layernorm", "attn.o": "self_attn.dense", "mlp.up": "mlp.dense_h_to_4h",
     "mlp.down": "mlp.dense_4h_to_h"},
)  # fmt: skip
STARCODER2 = table(MODEL, LAYERS, {**PRE, **SEPARATE, "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"})
GPT2 = table(
    {"embed": "transformer.wte", "positions": "transformer.wpe", "final_norm": "transformer.ln_f", "head": "lm_head"},
    "transformer.h.{i}.",
    {"attn_norm": "ln_1", "mlp_norm": "ln_2", QKV: ("attn.c_attn", Concat(), Transpose()),
     "attn.o": ("attn.c_proj", Transpose()), "mlp.up": ("mlp.c_fc", Transpose()),
     "mlp.down": ("mlp.c_proj", Transpose())},
)  # fmt: skip
OPT = table(
    {"embed": "model.decoder.embed_tokens", "positions": "model.decoder.embed_positions",
     "final_norm": "model.decoder.final_layer_norm", "head": "lm_head"},
    "model.decoder.layers.{i}.",
    {**SEPARATE, "attn_norm": "self_attn_layer_norm", "attn.o": "self_attn.out_proj", "mlp_norm": "final_layer_norm",
     "mlp.up": "fc1", "mlp.down": "fc2"},
)  # fmt: skip
GPT_NEOX = table(
    {"embed": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "embed_out"},
    "gpt_neox.layers.{i}.",
    {**PRE, QKV: ("attention.query_key_value", ConcatGrouped()), "attn.o": "attention.dense",
     "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"},
)  # fmt: skip
BLOOM = table(
    {"embed": "transformer.word_embeddings", "embed_norm": "transformer.word_embeddings_layernorm",
     "final_norm": "transformer.ln_f", "head": "lm_head"},
    "transformer.h.{i}.",
    {**PRE, QKV: ("self_attention.query_key_value", ConcatGrouped()), "attn.o": "self_attention.dense",
     "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"},
)  # fmt: skip
"""BLOOM's, and Falcon's but for layers with two norms side by side."""
FALCON = table(
    {"embed": "transformer.word_embeddings", "final_norm": "transformer.ln_f", "head": "lm_head"},
    "transformer.h.{i}.",
    {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp", QKV: ("self_attention.query_key_value", ConcatGrouped()),
     "attn.o": "self_attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"},
)  # fmt: skip
MPT = table(
    {"embed": "transformer.wte", "final_norm": "transformer.norm_f", "head": "lm_head"},
    "transformer.blocks.{i}.",
    {"attn_norm": "norm_1", "mlp_norm": "norm_2", QKV: ("attn.Wqkv", Concat()), "attn.o": "attn.out_proj",
     "mlp.up": "ffn.up_proj", "mlp.down": "ffn.down_proj"},
)  # fmt: skip

FUSED_BY_SERVERS = (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"))
"""Modules of a layer that vLLM computes as one product, and therefore wants at one precision."""

RENAMED = {"embed_out": "lm_head"}
"""Modules that transformers calls otherwise once they are loaded (GPT-NeoX files keep the older name)."""
