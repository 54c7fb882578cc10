"""The architecture's metadata: what llama.cpp reads of a spec besides its tensors."""

from __future__ import annotations

from typing import Any

from backends.gguf.fit import NEUTRAL_CAP, Fit
from backends.gguf.mixtures import keys
from backends.gguf.rotary import local_layers
from spec.config import Alibi, MoE, Spec

FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11,
    "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19,
    "iq2_xs": 20, "q2_k_s": 21, "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27,
    "iq2_s": 28, "iq2_m": 29, "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38,
    "mxfp4_moe": 38, "q3_k": 12, "q4_k": 15, "q5_k": 17,
}  # fmt: skip
"""`general.file_type` by level: a label for listings, nothing depends on it. 1024: mixed by other rules."""


def architecture(spec: Spec, fit: Fit) -> dict[str, Any]:
    """Keys without the architecture's prefix. Python ints become uint32, floats float32, lists arrays."""
    c, layers = fit.carrier, spec.layers
    a, networks = layers[0].attention, [b.mlp for b in layers]
    heads = [b.attention.heads for b in layers]
    kv = [b.attention.kv_heads or 0 for b in layers]
    out: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.context,
        "embedding_length": spec.width,
        "block_count": spec.depth,
        "feed_forward_length": next((m.hidden for m in networks if not isinstance(m, MoE)), networks[0].hidden),
        "attention.head_count": heads[0] if len(set(heads)) == 1 else heads,
        "attention.head_count_kv": kv[0] if len(set(kv)) == 1 else kv,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
    }
    for kind, key in (("rmsnorm", "layer_norm_rms_epsilon"), ("layernorm", "layer_norm_epsilon")):
        eps = [n.eps for n in _norms(spec) if n.kind == kind]
        if eps:
            out[f"attention.{key}"] = eps[0]
    out |= fit.rotary.keys
    windows = [b.attention.window for b in layers]
    if c.window == "required" or any(windows):
        out["attention.sliding_window"] = next((w for w in windows if w), spec.context)
        out["attention.sliding_window_pattern"] = local_layers(spec, c)
    if c.scale:
        out["attention.scale"] = a.scale
    if c.alibi == "key":
        out["attention.max_alibi_bias"] = float(a.position.max_bias) if isinstance(a.position, Alibi) else 0.0
    if c.softcap != "no":
        out["attn_logit_softcapping"] = a.softcap if a.softcap is not None else NEUTRAL_CAP
    if c.logit_softcap == "required" or spec.head.softcap is not None:
        out["final_logit_softcapping"] = spec.head.softcap if spec.head.softcap is not None else NEUTRAL_CAP
    if a.clip is not None:
        out["attention.clamp_kqv"] = a.clip
    if c.logit_scale != "no":
        s = spec.head.scale or 1.0
        out["logit_scale"] = s if c.logit_scale == "times" else 1 / s
    if c.residual_scale:
        out["residual_scale"] = layers[0].residual_scale
    if c.embed_scale == "key" and spec.embedding.scale is not None:
        out["embedding_scale"] = spec.embedding.scale
    if "parallel" in c.flow:
        out["use_parallel_residual"] = layers[0].parallel
    return dict(c.keys) | out | keys(spec, c)


def _norms(spec: Spec) -> list[Any]:
    out: list[Any] = [spec.final_norm, spec.embedding.norm]
    for b in spec.layers:
        out += [b.norm, b.attention.qk_norm]
    return [n for n in out if n is not None]
