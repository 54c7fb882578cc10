"""How mlx-lm's configurations say a rotary table, and the order of q and k rows that its kernels expect."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec.config import (
    Attention,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Spec,
    YarnScaling,
)
from spec.rope import RopeTable, longrope_attention_factor


def plain(a: Attention, *, partial: bool = False) -> bool:
    """Whether a layer rotates without scaling: the whole head, or with `partial` its first dimensions."""
    p = a.position
    return isinstance(p, Rope) and p.scaling is None and (partial or p.fraction == 1)


def configured(spec: Spec, a: Attention) -> dict[str, Any] | None:
    """`rope_theta` and `rope_scaling` for architectures that read both, or none where no setting gives this table.

    Length-dependent tables are those of the spec's whole context: dynamic scaling is then another theta, and LongRoPE
    one list of divisors. A partial rotation is "proportional" with its rows in another order (`rows`).
    """
    p = a.position
    if not isinstance(p, Rope) or a.head_dim is None:
        return None
    theta, s, dim = p.theta, p.scaling, p.rotary_dim(a.head_dim)
    if dim != a.head_dim:
        if a.head_dim % 2 or not (s is None or isinstance(s, LinearScaling)):
            return None
        scaling: dict[str, Any] | None = {"rope_type": "proportional", "partial_rotary_factor": p.fraction}
        scaling |= {"factor": s.factor} if s else {}
        return {"rope_theta": theta ** (a.head_dim / dim), "rope_scaling": scaling}
    match s:
        case None:
            scaling = None
        case LinearScaling():
            scaling = {"rope_type": "linear", "factor": s.factor}
        case DynamicScaling():
            assert s.original_context is not None
            grown = s.factor * max(spec.context, s.original_context) / s.original_context - (s.factor - 1)
            theta, scaling = theta * grown ** (dim / (dim - 2)), None
        case Llama3Scaling():
            scaling = {
                "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_context,
            }  # fmt: skip
        case YarnScaling():
            scaling = _yarn(s)
        case LongRopeScaling():
            scaling = _longrope(spec, s)
    return None if s is not None and scaling is None and not isinstance(s, DynamicScaling) else {
        "rope_theta": theta, "rope_scaling": scaling,
    }  # fmt: skip


def _yarn(s: YarnScaling) -> dict[str, Any] | None:
    """mlx-lm's range of dimensions is always whole, and its factor is 0.1 mscale ln(factor) + 1."""
    wanted = s.attention_factor
    if not s.truncate or (s.factor <= 1 and wanted not in (None, 1.0)):
        return None
    mscale = 1.0 if wanted is None or s.factor <= 1 else (wanted - 1) / (0.1 * math.log(s.factor))
    return {
        "rope_type": "yarn", "factor": s.factor, "original_max_position_embeddings": s.original_context,
        "beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "mscale": mscale,
    }  # fmt: skip


def _longrope(spec: Spec, s: LongRopeScaling) -> dict[str, Any] | None:
    """mlx-lm always takes the long divisors, and its factor is that of the whole context."""
    factor = longrope_attention_factor(spec.context, s.original_context)
    if s.attention_factor is None or not math.isclose(s.attention_factor, factor, rel_tol=1e-9):
        return None
    chosen = list(s.long_factor if spec.context > s.original_context else s.short_factor)
    return {
        "rope_type": "longrope", "short_factor": chosen, "long_factor": chosen,
        "original_max_position_embeddings": s.original_context, "factor": spec.context / s.original_context,
    }  # fmt: skip


def read(config: Mapping[str, Any], head_dim: int, local: bool) -> RopeTable:
    """The table that mlx-lm makes of a configuration (`mlx_lm.models.rope_utils`), the other way round; `local`: that
    of a layer with a window, where the architecture has another base there.

    Raises KeyError, TypeError or ValueError where the settings are none.
    """
    own = local and "rope_local_base_freq" in config
    base = float(config["rope_local_base_freq" if own else "rope_theta"])
    if base <= 0:
        raise ValueError(base)
    s = {} if own else config.get("rope_scaling") or {}
    dim = int(head_dim * config.get("partial_rotary_factor", 1.0))
    kind, scale, factor = s.get("rope_type", "default"), float(s.get("factor", 1.0)), 1.0
    old = s.get("original_max_position_embeddings", 0)
    freq = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    wave = 2 * np.pi / freq
    match kind:
        case "default":
            pass
        case "linear":
            freq = freq / scale
        case "proportional":
            freq = freq / scale
            freq[int(dim * s["partial_rotary_factor"]) // 2 :] = 0
        case "llama3":
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            smooth = (old / wave - low) / (high - low)
            mixed = ((1 - smooth) / scale + smooth) * freq
            freq = np.where(wave > old / low, freq / scale, np.where(wave > old / high, mixed, freq))
        case "yarn":
            turns = [old / (s[f"beta_{x}"] * 2 * math.pi) for x in ("fast", "slow")]
            low, high = (dim * math.log(t) / (2 * math.log(base)) for t in turns)
            low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
            ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
            freq = freq * (1 - ramp) + freq / scale * ramp
            factor = 1.0 if scale <= 1 else 0.1 * s["mscale"] * math.log(scale) + 1
        case "longrope":
            freq = freq / np.asarray(s["long_factor"], np.float64)
            grown = config["max_position_embeddings"] / old
            factor = 1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(old))
        case _:
            raise ValueError(kind)
    return RopeTable(freq.astype(np.float32), factor)


def same(got: RopeTable, want: RopeTable) -> bool:
    """Whether two tables are one, but for the last rounding of each frequency; frequencies of 0 turn nothing."""
    turned = len(want.inv_freq)
    if len(got.inv_freq) < turned or got.inv_freq[turned:].any():
        return False
    close = np.abs(got.inv_freq[:turned] - want.inv_freq) <= np.spacing(want.inv_freq)
    return bool(close.all()) and math.isclose(got.factor, want.factor, rel_tol=1e-12)


def rows(a: Attention, heads: int, *, traditional: bool, proportional: bool) -> NDArray[np.intp]:
    """[heads * head_dim]: where each canonical row of q or k goes.

    traditional: the kernel turns neighbours, not halves. proportional: it pairs dimension i with i + head_dim / 2 over
    the whole head, and those beyond the rotated ones have frequency 0.
    """
    assert a.head_dim is not None
    k = a.head_dim
    head = np.arange(k)
    dim = a.position.rotary_dim(k) if isinstance(a.position, Rope) else k
    if traditional:
        head = np.concatenate([np.arange(0, k, 2), np.arange(1, k, 2)])
    elif proportional and dim != k:
        half, mid = dim // 2, k // 2
        turned = [np.arange(half), mid + np.arange(half)]
        head = np.concatenate([*turned, np.arange(half, mid), np.arange(mid + half, k)])
    return (np.arange(heads)[:, None] * k + head).reshape(-1)
