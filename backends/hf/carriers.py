"""What each transformers architecture computes, as data: one row an architecture, read from its modeling code.

transformers owns its graphs, so a spec is carried by choosing the architecture whose forward pass computes it. A field
of `Carrier` says what the code has (`optional`, `required`) or lacks (`no`), what config.json tells it under which key,
and what is hard-coded. Whatever is required and missing in a spec is filled with its neutral value (a zero bias, a gain
of one, a sink of -32768).

Read from transformers 5.23. Where an architecture has an option that would change the function beyond what the spec
language says (rotation after QK-norm, bfloat16 ALiBi slopes in Falcon), it has no row or the option is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from backends.hf import expert_names, names
from backends.hf.mixture import Mixture, Need
from spec.layout import Rule

KEYS: Mapping[str, str] = {
    "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden": "intermediate_size",
    "context": "max_position_embeddings", "activation": "hidden_act", "eps": "rms_norm_eps",
    "std": "initializer_range", "attention_dropout": "attention_dropout",
}  # fmt: skip
"""config.json's usual names; an empty one is not written."""

SCALINGS = frozenset({"linear", "dynamic", "llama3", "yarn", "longrope"})


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """One architecture. Defaults are those of Llama without its options."""

    arch: str
    """config.json's model_type."""
    model: str
    """The class that config.json names."""
    rules: tuple[Rule, ...] = field(default=names.LLAMA, repr=False)
    also: tuple[tuple[Rule, ...], ...] = field(default=(), repr=False)
    """Other layouts of its weights that are read."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Where config.json's names differ from `KEYS`."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys that choose this variant of the code; dots lead into nested objects."""

    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """All norms but QK-norms; one epsilon for all norms."""
    norm_weight: bool = True
    norm_bias: bool = False
    """Norms of a kind that has a bias always have one."""
    offset: float = 0.0
    """Added to stored gains, QK-norms' too."""
    eps: float | None = None
    """An epsilon that is hard-coded."""
    placement: Literal["pre", "post", "sandwich"] = "pre"
    flow: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"sequential": {}})
    """`sequential`, `parallel` (two norms), `shared` (one norm feeds attention and MLP), each with its keys."""
    embed_norm: bool = False
    """Whether there is a norm after the embedding (then it is required)."""

    rope: Literal["half", "neighbours", "none"] = "half"
    """Which pairs rotate: (i, i + rotary / 2), or (2i, 2i + 1)."""
    partial: bool = False
    """Whether fewer dimensions than head_dim may rotate."""
    scaling: frozenset[str] = SCALINGS
    """Kinds of scaling that are computed as the spec means them."""
    original_context: str = ""
    """A key of its own for LongRoPE's original context, which wins over the one in `rope_parameters`."""
    rope_by: Literal["", "window", "layer"] = ""
    """Settings for layers with and without a window each, or a base for every layer."""
    no_position: Literal["no", "list", "theta", "global", "windowed"] = "no"
    """Layers without rotation: none; any, by a list; any, by a base of 0; exactly those without a window; the same but
    only where some layer has a window."""
    alibi: bool = False
    """Whether attention has ALiBi with max_bias 8 (then it is required)."""
    positions: int | None = None
    """The offset of learned positions, where there are any (then they are required)."""

    square: bool = False
    """Whether heads * head_dim must equal the width."""
    divisible: bool = False
    """Whether loading insists that the number of heads divides the width."""
    gqa: bool = True
    """Whether there may be fewer kv-heads than heads."""
    mqa: bool = False
    """Whether there is one kv-head."""
    biases: tuple[tuple[str, str], ...] = (("attention_bias", "q k v o"), ("mlp_bias", "gate up down"))
    """Groups of biases that are there together, by a key; an empty key: always."""
    qk_norm: Need = "no"
    qk_kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    qk_over: Literal["head", "width"] = "head"
    qk_bias: bool = False
    qk_key: str = ""
    scale: Literal["", "value", "inverse_square"] = ""
    """How the attention scale is told, under `scale_key`; else it is head_dim^-0.5. An inverse square is an integer."""
    scale_key: str = ""
    softcap: str = ""
    """Key of a soft cap on attention scores."""
    clip: str = ""
    sinks: Need = "no"
    window: Literal["no", "all", "layers"] = "no"
    """One window in all layers, or in those that `layer_types` names."""
    window_required: bool = False
    """Whether a window's size must be given though no layer uses it."""
    window_switch: bool = False
    """Whether `use_sliding_window` turns windows on."""

    gated: bool = True
    activation: str = ""
    """A hard-coded one; else config.json names it."""
    lacks: frozenset[str] = frozenset()
    """Activations that it has a name for and computes as another."""
    hidden_times: int = 0
    """MLP width in multiples of the model's, where it is hard-coded."""
    mixture: Mixture | None = None
    """The experts that some layers have (then there are such layers)."""

    embed_scale: str = ""
    """`sqrt_width`, or a key."""
    residual_scale: str = ""
    logit_scale: str = ""
    logit_divides: bool = False
    logit_softcap: str = ""
    wide_scores: bool = False
    """Whether 16-bit levels round the ALiBi biases, which grow with the position."""
    rounds_tables: bool = True
    """Whether 16-bit models round cos and sin before they rotate."""
    rounds_gains: bool = True
    """Whether 16-bit models round what an RMSNorm multiplies its gain with."""
    packs: bool = True
    """Whether transformers can load this code's products packed."""

    @property
    def apart(self) -> bool:
        """Whether files hold each expert by itself; the last of `also` has them stacked."""
        return any("{e}" in name for r in self.rules for name in r.external)


ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "relu": "relu",
    "relu2": "relu2",
}  # fmt: skip
"""The spec's names to transformers'."""

Fields = dict[str, Any]

NO_BIAS: Fields = {"biases": ()}
ATTENTION_BIAS: Fields = {"biases": (("attention_bias", "q k v o"),)}
LAYER_WINDOWS: Fields = {"window": "layers", "window_required": True}
SWITCHED: Fields = {"window": "layers", "window_switch": True}
GEMMA: Fields = {**ATTENTION_BIAS, "offset": 1.0, "embed_scale": "sqrt_width", "rounds_gains": False}
GEMMA2: Fields = {
    **GEMMA, **LAYER_WINDOWS, "keys": {"activation": "hidden_activation"}, "divisible": True,
    "scale": "inverse_square", "scale_key": "query_pre_attn_scalar", "logit_softcap": "final_logit_softcapping",
}  # fmt: skip
GRANITE: Fields = {
    "scale": "value", "scale_key": "attention_multiplier", "embed_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling", "logit_divides": True,
}  # fmt: skip
LAYERNORM: Fields = {"norm": "layernorm", "norm_bias": True, "keys": {"eps": "layer_norm_eps"}, "rounds_gains": False}
PLAIN: Fields = {"gated": False}
OLMO: Fields = {**ATTENTION_BIAS, "rounds_tables": False, "rounds_gains": False}
MHA: Fields = {"square": True, "gqa": False}
FALCON: Fields = {
    **LAYERNORM, **PLAIN, "square": True, "packs": False, "biases": (("bias", "q k v o up down"),),
    "keys": {"kv_heads": "", "head_dim": "", "hidden": "ffn_hidden_size", "activation": "activation",
             "eps": "layer_norm_epsilon", "residual_dropout": "hidden_dropout"},
}  # fmt: skip
NEW_FALCON: Mapping[str, Any] = {"alibi": False, "parallel_attn": True, "multi_query": False}
HIDDEN_DROPOUT: Fields = {"keys": {"residual_dropout": "hidden_dropout"}}
PDROP: Fields = {"keys": {"residual_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop"}}
OLD_FALCON: Mapping[str, Mapping[str, Any]] = {
    "sequential": {"parallel_attn": False},
    "shared": {"parallel_attn": True},
}
EVERY_BIAS: Fields = {"biases": (("", "q k v o up down"),)}
GPT2_KEYS = {
    "width": "n_embd", "depth": "n_layer", "heads": "n_head", "kv_heads": "", "head_dim": "", "hidden": "n_inner",
    "context": "n_positions", "activation": "activation_function", "eps": "layer_norm_epsilon",
    "attention_dropout": "attn_pdrop", "residual_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop",
}  # fmt: skip

NO_GROUPS: Fields = {"constants": {"n_group": 1, "topk_group": 1}}
DEEPSEEK: Fields = {**NO_GROUPS, "rules": expert_names.DEEPSEEK, "also": (expert_names.DEEPSEEK_STACKED,)}
CORRECTED: Fields = {"score": "sigmoid", "correction": True}
GROUPED: Fields = {
    **CORRECTED, "least": 2, "renormalise": "norm_topk_prob", "scale": "routed_scaling_factor", "shared": "required",
    "shared_times": True, "wide": ("router.correction",),
}  # fmt: skip
DEEPSEEK_EXPERTS: Fields = {**GROUPED, "experts": "n_routed_experts", "shared_hidden": "n_shared_experts"}
LOCAL_EXPERTS: Fields = {"experts": "num_local_experts", "hidden": "intermediate_size"}
QWEN_EXPERTS: Fields = {"dense": "steps", "renormalise": "norm_topk_prob"}
OLMO_EXPERTS: Fields = {"hidden": "intermediate_size", "renormalise": "norm_topk_prob"}
GRANITE_EXPERTS: Fields = {
    **GRANITE, **ATTENTION_BIAS, "rules": expert_names.GRANITE, "also": (expert_names.GRANITE_STACKED,),
}  # fmt: skip
QWEN_NAMES: Fields = {"rules": expert_names.QWEN, "also": (expert_names.QWEN_STACKED,)}


def _row(arch: str, model: str, *shared: Fields, **fields: Any) -> Carrier:
    merged: Fields = {}
    for s in (*shared, fields):
        keys = {**merged.get("keys", {}), **s.get("keys", {})}
        merged |= {**s, **({"keys": keys} if keys else {})}
    return Carrier(arch=arch, model=model if "Head" in model else f"{model}ForCausalLM", **merged)


CARRIERS: tuple[Carrier, ...] = (
    _row("llama", "Llama", divisible=True),
    _row("mistral", "Mistral", NO_BIAS, window="all"),
    _row("ministral", "Ministral", NO_BIAS, LAYER_WINDOWS),
    _row("qwen2", "Qwen2", SWITCHED, biases=(("", "q k v"),)),
    _row("qwen3", "Qwen3", ATTENTION_BIAS, SWITCHED, qk_norm="required"),
    _row("smollm3", "SmolLM3", SWITCHED, no_position="list"),
    _row("granite", "Granite", GRANITE),
    _row("granite_swa", "GraniteSWA", GRANITE, LAYER_WINDOWS, sinks="required", rope_by="layer", no_position="theta"),
    _row("arcee", "Arcee", PLAIN, divisible=True, biases=(("attention_bias", "q k v o"), ("mlp_bias", "up down"))),
    _row("seed_oss", "SeedOss", keys={"residual_dropout": "residual_dropout"},
         biases=(("attention_bias", "q k v"), ("attention_out_bias", "o"), ("mlp_bias", "gate up down"))),
    _row("helium", "Helium", rules=names.COHERE, rope="neighbours", square=True, rounds_gains=False,
         biases=(("attention_bias", "q k v"), ("mlp_bias", "gate up down"))),
    _row("ernie4_5", "Ernie4_5", rules=names.COHERE, rope="neighbours", rounds_tables=False,
         keys={"attention_dropout": ""}, biases=(("use_bias", "q k v o gate up down"),)),
    _row("phi3", "Phi3", NO_BIAS, PDROP, rules=names.PHI3, square=True, partial=True, scaling=frozenset({"longrope"}),
         original_context="original_max_position_embeddings", window="all"),
    _row("glm", "Glm", rules=names.GLM, rope="neighbours", partial=True, biases=(("attention_bias", "q k v"),)),
    _row("gemma", "Gemma", GEMMA, lacks=frozenset({"gelu"})),
    _row("vaultgemma", "VaultGemma", GEMMA2, rules=names.VAULTGEMMA, softcap="attn_logit_softcapping"),
    _row("gemma2", "Gemma2", GEMMA2, rules=names.GEMMA2, placement="sandwich", softcap="attn_logit_softcapping"),
    _row("gemma3_text", "Gemma3", GEMMA2, rules=names.GEMMA2, placement="sandwich", qk_norm="required",
         rope_by="window", scaling=frozenset({"linear", "llama3", "yarn"})),
    _row("glm4", "Glm4", rules=names.GLM4, placement="sandwich", rope="neighbours", partial=True,
         biases=(("attention_bias", "q k v"),)),
    _row("olmo2", "Olmo2", OLMO, rules=names.OLMO2, placement="post", qk_norm="required", qk_over="width"),
    _row("olmo3", "Olmo3", OLMO, LAYER_WINDOWS, rules=names.OLMO2, placement="post", qk_norm="required",
         qk_over="width", rope_by="window", scaling=frozenset({"linear", "llama3", "yarn"})),
    _row("exaone4", "Exaone4", NO_BIAS, rules=names.OLMO2, placement="post", qk_norm="required", window="layers",
         no_position="windowed"),
    _row("gpt2", "GPT2LMHeadModel", LAYERNORM, PLAIN, MHA, EVERY_BIAS, rules=names.GPT2, keys=GPT2_KEYS, rope="none",
         positions=0, packs=False),
    _row("opt", "OPT", LAYERNORM, PLAIN, MHA, rules=names.OPT, rope="none", positions=2, eps=1e-5,
         biases=(("enable_bias", "q k v o up down"),),
         keys={"kv_heads": "", "head_dim": "", "hidden": "ffn_dim", "activation": "activation_function", "eps": "",
               "std": "init_std", "residual_dropout": "dropout"},
         constants={"do_layer_norm_before": True, "layer_norm_elementwise_affine": True}),
    _row("stablelm", "StableLm", LAYERNORM, HIDDEN_DROPOUT, partial=True, square=True,
         keys={"head_dim": ""}, biases=(("use_qkv_bias", "q k v"),), constants={"qk_layernorm": False},
         flow={"sequential": {"use_parallel_residual": False}, "shared": {"use_parallel_residual": True}}),
    _row("olmo", "Olmo", OLMO, norm="layernorm", norm_weight=False, eps=1e-5, keys={"eps": ""},
         clip="clip_qkv"),
    _row("starcoder2", "Starcoder2", LAYERNORM, PLAIN, rules=names.STARCODER2,
         keys={"eps": "norm_epsilon", "residual_dropout": "residual_dropout",
               "embedding_dropout": "embedding_dropout"},
         biases=(("use_bias", "q k v o up down"),), window="all"),
    _row("gpt_neox", "GPTNeoX", LAYERNORM, HIDDEN_DROPOUT, PLAIN, MHA, rules=names.GPT_NEOX, partial=True,
         biases=(("attention_bias", "q k v o"), ("", "up down")), keys={"kv_heads": "", "head_dim": ""},
         flow={"sequential": {"use_parallel_residual": False}, "parallel": {"use_parallel_residual": True}}),
    _row("phi", "Phi", LAYERNORM, PDROP, PLAIN, rules=names.PHI, flow={"shared": {}}, partial=True, square=True,
         keys={"head_dim": ""}, biases=(("", "q k v o up down head"),), qk_norm="optional", qk_kind="layernorm",
         qk_bias=True, qk_key="qk_layernorm"),
    _row("persimmon", "Persimmon", LAYERNORM, HIDDEN_DROPOUT, PLAIN, MHA, EVERY_BIAS, rules=names.PERSIMMON,
         partial=True, keys={"kv_heads": "", "head_dim": ""}, qk_norm="optional", qk_kind="layernorm", qk_bias=True,
         qk_key="qk_layernorm"),
    _row("nemotron", "Nemotron", LAYERNORM, PLAIN, offset=1.0, partial=True, keys={"eps": "norm_eps"},
         biases=(("attention_bias", "q k v o"), ("mlp_bias", "up down"))),
    _row("jais2", "Jais2", LAYERNORM, PLAIN, divisible=True,
         biases=(("attention_bias", "q k v o"), ("mlp_bias", "up down"))),
    _row("cohere", "Cohere", ATTENTION_BIAS, norm="layernorm", rounds_gains=False, rules=names.COHERE,
         flow={"shared": {}}, rope="neighbours", keys={"eps": "layer_norm_eps"}, logit_scale="logit_scale",
         constants={"use_qk_norm": False}),
    _row("cohere2", "Cohere2", ATTENTION_BIAS, LAYER_WINDOWS, norm="layernorm", rounds_gains=False, rules=names.COHERE,
         flow={"shared": {}}, rope="neighbours", square=True, no_position="global",
         keys={"eps": "layer_norm_eps", "head_dim": ""}, logit_scale="logit_scale"),
    _row("falcon", "Falcon", FALCON, rules=names.BLOOM, flow=OLD_FALCON, mqa=True,
         constants={"alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    _row("falcon", "Falcon", FALCON, rules=names.BLOOM, flow=OLD_FALCON, gqa=False,
         constants={"alibi": False, "new_decoder_architecture": False, "multi_query": False}),
    _row("falcon", "Falcon", FALCON, rules=names.FALCON, flow={"parallel": {"num_ln_in_parallel_attn": 2}},
         keys={"kv_heads": "num_kv_heads"}, constants={**NEW_FALCON, "new_decoder_architecture": True}),
    _row("falcon", "Falcon", FALCON, rules=names.BLOOM, flow={"shared": {"num_ln_in_parallel_attn": 1}},
         keys={"kv_heads": "num_kv_heads"}, constants={**NEW_FALCON, "new_decoder_architecture": True}),
    _row("mpt", "Mpt", PLAIN, MHA, NO_BIAS, norm="layernorm", rounds_gains=False, rules=names.MPT, rope="none",
         alibi=True, activation="gelu", hidden_times=4, clip="attn_config.clip_qkv", scale="value",
         scale_key="attn_config.softmax_scale",
         keys={"width": "d_model", "depth": "n_layers", "heads": "n_heads", "kv_heads": "", "head_dim": "",
               "hidden": "", "context": "max_seq_len", "activation": "", "eps": "layer_norm_epsilon",
               "attention_dropout": ""},
         constants={"attn_config.alibi": True, "attn_config.alibi_bias_max": 8, "expansion_ratio": 4,
                    "no_bias": True}),
    _row("bloom", "Bloom", LAYERNORM, HIDDEN_DROPOUT, PLAIN, MHA, EVERY_BIAS, rules=names.BLOOM, rope="none",
         alibi=True, embed_norm=True, activation="gelu_tanh", hidden_times=4, wide_scores=True,
         keys={"depth": "n_layer", "heads": "n_head", "kv_heads": "", "head_dim": "", "hidden": "", "activation": "",
               "context": "seq_length", "eps": "layer_norm_epsilon"}),
    _row("mixtral", "Mixtral", NO_BIAS, rules=expert_names.MIXTRAL, also=(expert_names.MIXTRAL_STACKED,), window="all",
         mixture=Mixture(**LOCAL_EXPERTS)),
    _row("qwen3_moe", "Qwen3Moe", ATTENTION_BIAS, QWEN_NAMES, qk_norm="required", window="all", window_switch=True,
         mixture=Mixture(**QWEN_EXPERTS)),
    _row("qwen2_moe", "Qwen2Moe", QWEN_NAMES, SWITCHED, biases=(("qkv_bias", "q k v"),),
         mixture=Mixture(**QWEN_EXPERTS, shared="required", shared_hidden="shared_expert_intermediate_size",
                         shared_gate=True)),
    _row("olmoe", "Olmoe", ATTENTION_BIAS, QWEN_NAMES, qk_norm="required", qk_over="width", square=True,
         mixture=Mixture(**OLMO_EXPERTS)),
    _row("flex_olmo", "FlexOlmo", OLMO, rules=expert_names.FLEX, also=(expert_names.FLEX_STACKED,), placement="post",
         qk_norm="required", qk_over="width", mixture=Mixture(**OLMO_EXPERTS)),
    _row("granitemoe", "GraniteMoe", GRANITE_EXPERTS, mixture=Mixture(**LOCAL_EXPERTS)),
    _row("granitemoeshared", "GraniteMoeShared", GRANITE_EXPERTS,
         mixture=Mixture(**LOCAL_EXPERTS, shared="optional", shared_hidden="shared_intermediate_size")),
    _row("granitemoe_swa", "GraniteMoeSWA", GRANITE_EXPERTS, LAYER_WINDOWS, rules=expert_names.GRANITE_STACKED, also=(),
         sinks="required", rope_by="layer", no_position="theta",
         mixture=Mixture(**LOCAL_EXPERTS, shared="optional", shared_hidden="shared_intermediate_size")),
    _row("gpt_oss", "GptOss", LAYER_WINDOWS, rules=expert_names.GPT_OSS, also=(expert_names.GPT_OSS_BLOCKS,),
         biases=(("attention_bias", "q k v o"), ("", "gate up down")), sinks="required", rounds_gains=False,
         activation="clamped_swiglu", keys={"activation": ""},
         mixture=Mixture(**LOCAL_EXPERTS, bias=True, alpha="swiglu_alpha", limit="swiglu_limit")),
    _row("glm4_moe", "Glm4Moe", DEEPSEEK, partial=True, biases=(("attention_bias", "q k v"),), qk_norm="optional",
         qk_key="use_qk_norm", mixture=Mixture(**DEEPSEEK_EXPERTS, dense="first")),
    _row("dots1", "Dots1", ATTENTION_BIAS, DEEPSEEK, LAYER_WINDOWS, qk_norm="required",
         mixture=Mixture(**DEEPSEEK_EXPERTS, dense="first")),
    _row("solar_open", "SolarOpen", DEEPSEEK, biases=(("attention_bias", "q k v"),),
         keys={"hidden": ""}, mixture=Mixture(**DEEPSEEK_EXPERTS)),
    _row("exaone_moe", "ExaoneMoe", NO_BIAS, NO_GROUPS, rules=expert_names.EXAONE,
         also=(expert_names.DEEPSEEK, expert_names.DEEPSEEK_STACKED), qk_norm="required", window="layers",
         no_position="windowed", mixture=Mixture(**GROUPED, shared_hidden="num_shared_experts", dense="list")),
    _row("ernie4_5_moe", "Ernie4_5_Moe", NO_BIAS, rules=expert_names.ERNIE, also=(expert_names.ERNIE_STACKED,),
         rope="neighbours", rounds_tables=False, constants={"use_bias": False, "moe_norm_min": 1e-12},
         mixture=Mixture(experts="moe_num_experts", top_k="moe_k", correction=True, dense="span", shared="optional",
                         shared_hidden="moe_num_shared_experts", shared_times=True,
                         wide=("router.weight", "router.correction"))),
    _row("minimax_m2", "MiniMaxM2", NO_BIAS, rules=expert_names.MINIMAX, also=(expert_names.MINIMAX_STACKED,),
         partial=True, qk_norm="required", qk_over="width", mixture=Mixture(**LOCAL_EXPERTS, **CORRECTED)),
)  # fmt: skip
"""In order of preference: of two that carry a spec with as few rewrites, the earlier one is taken."""

BY_ARCH: Mapping[str, tuple[Carrier, ...]] = {
    arch: tuple(c for c in CARRIERS if c.arch == arch) for arch in dict.fromkeys(c.arch for c in CARRIERS)
}
"""The rows of an architecture: several where its code has variants that keys choose between."""


def told(config: Mapping[str, Any]) -> Carrier | None:
    """The row that a config.json names: of several, the one that it contradicts least."""

    def wrong(c: Carrier) -> int:
        return min(sum(_get(config, k) != v for k, v in {**c.constants, **f}.items()) for f in c.flow.values())

    return min(BY_ARCH.get(str(config.get("model_type")), ()), key=wrong, default=None)


def _get(config: Any, key: str) -> Any:
    """The value of a key, dots leading into nested objects."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config
