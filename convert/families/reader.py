"""A config.json to a spec, by the row of backends/hf/carriers.py that a config.json is written by.

What a row says of an architecture's code (which keys it reads, what is hard-coded) holds in both directions; so the
functions here are the inverses of those in backends/hf/config.py and backends/hf/rotary.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from backends.hf.carriers import KEYS, Carrier
from backends.hf.rotary import FULL, LOCAL
from convert.families import mixtures
from convert.families.config import Config
from convert.families.rope import Position, rope, rope_by_window
from spec.errors import nearest

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu2",
}  # fmt: skip
"""transformers' names to the spec's."""

Data = dict[str, Any]
MAX_DEPTH = 4096
"""Layers of a spec."""


def choose(c: Config) -> Carrier:
    """The row whose variant of the code config.json asks for. Raises nothing: what no row has is a problem."""

    def wrong(row: Carrier) -> list[tuple[str, Any]]:
        flows = [{**row.constants, **keys} for keys in row.flow.values()]
        misses = [[(k, v) for k, v in f.items() if c.peek(k) != v] for f in flows]
        return min(misses, key=len)

    rows = c.family.carriers
    for row in rows:
        c.taken |= set(row.constants) | {k for keys in row.flow.values() for k in keys}
    best = min(rows, key=lambda r: len(wrong(r)))
    for key, value in wrong(best):
        c.bad(key, c.peek(key), "changes the function and is not supported", f"supported: {value}")
    return best


def read(c: Config, row: Carrier) -> Data:
    """The spec as plain data; empty where the config has problems, which `Config.done` raises."""
    keys = {**KEYS, **row.keys}
    norm = _norm(c, row, keys)
    heads = c.take(keys["heads"], int)
    kv = c.take(keys["kv_heads"], int, optional=True) if keys["kv_heads"] else None
    activation = _activation(c, row, keys)
    head_dim = c.take(keys["head_dim"], int, optional=True) if keys["head_dim"] else None
    context = c.take(keys["context"], int, what="the context length in tokens, such as 2048")
    full, local = _positions(c, row, context)
    dropouts = {n: c.number(keys[n], optional=True) or 0.0 for n in DROPOUTS if keys.get(n)}
    on = _biases(c, row)
    mlp = {**_hidden(c, row, keys), "gated": row.gated, "activation": activation,
           "bias": {n: n in on for n in ("gate", "up", "down")}}  # fmt: skip
    attention: Data = {
        "heads": heads, "kv_heads": 1 if row.mqa else kv if kv is not None else heads, "head_dim": head_dim,
        "position": full, "bias": {n: n in on for n in "qkvo"}, "qk_norm": _qk_norm(c, row, norm),
        "scale": _scale(c, row), "softcap": _optional(c, row.softcap), "clip": _optional(c, row.clip),
        "sinks": row.sinks == "required", "dropout": dropouts.get("attention_dropout", 0.0),
    }  # fmt: skip
    vocab, width, depth = c.take("vocab_size", int), c.take(keys["width"], int), c.take(keys["depth"], int)
    if depth is not None and depth > MAX_DEPTH:  # lists are made of it before the spec is checked
        c.bad(keys["depth"], depth, "is more layers than a spec has", f"at most {MAX_DEPTH}")
        depth = None
    ends = _ends(c, row)
    std = c.number(keys["std"]) or 0.02
    tied = c.take("tie_word_embeddings", bool)
    layers = _layers(c, row, depth, context, full, local)
    sparse = mixtures.sparse(c, row.mixture, depth) if row.mixture is not None else []
    moe = mixtures.mixture(c, row.mixture) if row.mixture is not None else {}
    if c.problems or depth is None:
        return {}
    if mlp["hidden"] is None:
        mlp["hidden"] = (row.hidden_times or c.family.hidden_times) * width
    kind = next(k for k, told in row.flow.items() if all(c.peek(n) == v for n, v in told.items()))
    return {
        "vocab_size": vocab, "width": width, "depth": depth, "context": context,
        "embedding": {
            "scale": width**0.5 if row.embed_scale == "sqrt_width" else ends["embed"],
            "positions": None if row.positions is None else {"offset": row.positions},
            "norm": norm if row.embed_norm else None, "dropout": dropouts.get("embedding_dropout", 0.0),
        },
        "block": {
            "attention": attention, "mlp": {**mlp, **moe}, "norm": norm, "placement": row.placement,
            "parallel": kind != "sequential", "shared_norm": kind == "shared",
            "residual_scale": ends["residual"] or 1.0, "dropout": dropouts.get("residual_dropout", 0.0),
        },
        **_differing([{"attention": a} if on else {"attention": a, "mlp": {"kind": "dense", **mlp}}
                      for a, on in zip(layers, sparse or [True] * depth, strict=True)]),
        "final_norm": norm,
        "head": {"tied": tied, "bias": "head" in on, "scale": ends["logit"], "softcap": ends["softcap"]},
        "init": {"std": std, "depth_scaled": False},
    }  # fmt: skip


DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")


def _norm(c: Config, row: Carrier, keys: Mapping[str, str]) -> Data:
    return {
        "kind": row.norm, "eps": row.eps if row.eps is not None else c.number(keys["eps"]),
        "weight": row.norm_weight, "bias": row.norm_bias, "offset": row.offset if row.norm_weight else 0.0,
    }  # fmt: skip


def _activation(c: Config, row: Carrier, keys: Mapping[str, str]) -> str | None:
    if row.activation:
        return row.activation
    name = c.take(keys["activation"], str)
    if name is not None and name not in ACTIVATIONS:
        c.bad(keys["activation"], name, "is no activation that is read", nearest(name, ACTIVATIONS))
    return ACTIVATIONS.get(name or "")


def _hidden(c: Config, row: Carrier, keys: Mapping[str, str]) -> Data:
    """Nothing said means a multiple of the model's width."""
    key = keys["hidden"]
    return {"hidden": c.take(key, int, optional=bool(c.family.hidden_times)) if key else None}


def _biases(c: Config, row: Carrier) -> set[str]:
    """Parts that have a bias."""
    return {part for key, parts in row.biases if not key or c.take(key, bool) for part in parts.split()}


def _qk_norm(c: Config, row: Carrier, norm: Data) -> Data | None:
    on = row.qk_norm == "required" or (row.qk_norm == "optional" and c.take(row.qk_key, bool))
    if not on:
        return None
    return {"kind": row.qk_kind, "over": row.qk_over, "eps": norm["eps"], "bias": row.qk_bias, "offset": row.offset}


def _optional(c: Config, key: str) -> Any:
    """A number under a key that the row may lack; 0 stands for none in some code, and is refused."""
    value = c.number(key, optional=True) if key else None
    if value is not None and value <= 0:
        c.bad(key, value, "must be positive", "null for none")
    return value


def _scale(c: Config, row: Carrier) -> float | None:
    value = _optional(c, row.scale_key) if row.scale else None
    return value**-0.5 if value is not None and value > 0 and row.scale == "inverse_square" else value


def _ends(c: Config, row: Carrier) -> dict[str, float | None]:
    """Factors outside attention and MLP; 1 is none."""
    found = {
        "embed": _optional(c, "" if row.embed_scale == "sqrt_width" else row.embed_scale),
        "residual": _optional(c, row.residual_scale), "logit": _optional(c, row.logit_scale),
        "softcap": _optional(c, row.logit_softcap),
    }  # fmt: skip
    if found["logit"] and row.logit_divides:
        found["logit"] = 1 / found["logit"]
    return {n: None if v == 1 and n != "softcap" else v for n, v in found.items()}


def _positions(c: Config, row: Carrier, context: int | None) -> tuple[Position, Position]:
    """Of layers without and with a window."""
    if row.rope == "none":
        still = {"kind": "alibi", "max_bias": 8.0} if row.alibi else {"kind": "none"}
        return still, still
    if row.rope_by == "window":
        return rope_by_window(c, row, context)
    one = rope(c, row, context)
    return one, one


def _layers(
    c: Config, row: Carrier, depth: int | None, context: int | None, full: Position, local: Position
) -> list[Data]:
    """What differs from layer to layer, a partial `attention` each. A window as long as the context hides nothing, and
    is left out where nothing else hangs on it."""
    window = c.take("sliding_window", int, optional=True) if row.window != "no" else None
    on = c.take("use_sliding_window", bool) if row.window_switch else True
    turning = _turning(c, row, depth)
    kinds = _kinds(c, row, depth, window, bool(on))
    if c.problems or depth is None or context is None:
        return []
    idle = window is not None and window >= context and row.rope_by != "window" and row.no_position in ("no", "list")
    out: list[Data] = []
    for i, kind in enumerate(kinds):
        mine = window if on and kind == LOCAL and not idle else None
        position = local if kind == LOCAL else full
        if row.no_position == "global":
            still = mine is None
        elif row.no_position == "windowed":
            still = window is not None and mine is None
        else:
            still = turning[i] is False
        if turning[i] is not True and not still:
            position = {**position, "theta": float(turning[i])}
        out.append({"window": mine, "position": {"kind": "none"} if still else position})
    return out


def _kinds(c: Config, row: Carrier, depth: int | None, window: int | None, on: bool) -> Sequence[str]:
    """With or without a window: every layer's kind."""
    if row.window == "no":
        return [FULL] * (depth or 0)
    if row.window == "all":
        return [LOCAL if on and window is not None else FULL] * (depth or 0)
    kinds = c.take("layer_types", list, optional=True)
    if kinds is None and depth is not None and not c.problems:
        assert c.family.layer_types is not None
        kinds = c.family.layer_types(c, depth)
    if kinds is None or depth is None:
        return []
    odd = sorted({str(k) for k in kinds} - {LOCAL, FULL})
    if odd or len(kinds) != depth:
        c.bad("layer_types", odd[0] if odd else f"{len(kinds)} entries", "does not describe the layers",
              f"{depth} of {FULL} or {LOCAL}")  # fmt: skip
    elif LOCAL in kinds and window is None:
        c.bad("sliding_window", None, f"is missing, and layer_types names {LOCAL}", "its size in tokens")
    elif LOCAL in kinds and not on:
        c.bad("use_sliding_window", False, f"contradicts layer_types, which name {LOCAL}", "correct one of them")
    return kinds


def _turning(c: Config, row: Carrier, depth: int | None) -> list[Any]:
    """For every layer: false where it does not rotate, a base of its own, or true."""
    key = {"list": "no_rope_layers", "theta": "layer_rope_theta"}.get(row.no_position)
    said = c.take(key, list, optional=True) if key else None
    every = c.take("no_rope_layer_interval", int) if row.no_position == "list" else 0
    if depth is None:
        return []
    if said is None or key is None:
        return [not every or (i + 1) % every != 0 for i in range(depth)]
    fine = all(isinstance(v, int | float) and v >= 0 for v in said)
    if not fine or len(said) < depth:
        c.bad(key, said, "does not describe the layers", f"{depth} numbers, 0 where a layer does not rotate")
    return [False if v == 0 else v if row.no_position == "theta" else True for v in said] if fine else []


def _differing(layers: list[Data]) -> Data:
    """Partial blocks as a pattern where one repeats, else as overrides."""
    for period in range(1, len(layers) // 2 + 1):
        if all(block == layers[i % period] for i, block in enumerate(layers)):
            return {"pattern": layers[:period]}
    out: Data = {}
    start = 0
    for block, run in groupby(layers):
        stop = start + len(list(run))
        out[f"{start}..{stop - 1}"] = block
        start = stop
    return {"overrides": out}
