"""Small specs, one for every feature and random ones for their combinations, with weights that leave nothing idle."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from spec import Spec, params, parse
from spec.config import merge

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "width": 32,
    "depth": 2,
    "context": 48,
    "block": {"attention": {"heads": 4, "kv_heads": 2}, "mlp": {"hidden": 64}},
}
"""A two-layer Llama; every feature is a patch to it."""


def _attn(**fields: Any) -> dict[str, Any]:
    return {"block": {"attention": fields}}


def _rope(**fields: Any) -> dict[str, Any]:
    return _attn(position={"kind": "rope", **fields})


def _block(**fields: Any) -> dict[str, Any]:
    return {"block": fields}


_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 4.0, 7.5]}


def _moe(experts: int, top_k: int, **router: Any) -> dict[str, Any]:
    return {"kind": "moe", "experts": experts, "hidden": 20, "router": {"top_k": top_k, **router}}


PATCHES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"head": {"tied": True}},
    "head_bias": {"head": {"bias": True}},
    "mha": _attn(kv_heads=4),
    "mqa": _attn(kv_heads=1),
    "odd_heads": {"width": 40, **_attn(heads=6, kv_heads=3, head_dim=12)},
    "head_dim_free": _attn(heads=3, kv_heads=1, head_dim=16),
    "uneven_width": {"width": 36, **_attn(heads=3, kv_heads=3, head_dim=12)},
    "qkv_bias": _attn(bias={"q": True, "k": True, "v": True}),
    "all_bias": {"block": {"attention": {"bias": True}, "mlp": {"bias": True}}},
    "rope_theta": _rope(theta=500.0),
    "rope_partial": _rope(fraction=0.5),
    "rope_linear": _rope(scaling={"kind": "linear", "factor": 4.0}),
    "rope_dynamic": _rope(scaling={"kind": "dynamic", "factor": 2.0, "original_context": 16}),
    "rope_llama3": _rope(scaling={"kind": "llama3", "factor": 8.0, "original_context": 32}),
    "rope_yarn": _rope(scaling={"kind": "yarn", "factor": 4.0, "original_context": 12}),
    "rope_longrope": _rope(scaling={"kind": "longrope", "original_context": 16, **_LONG}),
    "rope_longrope_short": _rope(scaling={"kind": "longrope", "original_context": 48, **_LONG}),
    "local_theta": {
        "pattern": [
            {"attention": {"window": 8, "position": {"kind": "rope", "theta": 100.0}}},
            {"attention": {"position": {"kind": "rope", "theta": 5000.0}}},
        ]
    },
    "nope_per_layer": {"pattern": [{}, {"attention": {"position": {"kind": "none"}}}]},
    "learned": {"embedding": {"positions": {}}, **_attn(position={"kind": "none"})},
    "learned_offset": {"embedding": {"positions": {"offset": 2}}, **_attn(position={"kind": "none"})},
    "alibi": _attn(position={"kind": "alibi"}),
    "alibi_odd_heads": {"width": 36, **_attn(heads=6, kv_heads=3, position={"kind": "alibi"})},
    "rms_eps": _block(norm={"eps": 0.01}),
    "rms_offset": {"final_norm": {"offset": 1.0}, **_block(norm={"offset": 1.0})},
    "rms_no_weight": {"final_norm": {"weight": False}, **_block(norm={"weight": False})},
    "layernorm": {"final_norm": {"kind": "layernorm"}, **_block(norm={"kind": "layernorm"})},
    "layernorm_bias": {
        "final_norm": {"kind": "layernorm", "bias": True},
        **_block(norm={"kind": "layernorm", "bias": True}),
    },
    "layernorm_no_weight": {
        "final_norm": {"kind": "layernorm", "weight": False},
        **_block(norm={"kind": "layernorm", "weight": False}),
    },
    "no_final_norm": {"final_norm": None},
    "norm_post": _block(placement="post"),
    "norm_sandwich": _block(placement="sandwich"),
    "embed_norm": {"embedding": {"norm": {"kind": "layernorm", "bias": True}}},
    "qk_norm_head": _attn(qk_norm={"eps": 1e-6}),
    "qk_norm_width": _attn(qk_norm={"over": "width"}),
    "qk_layernorm": _attn(qk_norm={"kind": "layernorm", "bias": True}),
    "attn_scale": _attn(scale=0.2),
    "attn_softcap": _attn(softcap=2.0),
    "clip": _attn(clip=0.5),
    "window": _attn(window=8),
    "window_pattern": {"depth": 4, "pattern": [{"attention": {"window": 6}}, {}]},
    "sinks": _attn(sinks=True),
    "mlp_plain": _block(mlp={"gated": False, "activation": "relu"}),
    "mlp_plain_bias": _block(mlp={"gated": False, "activation": "gelu_tanh", "bias": True}),
    "gelu": _block(mlp={"activation": "gelu"}),
    "gelu_tanh": _block(mlp={"activation": "gelu_tanh"}),
    "quick_gelu": _block(mlp={"activation": "quick_gelu"}),
    "relu2": _block(mlp={"gated": False, "activation": "relu2"}),
    "clamped_swiglu": _block(mlp={"activation": "clamped_swiglu", "limit": 0.8, "bias": True}),
    "parallel": _block(parallel=True),
    "parallel_shared": _block(parallel=True, shared_norm=True),
    "embed_scale": {"embedding": {"scale": 5.656854152679443}},
    "residual_scale": _block(residual_scale=0.22),
    "logit_scale": {"head": {"scale": 0.25}},
    "logit_softcap": {"head": {"softcap": 3.0}},
    "gpt2": {
        "embedding": {"positions": {}},
        "head": {"tied": True},
        "final_norm": {"kind": "layernorm", "bias": True},
        "block": {
            "attention": {"kv_heads": 4, "bias": True, "position": {"kind": "none"}},
            "mlp": {"gated": False, "activation": "gelu_tanh", "bias": True},
            "norm": {"kind": "layernorm", "bias": True},
        },
    },
    "gemma2": {
        "embedding": {"scale": 5.656854152679443},
        "head": {"tied": True, "softcap": 30.0},
        "final_norm": {"offset": 1.0, "eps": 1e-6},
        "block": {
            "attention": {"softcap": 50.0, "scale": 0.3},
            "mlp": {"activation": "gelu_tanh"},
            "norm": {"offset": 1.0, "eps": 1e-6},
            "placement": "sandwich",
        },
        "pattern": [{"attention": {"window": 8}}, {}],
    },
    "qwen3": {"head": {"tied": True}, **_attn(head_dim=16, qk_norm={"eps": 1e-6})},
    "olmo2": _block(placement="post", attention={"qk_norm": {"over": "width"}}),
    "neox": {
        "final_norm": {"kind": "layernorm", "bias": True},
        "block": {
            "attention": {"kv_heads": 4, "bias": True, "position": {"kind": "rope", "fraction": 0.5}},
            "mlp": {"gated": False, "activation": "gelu", "bias": True},
            "norm": {"kind": "layernorm", "bias": True},
            "parallel": True,
        },
    },
    "moe": {"block": {"mlp": _moe(5, 2)}},
    "moe_plain_scores": {"block": {"mlp": _moe(8, 3, renormalise=False)}},
    "moe_one": {"block": {"mlp": _moe(3, 1, renormalise=False, scale=0.7)}},
    "moe_sigmoid": {
        "block": {"mlp": {**_moe(6, 2, score="sigmoid", correction=True, scale=2.5), "shared": {"hidden": 12}}},
        "overrides": {"0": {"mlp": {"kind": "dense", "hidden": 40}}},
    },
    "moe_shared_gate": {
        "block": {"mlp": {**_moe(4, 2, renormalise=False), "shared": {"hidden": 28, "gate": True}}},
    },
    "moe_sinks": {
        "block": {
            "attention": {"sinks": True, "bias": True},
            "mlp": {**_moe(4, 2, bias=True), "activation": "clamped_swiglu", "limit": 0.9, "bias": True},
        },
        "pattern": [{"attention": {"window": 5}}, {}],
    },
    "moe_ungated": {"block": {"mlp": {**_moe(4, 2), "gated": False, "activation": "gelu_tanh"}}},
}

FEATURES: dict[str, Spec] = {name: parse(merge(merge(BASE, {"name": name}), p), name) for name, p in PATCHES.items()}
"""One small spec a feature, and a few whole families."""


def random_weights(spec: Spec, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Float32 weights in which every parameter matters: gains vary around their effective 1, biases and sinks are
    not 0, linear outputs keep unit scale so that attention is neither flat nor one-hot."""
    rng = np.random.default_rng(seed)
    offsets = {n: s.offset for n, s in _norm_specs(spec)}
    out: dict[str, NDArray[np.float32]] = {}
    for p in params(spec):
        x = rng.standard_normal(p.shape)
        match p.role:
            case "linear" | "experts":
                x *= 1.3 / np.sqrt(p.shape[1])
            case "router":  # scores far enough apart that routes rarely are a matter of rounding
                x *= 3.0 / np.sqrt(p.shape[1])
            case "embedding":
                x *= 0.5
            case "gain":
                x = 1 + 0.2 * x - offsets[p.name.removesuffix(".weight")]
            case "bias":
                x *= 0.2
            case "sinks":
                pass
        out[p.name] = x.astype(np.float32)
    return out


def _norm_specs(spec: Spec) -> Any:
    if spec.embedding.norm is not None:
        yield "embed_norm", spec.embedding.norm
    if spec.final_norm is not None:
        yield "final_norm", spec.final_norm
    for i, b in enumerate(spec.layers):
        for n in ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm"):
            yield f"layers.{i}.{n}", b.norm
        if b.attention.qk_norm is not None:
            yield f"layers.{i}.attn.q_norm", b.attention.qk_norm
            yield f"layers.{i}.attn.k_norm", b.attention.qk_norm


def random_ids(spec: Spec, batch: int = 2, length: int = 24, seed: int = 1) -> NDArray[np.int64]:
    """[batch, length] token ids."""
    return np.random.default_rng(seed).integers(0, spec.vocab_size, (batch, length))


def nmse(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """Squared error over the reference's energy; infinite where anything is not finite."""
    error = np.asarray(value, np.float64) - np.asarray(reference, np.float64)
    total = float(np.square(error).sum() / np.square(np.asarray(reference, np.float64)).sum())
    return total if np.isfinite(total) else float("inf")


@st.composite
def random_specs(draw: st.DrawFn) -> Spec:
    """Any combination of features that the language admits, at a size that a test can afford."""
    maybe = st.booleans()
    kv = draw(st.sampled_from([1, 2, 3]))
    heads = kv * draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([4, 8, 12, 16]))
    width = draw(st.sampled_from([16, 24, 36, 64]))

    def norm() -> dict[str, Any]:
        weight = draw(maybe)
        return {
            "kind": draw(st.sampled_from(["rmsnorm", "layernorm"])),
            "eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
            "weight": weight,
            "bias": draw(maybe),
            "offset": draw(st.sampled_from([0.0, 1.0])) if weight else 0.0,
        }

    def position() -> dict[str, Any]:
        kind = draw(st.sampled_from(["rope", "rope", "rope", "alibi", "none"]))
        if kind != "rope":
            return {"kind": kind}
        fraction = draw(st.sampled_from([1.0, 0.5]))
        half = int(head_dim * fraction) // 2
        kinds = ["none", "linear", "llama3", "yarn", "longrope", *(["dynamic"] if half > 1 else [])]
        scaling = draw(st.sampled_from(kinds))
        fields: dict[str, Any] = {"kind": scaling, "factor": draw(st.sampled_from([1.0, 2.0, 4.5]))}
        if scaling in ("dynamic", "llama3", "yarn"):
            fields["original_context"] = draw(st.sampled_from([8, 16, 32]))
        if scaling == "longrope":
            fields = {"kind": scaling, "original_context": draw(st.sampled_from([8, 32]))}
            fields["short_factor"] = [1.0 + 0.1 * i for i in range(half)]
            fields["long_factor"] = [1.0 + 0.9 * i for i in range(half)]
        theta = draw(st.sampled_from([100.0, 10000.0]))
        out = {"kind": "rope", "theta": theta, "fraction": fraction}
        return {**out, "scaling": None if scaling == "none" else fields}

    def attention() -> dict[str, Any]:
        out: dict[str, Any] = {
            "heads": heads,
            "kv_heads": kv,
            "head_dim": head_dim,
            "bias": {n: draw(maybe) for n in "qkvo"},
            "position": position(),
            "window": draw(st.sampled_from([None, None, 1, 5])),
            "scale": draw(st.sampled_from([None, 0.3])),
            "softcap": draw(st.sampled_from([None, None, 2.0])),
            "clip": draw(st.sampled_from([None, None, 0.7])),
            "sinks": draw(maybe),
        }
        if draw(maybe):
            out["qk_norm"] = {**norm(), "over": draw(st.sampled_from(["head", "width"]))}
        return out

    def mlp() -> dict[str, Any]:
        gated = draw(maybe)
        kinds = ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", *(["clamped_swiglu"] if gated else [])]
        experts = draw(st.sampled_from([0, 0, 4, 7]))
        mixture = {
            "kind": "moe",
            "experts": experts,
            "router": {
                "top_k": draw(st.sampled_from([1, 2])),
                "score": draw(st.sampled_from(["softmax", "sigmoid"])),
                "renormalise": draw(maybe),
                "scale": draw(st.sampled_from([1.0, 1.7])),
                "bias": draw(maybe),
                "correction": draw(maybe),
            },
            "shared": draw(st.sampled_from([None, {"hidden": 12}, {"hidden": 12, "gate": True}])),
        }
        return {
            **(mixture if experts else {}),
            "hidden": draw(st.sampled_from([20, 32])),
            "gated": gated,
            "activation": draw(st.sampled_from(kinds)),
            "limit": 0.9,
            "bias": {n: draw(maybe) for n in ("gate", "up", "down")},
        }

    def block() -> dict[str, Any]:
        placement = draw(st.sampled_from(["pre", "post", "sandwich"]))
        parallel = draw(maybe)
        return {
            "attention": attention(),
            "mlp": mlp(),
            "norm": norm(),
            "placement": placement,
            "parallel": parallel,
            "shared_norm": parallel and placement != "post" and draw(maybe),
            "residual_scale": draw(st.sampled_from([1.0, 0.4])),
        }

    depth = draw(st.sampled_from([1, 2, 3]))
    pattern = [{}, {"attention": {"position": position(), "window": 3}}] if depth > 1 and draw(maybe) else []
    return parse(
        {
            "vocab_size": draw(st.sampled_from([33, 97])),
            "width": width,
            "depth": depth,
            "context": 32,
            "embedding": {
                "scale": draw(st.sampled_from([None, 2.5])),
                "positions": draw(st.sampled_from([None, {}, {"offset": 2}])),
                "norm": norm() if draw(maybe) else None,
            },
            "block": block(),
            "pattern": pattern,
            "overrides": {"-1": {"mlp": {"hidden": 28}}} if draw(maybe) else {},
            "final_norm": norm() if draw(maybe) else None,
            "head": {
                "tied": draw(maybe),
                "bias": draw(maybe),
                "scale": draw(st.sampled_from([None, 0.4])),
                "softcap": draw(st.sampled_from([None, 4.0])),
            },
        }
    )
