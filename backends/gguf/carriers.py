"""What each llama.cpp architecture computes, as data: one row an architecture, read from its model source.

llama.cpp owns its graphs, so a spec is carried by choosing the architecture whose graph computes it. A field of
`Carrier` says what the graph has (`optional`, `required`) or lacks (`no`), what is read from metadata, and what is
hard-coded. Whatever is required and missing in a spec is filled with its neutral value (a zero bias, a gain of one).

`ggml_gelu` is the tanh form of GELU; the exact (erf) one is in no decoder graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Need = Literal["no", "optional", "required"]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What a graph has of mixtures of experts. Defaults are those of Mixtral's graph.

    Where there is more than one kind of score, `expert_gating_func` says which; the sum by which weights are divided
    is at least 2^-14 (no softmax without a correction has a smaller one).
    """

    layers: Literal["all", "none_or_all", "leading", "any"] = "all"
    """Which layers are mixtures: all; all or none; all behind the first `leading_dense_block_count`; any."""
    score: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax",)
    default_score: str = ""
    """Where a file does not say; empty: it has to."""
    renormalise: bool | None = True
    """Whether weights are divided by their sum; none: `expert_weights_norm` says."""
    scale: bool = False
    """Whether `expert_weights_scale` is read."""
    bias: Need = "no"
    """The router's bias."""
    correction: Need = "no"
    correction_name: str = "exp_probs_b.bias"
    activation: str = "silu"
    """Of gated experts; the numbers of `clamped_swiglu` are the spec's defaults."""
    expert_bias: Need = "no"
    """Biases of all three products of an expert."""
    hidden: Literal["own", "feed_forward"] = "own"
    """Which key says an expert's width: `expert_feed_forward_length`, or `feed_forward_length`."""
    shared: Need = "no"
    shared_gate: bool = False
    """Whether shared experts are gated: all or none of them."""
    shared_hidden: Literal["own", "multiple"] = "own"
    """A shared expert's width: `expert_shared_feed_forward_length`, or `expert_shared_count` times an expert's."""
    shared_fused: bool = False
    """Whether the shared expert's gate and up are one tensor, gate first."""


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """One architecture. Defaults are those of the plain Llama graph without its options."""

    arch: str

    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """All norms but QK-norms; one epsilon for all norms of a kind."""
    norm_bias: Need = "no"
    placement: Literal["pre", "post", "sandwich"] = "pre"
    flow: tuple[Literal["sequential", "parallel", "shared"], ...] = ("sequential",)
    """`parallel`: two norms; `shared`: one norm feeds attention and MLP."""
    embed_norm: bool = False
    """Whether there is a LayerNorm with bias after the embedding (then it is required)."""

    rope: Literal["interleaved", "half", "none"] = "half"
    """Which pairs rotate: neighbours (2i, 2i + 1), or (i, i + rotary / 2)."""
    partial: bool = False
    """Whether fewer dimensions than head_dim may rotate."""
    freqs: Literal["no", "freqs", "longrope", "both"] = "no"
    """Which tensors of frequency divisors are read: `rope_freqs`, `rope_factors_long/short`, or either by the kind
    of scaling."""
    scaling: frozenset[str] = frozenset({"linear", "yarn"})
    """Kinds of scaling that metadata alone expresses."""
    no_position: Literal["no", "all", "layer", "global"] = "no"
    """Layers without rotation: none of them, all by one switch, any by a per-layer array, exactly those without a
    window."""
    full_dims: float = 1.0
    """The graph rotates this share of `rope.dimension_count` in layers without a window."""
    alibi: Literal["no", "8", "key"] = "no"
    """ALiBi: none, hard-coded max_bias 8, or max_bias from metadata (0: no ALiBi)."""
    positions: Need = "no"
    """Learned positions."""

    square: bool = False
    """Whether heads * head_dim must equal the width."""
    every_head: bool = False
    """Whether there must be as many kv-heads as heads."""
    fused_qkv: bool = False
    qkv_bias: Need = "optional"
    o_bias: Need = "no"
    qk_norm: Need = "no"
    qk_kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    qk_over: Literal["head", "heads", "width"] = "head"
    """`head`: one gain for all heads; `heads`: one a head, normed head by head; `width`: over the projection."""
    qk_bias: Need = "no"
    scale: bool = False
    """Whether the attention scale is read; else it is head_dim^-0.5."""
    wide_scale_depth: int = 0
    """At this depth the hard-coded scale is (width / heads)^-0.5 (how Gemma's 27B models are told apart)."""
    not_depths: tuple[int, ...] = ()
    """Depths at which the graph is another one."""
    softcap: Need = "no"
    clip: bool = False
    sinks: Need = "no"
    window: Need = "no"
    """A window per layer; `required`: the window's size must be given though no layer may use it."""
    window_theta: Literal["", "own", "same"] = ""
    """Layers with a window rotate without scaling, with a base of their `own` or the `same` as the others."""
    local_theta: float = 0.0
    """That base where a file does not give it; 0: that of the other layers."""
    window_size: int = 0
    """The window where a file does not give it; 0: it has to."""
    window_period: int = 0
    """Every so many layers the last has no window, where a file does not say which; 0: it has to."""
    window_after: bool = False
    """Whether the first of them has none instead."""
    window_unused: bool = False
    """Whether the loader reads the key of a window, and the graph does without."""
    logit_scale_required: bool = True
    """Whether a file has to give the logit scale, where there is one."""
    layer_heads: bool = False
    """Whether head counts may differ from layer to layer."""

    gated: bool = True
    activation: str = "silu"
    fused_gate: bool = False
    """Whether gate and up are one tensor, gate first."""
    mlp_bias: Need = "no"
    mlp_norm: str = "ffn_norm"
    """The name of the norm before the MLP."""
    experts: Experts | None = None
    """Mixtures of experts, where the graph has them; `gated`, `activation` and `mlp_bias` are the other layers'."""

    tied: Literal["no", "optional", "forced"] = "optional"
    head_bias: Need = "no"
    embed_scale: Literal["no", "key", "sqrt_width"] = "no"
    residual_scale: bool = False
    logit_scale: Literal["no", "times", "divided"] = "no"
    """A required key, by which logits are multiplied or divided."""
    logit_softcap: Need = "no"

    keys: tuple[tuple[str, int | float | bool | str], ...] = field(default=())
    """Metadata that the loader insists on, or reads, and that changes nothing at these values."""


Fields = dict[str, Any]

CHOSEN: Fields = {"score": ("softmax", "sigmoid"), "renormalise": None, "scale": True}
"""A router of which metadata says everything (DeepSeek-V3 and its likes)."""

LAYERNORM: Fields = {"norm": "layernorm", "norm_bias": "required"}
GELU_MLP: Fields = {"gated": False, "activation": "gelu_tanh"}
GEMMA: Fields = {"activation": "gelu_tanh", "embed_scale": "sqrt_width", "partial": True}
GRANITE: Fields = {
    "rope": "interleaved", "freqs": "both", "scale": True, "o_bias": "optional", "mlp_bias": "optional",
    "embed_scale": "key", "residual_scale": True, "logit_scale": "divided",
}  # fmt: skip


GRANITE_EXPERTS = Experts(hidden="feed_forward", shared="optional")


def _row(arch: str, *shared: Fields, **fields: Any) -> Carrier:
    merged: Fields = {}
    for s in shared:
        merged |= s
    return Carrier(arch=arch, **(merged | fields))


CARRIERS: tuple[Carrier, ...] = (
    _row("llama", rope="interleaved", freqs="both", o_bias="optional", mlp_bias="optional",
         experts=Experts(layers="none_or_all", hidden="feed_forward")),
    _row("qwen3moe", qk_norm="required", experts=Experts()),
    _row("qwen2moe", square=True, tied="no",
         experts=Experts(renormalise=False, shared="required", shared_gate=True)),
    _row("olmoe", qk_norm="required", qk_over="width", square=True, every_head=True, tied="no",
         experts=Experts(renormalise=False, hidden="feed_forward")),
    _row("granitemoe", GRANITE, experts=GRANITE_EXPERTS),
    _row("gpt-oss", o_bias="required", sinks="required", window="required", window_period=2, tied="no",
         mlp_norm="post_attention_norm",
         experts=Experts(bias="required", activation="clamped_swiglu", expert_bias="required")),
    _row("qwen3", qk_norm="required"),
    _row("qwen2", square=True, head_bias="optional"),
    _row("gpt2", LAYERNORM, GELU_MLP, rope="none", positions="required", square=True, fused_qkv=True,
         qkv_bias="required", o_bias="required", mlp_bias="required"),
    _row("granite", GRANITE, no_position="all", experts=replace(GRANITE_EXPERTS, layers="none_or_all")),
    _row("granite_swa", GRANITE, no_position="layer", window="required", sinks="required",
         experts=replace(GRANITE_EXPERTS, layers="none_or_all", shared_fused=True)),
    _row("gemma2", GEMMA, placement="sandwich", softcap="required", logit_softcap="required", tied="forced",
         window="required", window_theta="own", window_size=4096, window_period=2, scaling=frozenset(),
         wide_scale_depth=46),
    _row("gemma3", GEMMA, placement="sandwich", qk_norm="required", window="optional", window_theta="own",
         local_theta=10000.0, window_period=6, logit_softcap="optional", scaling=frozenset({"linear"}),
         wide_scale_depth=62),
    _row("gemma", GEMMA, tied="forced"),
    _row("olmo2", placement="post", qk_norm="required", qk_over="width", square=True, tied="no", window="optional",
         window_theta="same", window_period=4),
    _row("exaone4", placement="post", qk_norm="required", square=True, freqs="freqs", not_depths=(64,)),
    _row("glm4", placement="sandwich", rope="interleaved", partial=True, fused_gate=True),
    _row("phi3", partial=True, freqs="longrope", square=True, fused_gate=True, window_unused=True),
    _row("step35", partial=True, full_dims=0.5, freqs="both", qk_norm="optional", window="required",
         window_theta="own", local_theta=10000.0, layer_heads=True, tied="no",
         keys=(("expert_feed_forward_length", 0),),
         experts=Experts(**CHOSEN, default_score="sigmoid", layers="any", correction="optional", shared="required")),
    _row("glm4moe", partial=True, qk_norm="optional", mlp_norm="post_attention_norm",
         experts=Experts(**CHOSEN, default_score="sigmoid", layers="leading", correction="required", shared="required",
                         shared_hidden="multiple")),
    _row("hy_v3", qk_norm="required", keys=(("expert_feed_forward_length", 0),),
         experts=Experts(**CHOSEN, default_score="sigmoid", layers="any", correction="optional",
                         correction_name="exp_probs_b", shared="required")),
    _row("dots1", qk_norm="required", every_head=True, tied="no",
         experts=Experts(**CHOSEN, layers="leading", correction="optional", shared="required",
                         shared_hidden="multiple")),
    _row("bailingmoe2", qk_norm="required", partial=True, square=True, fused_qkv=True, qkv_bias="no", tied="no",
         keys=(("expert_shared_count", 1),),
         experts=Experts(**CHOSEN, layers="leading", correction="optional", shared="required")),
    _row("bailingmoe", rope="interleaved", tied="no",
         experts=Experts(renormalise=None, scale=True, shared="required", shared_hidden="multiple")),
    _row("deepseek", rope="interleaved", square=True,
         experts=Experts(layers="leading", renormalise=False, scale=True, shared="required",
                         shared_hidden="multiple")),
    _row("ernie4_5-moe", rope="interleaved", keys=(("interleave_moe_layer_step", 1),),
         experts=Experts(layers="leading", correction="optional", shared="optional")),
    _row("minimax-m2", qk_norm="required", qk_over="width", partial=True, tied="no",
         experts=Experts(score=("softmax", "sigmoid"), correction="required")),
    _row("mellum", qk_norm="required", tied="no", window="optional", window_theta="same", window_period=4,
         experts=Experts()),
    _row("exaone-moe", qk_norm="required", freqs="freqs", no_position="global", tied="no", window="required",
         window_size=128, window_period=4,
         experts=Experts(**CHOSEN, layers="leading", correction="optional", shared="required")),
    _row("mimo2", qkv_bias="no", sinks="optional", window="required", window_theta="own", local_theta=10000.0,
         layer_heads=True, tied="no", keys=(("expert_feed_forward_length", 0),),
         experts=Experts(layers="any", score=("sigmoid",), correction="optional")),
    _row("arcee", rope="interleaved", freqs="freqs", gated=False, activation="relu2"),
    _row("refact", rope="none", alibi="8"),  # its output and MLP biases are loaded and never used
    _row("stablelm", LAYERNORM, flow=("sequential", "shared"), partial=True, square=True, tied="no",
         qk_norm="optional", qk_kind="layernorm", qk_over="heads"),
    _row("starcoder2", LAYERNORM, GELU_MLP, square=True, o_bias="required", mlp_bias="required"),
    _row("gptneox", LAYERNORM, GELU_MLP, flow=("sequential", "parallel", "shared"), partial=True, square=True,
         fused_qkv=True, qkv_bias="required", o_bias="required", mlp_bias="required", tied="no"),
    _row("phi2", LAYERNORM, GELU_MLP, flow=("shared",), partial=True, square=True, o_bias="required",
         mlp_bias="required", tied="no", head_bias="required"),
    _row("mpt", GELU_MLP, norm="layernorm", norm_bias="optional", rope="none", alibi="key", positions="optional",
         square=True, fused_qkv=True, o_bias="optional", mlp_bias="optional", clip=True),
    _row("bloom", LAYERNORM, GELU_MLP, rope="none", alibi="8", embed_norm=True, square=True, fused_qkv=True,
         qkv_bias="required", o_bias="required", mlp_bias="required"),
    _row("nemotron", LAYERNORM, partial=True, square=True, o_bias="optional", gated=False, activation="relu2",
         mlp_bias="optional", tied="no"),
    _row("command-r", norm="layernorm", flow=("shared",), rope="interleaved", square=True, tied="forced",
         logit_scale="times", logit_scale_required=False, not_depths=tuple(range(64, 513))),
    _row("cohere2", norm="layernorm", flow=("shared",), rope="interleaved", no_position="global", square=True,
         tied="forced", logit_scale="times", window="required", window_period=4),
    _row("cohere2moe", norm="layernorm", flow=("shared",), rope="interleaved", no_position="global",
         logit_scale="times", window="required", window_period=4, window_after=True,
         keys=(("leading_dense_block_count", 0), ("attention.layer_norm_rms_epsilon", 0.0)),  # else its norms are RMS
         experts=Experts(**CHOSEN, default_score="sigmoid")),
    _row("dbrx", norm="layernorm", square=True, fused_qkv=True, qkv_bias="no", clip=True, tied="no",
         mlp_norm="attn_output_norm", keys=(("attention.clamp_kqv", 0.0),), experts=Experts(hidden="feed_forward")),
    _row("phimoe", norm_bias="required", freqs="longrope", square=True, o_bias="required", tied="no",
         head_bias="required", experts=Experts(hidden="feed_forward")),
)  # fmt: skip
"""In order of preference: of two that carry a spec with as few rewrites, the earlier one is taken."""
