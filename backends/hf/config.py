"""config.json: what a carrier is told, by its row in the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.base import Tokenizer
from backends.folder import end_ids, token_id
from backends.hf import mixture, rotary
from backends.hf.carriers import ACTIVATIONS, KEYS, Carrier
from backends.hf.shipped import ship
from spec.config import Spec


def config(spec: Spec, c: Carrier, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The whole of config.json but the quantization. spec: the source's. dtype: torch's name."""
    shipped = ship(spec, c)
    out: dict[str, Any] = {"architectures": [c.model], "model_type": c.arch, "dtype": dtype}
    keys = {**KEYS, **c.keys}
    for name, value in _sizes(shipped).items():
        _put(out, keys.get(name, ""), value)
    for key, value in {**_switches(shipped, c), **rotary.settings(spec, c), **_windows(shipped, c)}.items():
        _put(out, key, value)
    for role in ("bos", "eos", "pad"):
        out[f"{role}_token_id"] = token_id(tokenizer, getattr(tokenizer, role)) if tokenizer is not None else None
    ends = end_ids(tokenizer)
    if len(ends) > 1:
        out["eos_token_id"] = ends
    return out


def _put(out: dict[str, Any], key: str, value: Any) -> None:
    """A key, or with dots a key of a nested object; an empty one is not written."""
    *outer, last = key.split(".")
    for name in outer:
        out = out.setdefault(name, {})
    if last:
        out[last] = value


def _sizes(spec: Spec) -> dict[str, Any]:
    b = spec.layers[0]
    a, e = b.attention, spec.embedding
    offset = e.positions.offset if e.positions is not None else 0
    return {
        "width": spec.width,
        "depth": spec.depth,
        "heads": a.heads,
        "kv_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden": mixture.dense_hidden(spec),
        "context": spec.position_rows - offset if e.positions is not None else spec.context,
        "activation": ACTIVATIONS.get(b.mlp.activation),
        "eps": b.norm.eps,
        "std": spec.init.std,
        "attention_dropout": a.dropout,
        "residual_dropout": b.dropout,
        "embedding_dropout": e.dropout,
    }


def _switches(spec: Spec, c: Carrier) -> dict[str, Any]:
    """Everything of a row that has a key of its own."""
    b, e, h = spec.layers[0], spec.embedding, spec.head
    a = b.attention
    kind = "shared" if b.shared_norm else "parallel" if b.parallel else "sequential"
    assert a.scale
    scales = {"": None, "value": a.scale, "inverse_square": round(a.scale**-2)}
    has = {n for n in ("q", "k", "v", "o") if getattr(a.bias, n)} | {
        n for n in ("gate", "up", "down") if getattr(b.mlp.bias, n)
    }
    out: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": h.tied,
        **c.constants,
        **c.flow[kind],
        **{key: bool(has & set(parts.split())) for key, parts in c.biases},
        c.qk_key: a.qk_norm is not None,
        c.scale_key: scales[c.scale],
        c.softcap: a.softcap,
        c.clip: a.clip,
        c.residual_scale: b.residual_scale,
        c.logit_scale: 1 / (h.scale or 1.0) if c.logit_divides else h.scale or 1.0,
        c.logit_softcap: h.softcap,
    }
    if c.embed_scale != "sqrt_width":
        out[c.embed_scale] = e.scale or 1.0
    return out if c.mixture is None else out | mixture.settings(spec, c.mixture) | mixture.kernels(spec)


def _windows(spec: Spec, c: Carrier) -> Mapping[str, Any]:
    if c.window == "no":
        return {}
    sizes = [b.attention.window for b in spec.layers if b.attention.window is not None]
    out: dict[str, Any] = {"sliding_window": sizes[0] if sizes else spec.context if c.window_required else None}
    if c.window == "layers":
        out["layer_types"] = rotary.layer_types(spec)
    if c.window_switch:
        out["use_sliding_window"] = bool(sizes)
    return out
