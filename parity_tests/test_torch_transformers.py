"""The one forward pass against the models as their authors' reference implementations compute them: tiny random models
of `transformers` in float64, weights renamed by hand, equal logits. This is what ties the oracle to the outside world.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from backends.numpy.model import Oracle
from backends.torch.model import Decoder
from spec import Spec, parse
from spec.config import Rope
from spec.rope import rope_table

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

V, D, F, L, CONTEXT = 61, 32, 48, 3, 64
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    "attn_implementation": "eager",
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": "attn.q", "self_attn.k_proj": "attn.k", "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o", "self_attn.dense": "attn.o",
    "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm", "self_attn.sinks": "attn.sinks",
    "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
    "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm",
}  # fmt: skip
TOP = {
    "model.embed_tokens": "embed",
    "model.norm": "final_norm",
    "model.final_layernorm": "final_norm",
    "lm_head": "head",
}
SANDWICH = {
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def rename(
    state: dict[str, torch.Tensor], layer: dict[str, str], prefix: str = "model.layers."
) -> dict[str, torch.Tensor]:
    """Hugging Face names to canonical ones; a name that no row knows stays and fails the load."""
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        stem, dot, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            stem, dot, leaf = name, "", ""
        if stem.startswith(prefix):
            i, inner = stem.removeprefix(prefix).split(".", 1)
            out[f"layers.{i}.{layer.get(inner, inner)}{dot}{leaf}"] = value
        else:
            out[TOP.get(stem, stem) + dot + leaf] = value
    return out


def randomised(model: Any) -> Any:
    """Every parameter of a model redrawn, so that no gain is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.data = noise * 1.2 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.6 + 0.3 * noise
    return model.double().eval()


def build(config: Any) -> Any:
    return randomised(transformers.AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def check(theirs: Any, spec: Spec, weights: dict[str, torch.Tensor], tokens: int = 40) -> None:
    """torch and the oracle give their logits, to float64 rounding and the float32 rounding of rotary tables."""
    if spec.head.tied:
        weights = {n: w for n, w in weights.items() if n != "head.weight"}
    ours = Decoder(spec, length=tokens).double().eval()
    ours.load_state_dict(weights)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, V, (2, tokens)))
    expected = theirs(ids, use_cache=False).logits
    assert expected.std() > 0.05
    rotated = any(isinstance(b.attention.position, Rope) for b in spec.layers)
    # transformers computes angles, cos and sin in float32, each off by position * u; and the softmax, off by u
    limit = 40 * (tokens * 2.0**-24) ** 2 if rotated else 2.0**-48
    got = ours(ids)
    assert ((got - expected).square().sum() / expected.square().sum()).item() < limit
    reference = Oracle(spec, {n: w.numpy() for n, w in weights.items()}, length=tokens).logits(ids.numpy())
    np.testing.assert_allclose(reference, got.numpy(), rtol=0, atol=1e-10)


def base(**fields: Any) -> dict[str, Any]:
    return {"vocab_size": V, "width": D, "depth": L, "context": CONTEXT, **fields}


def block(attention: dict[str, Any], mlp: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"attention": {"heads": 4, **attention}, "mlp": {"hidden": F, **(mlp or {})}, **fields}


def theta(value: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value, **more}}


def rms(eps: float, **fields: Any) -> dict[str, Any]:
    return {"kind": "rmsnorm", "eps": eps, **fields}


def layernorm(eps: float, bias: bool = True) -> dict[str, Any]:
    return {"kind": "layernorm", "eps": eps, "bias": bias}


def test_llama() -> None:
    config = transformers.LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=1e-3,
        attention_bias=True,
        mlp_bias=True,
        **theta(700.0),
    )
    theirs = build(config)
    attention = {"kv_heads": 2, "head_dim": 12, "bias": True, "position": {"kind": "rope", "theta": 700.0}}
    spec = parse(base(block=block(attention, {"bias": True}, norm=rms(1e-3)), final_norm=rms(1e-3)))
    check(theirs, spec, rename(theirs.state_dict(), LAYER))


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"factor": 4.0}, {"factor": 4.0}),
    "dynamic": ({"factor": 2.0}, {"factor": 2.0}),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 32},
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0, "beta_slow": 1.5},
        {"factor": 4.0, "original_context": 16, "beta_fast": 16.0, "beta_slow": 1.5},
    ),
    "longrope": (
        {"factor": 4.0, "short_factor": [1.0, 1.2, 1.4, 2.0], "long_factor": [1.0, 3.0, 5.0, 9.0],
         "original_max_position_embeddings": 16},
        {"short_factor": [1.0, 1.2, 1.4, 2.0], "long_factor": [1.0, 3.0, 5.0, 9.0], "original_context": 16},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("length", [12, 16, 17, 40, 64, 100, 256])
def test_rotary_tables(kind: str, length: int) -> None:
    """inv_freq and the attention factor of every scaling, on both sides of its boundary."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    their_fields, our_fields = SCALINGS[kind]
    config = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **their_fields})
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    spec = parse(base(block=block({"position": {"kind": "rope", "scaling": {"kind": kind, **our_fields}}})))
    position = spec.layers[0].attention.position
    assert isinstance(position, Rope)
    table = rope_table(position, D // 4, length)
    np.testing.assert_allclose(table.inv_freq, expected.numpy(), rtol=4e-7)
    assert abs(table.factor - factor) < 1e-12


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("tokens", [12, 40])
def test_llama_with_scaled_rotation(kind: str, tokens: int) -> None:
    """One prefill on each side of the boundary."""
    their_fields, our_fields = SCALINGS[kind]
    theirs = build(
        transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": kind, "rope_theta": 1e4, **their_fields})
    )
    attention = {"position": {"kind": "rope", "scaling": {"kind": kind, **our_fields}}}
    spec = parse(base(block=block(attention, norm=rms(1e-6)), final_norm=rms(1e-6)))
    check(theirs, spec, rename(theirs.state_dict(), LAYER), tokens)


def test_mistral_with_a_sliding_window() -> None:
    theirs = build(
        transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7, rms_norm_eps=1e-5, **theta(1e4))
    )
    spec = parse(base(block=block({"kv_heads": 2, "window": 7})))
    check(theirs, spec, rename(theirs.state_dict(), LAYER))


def test_qwen2() -> None:
    theirs = build(transformers.Qwen2Config(**SIZES, num_key_value_heads=2, rms_norm_eps=1e-6, **theta(1e6)))
    attention = {"kv_heads": 2, "bias": {"q": True, "k": True, "v": True}, "position": {"kind": "rope", "theta": 1e6}}
    spec = parse(base(block=block(attention, norm=rms(1e-6)), final_norm=rms(1e-6)))
    check(theirs, spec, rename(theirs.state_dict(), LAYER))


def test_qwen3() -> None:
    config = transformers.Qwen3Config(
        **SIZES, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True, **theta(1e6)
    )
    theirs = build(config)
    attention = {"kv_heads": 2, "head_dim": 16, "qk_norm": rms(1e-6), "position": {"kind": "rope", "theta": 1e6}}
    spec = parse(base(block=block(attention, norm=rms(1e-6)), final_norm=rms(1e-6), head={"tied": True}))
    check(theirs, spec, rename(theirs.state_dict(), LAYER))


def _gemma_block(attention: dict[str, Any]) -> dict[str, Any]:
    attention = {"kv_heads": 2, "head_dim": 16, "scale": 12**-0.5, **attention}
    return block(attention, {"activation": "gelu_tanh"}, norm=rms(1e-6, offset=1.0), placement="sandwich")


def test_gemma2() -> None:
    config = transformers.Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=12, sliding_window=6, rms_norm_eps=1e-6,
        attn_logit_softcapping=3.0, final_logit_softcapping=5.0, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **theta(1e4),
    )  # fmt: skip
    theirs = build(config)
    spec = parse(
        base(
            block=_gemma_block({"softcap": 3.0}),
            pattern=[{"attention": {"window": 6}}, {}],
            embedding={"scale": D**0.5},
            final_norm=rms(1e-6, offset=1.0),
            head={"tied": True, "softcap": 5.0},
        )
    )
    check(theirs, spec, rename(theirs.state_dict(), LAYER | SANDWICH))


def test_gemma3() -> None:
    config = transformers.Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=12, sliding_window=6, rms_norm_eps=1e-6,
        tie_word_embeddings=True, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
        },
    )  # fmt: skip
    theirs = build(config)
    local = {"attention": {"window": 6, "position": {"kind": "rope", "theta": 100.0, "scaling": None}}}
    far = {"kind": "rope", "theta": 5000.0, "scaling": {"kind": "linear", "factor": 8.0}}
    spec = parse(
        base(
            block=_gemma_block({"qk_norm": rms(1e-6, offset=1.0), "position": far}),
            pattern=[local, local, {}],
            embedding={"scale": D**0.5},
            final_norm=rms(1e-6, offset=1.0),
            head={"tied": True},
        )
    )
    check(theirs, spec, rename(theirs.state_dict(), LAYER | SANDWICH))


def test_olmo2() -> None:
    theirs = build(transformers.Olmo2Config(**SIZES, num_key_value_heads=2, rms_norm_eps=1e-6, **theta(5e5)))
    attention = {"kv_heads": 2, "qk_norm": rms(1e-6, over="width"), "position": {"kind": "rope", "theta": 5e5}}
    spec = parse(base(block=block(attention, norm=rms(1e-6), placement="post"), final_norm=rms(1e-6)))
    names = LAYER | {"post_attention_layernorm": "attn_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}
    check(theirs, spec, rename(theirs.state_dict(), names))


def test_olmo_with_clipping_and_bare_layernorms() -> None:
    theirs = build(transformers.OlmoConfig(**SIZES, num_key_value_heads=2, clip_qkv=0.4, **theta(1e4)))
    bare = {"kind": "layernorm", "eps": 1e-5, "weight": False}
    spec = parse(base(block=block({"kv_heads": 2, "clip": 0.4}, norm=bare), final_norm=bare))
    check(theirs, spec, rename(theirs.state_dict(), LAYER))


def test_granite() -> None:
    config = transformers.GraniteConfig(
        **SIZES, num_key_value_heads=2, rms_norm_eps=1e-5, embedding_multiplier=3.0, residual_multiplier=0.4,
        attention_multiplier=0.2, logits_scaling=4.0, **theta(1e4),
    )  # fmt: skip
    theirs = build(config)
    spec = parse(
        base(
            block=block({"kv_heads": 2, "scale": 0.2}, residual_scale=0.4),
            embedding={"scale": 3.0},
            head={"scale": 0.25},
        )
    )
    check(theirs, spec, rename(theirs.state_dict(), LAYER))


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection whose rotary pairs are (2i, 2i + 1), to half-split order."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def test_cohere() -> None:
    config = transformers.CohereConfig(
        **SIZES, num_key_value_heads=2, layer_norm_eps=1e-5, logit_scale=0.5, tie_word_embeddings=True, **theta(1e4)
    )
    theirs = build(config)
    norm = layernorm(1e-5, bias=False)
    spec = parse(
        base(
            block=block({"kv_heads": 2}, norm=norm, parallel=True, shared_norm=True),
            final_norm=norm,
            head={"tied": True, "scale": 0.5},
        )
    )
    weights = rename(theirs.state_dict(), LAYER)
    for i in range(L):
        for name, heads in (("q", 4), ("k", 2)):
            key = f"layers.{i}.attn.{name}.weight"
            weights[key] = interleave(weights[key], heads)
    check(theirs, spec, weights)


def test_phi() -> None:
    config = transformers.PhiConfig(
        **SIZES, num_key_value_heads=2, layer_norm_eps=1e-5, hidden_act="gelu_new",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    theirs = build(config)
    attention = {"kv_heads": 2, "bias": True, "position": {"kind": "rope", "fraction": 0.5}}
    mlp = {"gated": False, "activation": "gelu_tanh", "bias": True}
    norm = layernorm(1e-5)
    spec = parse(
        base(
            block=block(attention, mlp, norm=norm, parallel=True, shared_norm=True),
            final_norm=norm,
            head={"bias": True},
        )
    )
    check(theirs, spec, rename(theirs.state_dict(), LAYER))


@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox(parallel: bool) -> None:
    config = transformers.GPTNeoXConfig(
        **SIZES, layer_norm_eps=1e-5, use_parallel_residual=parallel,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    theirs = build(config)
    attention = {"bias": True, "position": {"kind": "rope", "fraction": 0.5}}
    mlp = {"gated": False, "activation": "gelu", "bias": True}
    norm = layernorm(1e-5)
    spec = parse(base(block=block(attention, mlp, norm=norm, parallel=parallel), final_norm=norm))
    names = LAYER | {
        "attention.dense": "attn.o",
        "mlp.dense_h_to_4h": "mlp.up",
        "mlp.dense_4h_to_h": "mlp.down",
    }
    weights = rename(theirs.state_dict(), names, "gpt_neox.layers.")
    top = {"gpt_neox.embed_in": "embed", "gpt_neox.final_layer_norm": "final_norm", "embed_out": "head"}
    for i in range(L):  # [heads, (q, k, v), head_dim] rows
        for leaf in ("weight", "bias"):
            grouped = weights.pop(f"layers.{i}.attention.query_key_value.{leaf}").unflatten(0, (4, 3, -1))
            for n, name in enumerate("qkv"):
                weights[f"layers.{i}.attn.{name}.{leaf}"] = grouped[:, n].flatten(0, 1)
    for theirs_name, ours in top.items():
        for leaf in ("weight", "bias"):
            if f"{theirs_name}.{leaf}" in weights:
                weights[f"{ours}.{leaf}"] = weights.pop(f"{theirs_name}.{leaf}")
    check(theirs, spec, weights)


def test_gpt2() -> None:
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=CONTEXT, n_embd=D, n_layer=L, n_head=4, n_inner=F, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = build(config)
    mlp = {"gated": False, "activation": "gelu_tanh", "bias": True}
    norm = layernorm(1e-5)
    spec = parse(
        base(
            block=block({"bias": True, "position": {"kind": "none"}}, mlp, norm=norm),
            embedding={"positions": {}},
            final_norm=norm,
            head={"tied": True},
        )
    )
    state, weights = theirs.state_dict(), {}
    weights["embed.weight"], weights["positions.weight"] = (
        state["transformer.wte.weight"],
        state["transformer.wpe.weight"],
    )
    names = {"ln_1": "attn_norm", "ln_2": "mlp_norm"}
    for i in range(L):
        for leaf in ("weight", "bias"):
            for a, b in names.items():
                weights[f"layers.{i}.{b}.{leaf}"] = state[f"transformer.h.{i}.{a}.{leaf}"]
            for n, part in enumerate(state[f"transformer.h.{i}.attn.c_attn.{leaf}"].chunk(3, -1)):  # Conv1D: [in, out]
                weights[f"layers.{i}.attn.{'qkv'[n]}.{leaf}"] = part.T.contiguous() if part.dim() > 1 else part
            for a, b in {"attn.c_proj": "attn.o", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}.items():
                value = state[f"transformer.h.{i}.{a}.{leaf}"]
                weights[f"layers.{i}.{b}.{leaf}"] = value.T.contiguous() if value.dim() > 1 else value
    for leaf in ("weight", "bias"):
        weights[f"final_norm.{leaf}"] = state[f"transformer.ln_f.{leaf}"]
    check(theirs, spec, weights)


def test_bloom_with_alibi_and_an_embedding_norm() -> None:
    config = transformers.BloomConfig(
        vocab_size=V, hidden_size=D, n_layer=L, n_head=4, layer_norm_epsilon=1e-5, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = build(config)
    norm = layernorm(1e-5)
    mlp = {"hidden": 4 * D, "gated": False, "activation": "gelu_tanh", "bias": True}
    spec = parse(
        base(
            block=block({"bias": True, "position": {"kind": "alibi"}}, mlp, norm=norm),
            embedding={"norm": norm},
            final_norm=norm,
            head={"tied": True},
        )
    )
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm", "self_attention.dense": "attn.o",
        "mlp.dense_h_to_4h": "mlp.up", "mlp.dense_4h_to_h": "mlp.down",
    }  # fmt: skip
    weights = rename(theirs.state_dict(), names, "transformer.h.")
    for i in range(L):
        for leaf in ("weight", "bias"):
            grouped = weights.pop(f"layers.{i}.self_attention.query_key_value.{leaf}").unflatten(0, (4, 3, -1))
            for n, name in enumerate("qkv"):
                weights[f"layers.{i}.attn.{name}.{leaf}"] = grouped[:, n].flatten(0, 1)
    top = {"word_embeddings": "embed", "word_embeddings_layernorm": "embed_norm", "ln_f": "final_norm"}
    for a, b in top.items():
        for leaf in ("weight", "bias"):
            if f"transformer.{a}.{leaf}" in weights:
                weights[f"{b}.{leaf}"] = weights.pop(f"transformer.{a}.{leaf}")
    weights.pop("head.weight", None)
    check(theirs, spec, weights)


def test_opt_with_offset_positions() -> None:
    config = transformers.OPTConfig(
        vocab_size=V, hidden_size=D, ffn_dim=F, num_hidden_layers=L, num_attention_heads=4, word_embed_proj_dim=D,
        max_position_embeddings=CONTEXT, attn_implementation="eager", dropout=0.0, pad_token_id=1, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    theirs = build(config)
    norm = layernorm(1e-5)
    spec = parse(
        base(
            block=block(
                {"bias": True, "position": {"kind": "none"}},
                {"gated": False, "activation": "relu", "bias": True},
                norm=norm,
            ),
            embedding={"positions": {"offset": 2}},
            final_norm=norm,
            head={"tied": True},
        )
    )
    names = LAYER | {
        "self_attn.out_proj": "attn.o", "self_attn_layer_norm": "attn_norm", "final_layer_norm": "mlp_norm",
        "fc1": "mlp.up", "fc2": "mlp.down",
    }  # fmt: skip
    weights = rename(theirs.state_dict(), names, "model.decoder.layers.")
    top = {"embed_tokens": "embed", "embed_positions": "positions", "final_layer_norm": "final_norm"}
    for a, b in top.items():
        for leaf in ("weight", "bias"):
            if f"model.decoder.{a}.{leaf}" in weights:
                weights[f"{b}.{leaf}"] = weights.pop(f"model.decoder.{a}.{leaf}")
    check(theirs, spec, weights)


def test_attention_sinks_and_clamped_swiglu_of_gpt_oss() -> None:
    """Its mixture with one expert, always chosen, is a dense layer."""
    config = transformers.GptOssConfig(
        **SIZES, num_key_value_heads=2, head_dim=16, sliding_window=6, rms_norm_eps=1e-5, attention_bias=True,
        num_local_experts=1, num_experts_per_tok=1, experts_implementation="eager",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], **theta(1e4),
    )  # fmt: skip
    theirs = build(config)
    mlp = {"activation": "clamped_swiglu", "bias": True}
    spec = parse(
        base(
            block=block({"kv_heads": 2, "head_dim": 16, "bias": True, "sinks": True}, mlp),
            pattern=[{"attention": {"window": 6}}, {}],
        )
    )
    weights = rename(theirs.state_dict(), LAYER)
    for i in range(L):
        at = f"layers.{i}.mlp"
        both, both_bias = (
            weights.pop(f"{at}.experts.gate_up_proj")[0].T,
            weights.pop(f"{at}.experts.gate_up_proj_bias")[0],
        )
        weights[f"{at}.gate.weight"], weights[f"{at}.up.weight"] = both[::2].contiguous(), both[1::2].contiguous()
        weights[f"{at}.gate.bias"], weights[f"{at}.up.bias"] = both_bias[::2], both_bias[1::2]
        weights[f"{at}.down.weight"] = weights.pop(f"{at}.experts.down_proj")[0].T.contiguous()
        weights[f"{at}.down.bias"] = weights.pop(f"{at}.experts.down_proj_bias")[0]
        for leaf in ("weight", "bias"):
            weights.pop(f"{at}.router.{leaf}")
    check(theirs, spec, weights)
