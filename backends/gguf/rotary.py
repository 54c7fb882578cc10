"""How a carrier is told the spec's rotations: base, scaling keys, and tensors of frequency divisors.

llama.cpp turns pair i of n rotated pairs by position * base^(-i / n) * freq_scale / divisor[i], in float32, and
multiplies cos and sin by an attention factor. A divisor of 1e30 leaves a pair as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.carriers import Carrier
from spec.config import Attention, DynamicScaling, LinearScaling, LongRopeScaling, NoPosition, Rope, Spec, YarnScaling
from spec.rope import RopeTable, rope_table

DEAD = 1e30
"""Divisor of a pair that must not turn: cos is exactly 1, and sin under 1e-24 for any position."""


@dataclass
class Rotary:
    """Metadata (without the architecture's prefix), tensors, and what to tell the user."""

    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    folds: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    session: int | None = None
    """Length for which length-dependent tables were fixed, where llama.cpp does not choose by itself."""


def local_layers(spec: Spec, c: Carrier) -> list[bool]:
    """Which layers are marked as having a window. A graph that insists on some gets all of them, with a window as
    long as the context, where the spec has none."""
    windows = [b.attention.window is not None for b in spec.layers]
    return [True] * spec.depth if c.window == "required" and not any(windows) else windows


def plan(spec: Spec, c: Carrier) -> Rotary:
    """The rotations of `spec` in terms of carrier `c`, or refusals."""
    out = Rotary()
    still = [i for i, b in enumerate(spec.layers) if not isinstance(b.attention.position, Rope)]
    turning = [i for i in range(spec.depth) if i not in set(still)]
    if c.rope == "none":
        if turning:
            out.refusals.append(f"{_at(spec, turning[0])}: rope, which llama.cpp's {c.arch} lacks")
        return out
    if _no_position(spec, c, still, out) and not out.refusals:
        _rotations(spec, c, turning, out)
    return out


def _at(spec: Spec, i: int) -> str:
    return "block.attention.position" if len(set(map(id, spec.layers))) == 1 else f"layers[{i}].attention.position"


def _no_position(spec: Spec, c: Carrier, still: list[int], out: Rotary) -> bool:
    """Settle the layers that do not rotate; whether there are rotations left to plan."""
    if c.no_position == "global":
        if still != [i for i, local in enumerate(local_layers(spec, c)) if not local]:
            out.refusals.append(f"{_at(spec, 0)}: llama.cpp's {c.arch} rotates exactly the layers that have a window")
        return True
    if not still:
        return True
    if not all(isinstance(spec.layers[i].attention.position, NoPosition) for i in still):
        out.refusals.append(f"{_at(spec, still[0])}: alibi, which llama.cpp's {c.arch} lacks")
    elif c.no_position == "layer":
        out.keys["attention.rope_pattern"] = [i not in set(still) for i in range(spec.depth)]
    elif len(still) < spec.depth:
        out.refusals.append(f"{_at(spec, still[0])}: none in some layers only, which llama.cpp's {c.arch} lacks")
    elif c.no_position == "all":
        out.keys["rope.scaling.finetuned"] = False
        return False
    elif c.freqs in ("freqs", "both") and not c.partial:
        head_dim = spec.layers[0].attention.head_dim or 0
        out.keys["rope.dimension_count"] = head_dim
        out.tensors["rope_freqs.weight"] = np.full(head_dim // 2, DEAD, np.float32)
        out.folds.append("no positions: frequency divisors of 1e30 leave every pair as it is (exact)")
        return False
    else:
        out.refusals.append(f"{_at(spec, still[0])}: none, and llama.cpp's {c.arch} always rotates")
    return len(still) < spec.depth


def _tables(spec: Spec, layers: list[int]) -> Iterator[tuple[Rope, Attention]]:
    seen: set[tuple[Rope, int | None]] = set()
    for i in layers:
        a = spec.layers[i].attention
        assert isinstance(a.position, Rope)
        if (a.position, a.head_dim) not in seen:
            seen.add((a.position, a.head_dim))
            yield a.position, a


def _rotations(spec: Spec, c: Carrier, turning: list[int], out: Rotary) -> None:
    marked = local_layers(spec, c)
    local = [i for i in turning if marked[i]] if c.window_theta else []
    full = [i for i in turning if i not in set(local)]
    groups = {"full": list(_tables(spec, full)), "local": list(_tables(spec, local))}
    for name, tables in groups.items():
        if len(tables) > 1:
            which = {"full": "layers", "local": "layers with a window"}[name]
            out.refusals.append(
                f"{_at(spec, 0)}: {len(tables)} different rotations among {which}; llama.cpp's {c.arch} has one"
            )
    if out.refusals:
        return
    for rope, a in groups["full"]:
        _full(spec, c, rope, a, out)
    for rope, a in groups["local"]:
        if not groups["full"]:
            _plain(spec, rope, a, out, "rope.freq_base", "rope.dimension_count", c.full_dims)
        _local(spec, c, rope, a, out)
    local_dims = int(out.keys.get("rope.dimension_count_swa", 0))
    for name, t in out.tensors.items():  # one tensor serves all layers and is as long as the widest rotation
        out.tensors[name] = np.concatenate([t, np.ones(max(0, local_dims // 2 - len(t)), np.float32)])


def _dims(c: Carrier, rope: Rope, a: Attention) -> int | None:
    """Dimensions that the graph must rotate so that all of `rope` fits, or none where it cannot."""
    head_dim = a.head_dim or 0
    rotary = rope.rotary_dim(head_dim)
    if rotary == head_dim or c.partial:
        return rotary
    return head_dim if c.rope == "interleaved" and c.freqs in ("freqs", "both") else None


def _plain(spec: Spec, rope: Rope, a: Attention, out: Rotary, base: str, count: str, share: float) -> None:
    out.keys[base] = _theta(rope, a.head_dim or 0, spec.context)
    out.keys[count] = round(rope.rotary_dim(a.head_dim or 0) / share)


def _theta(rope: Rope, head_dim: int, length: int) -> float:
    """The base that gives the frequencies of `rope` without a factor that is the same for all."""
    s, dim = rope.scaling, rope.rotary_dim(head_dim)
    if not isinstance(s, DynamicScaling) or s.original_context is None:
        return float(rope.theta)
    n = max(length, s.original_context)
    return float(rope.theta * (s.factor * n / s.original_context - (s.factor - 1)) ** (dim / (dim - 2)))


def _local(spec: Spec, c: Carrier, rope: Rope, a: Attention, out: Rotary) -> None:
    dims = _dims(c, rope, a)
    if rope.scaling is not None or dims != rope.rotary_dim(a.head_dim or 0):
        out.refusals.append(
            f"{_at(spec, 0)}.scaling: layers with a window rotate without scaling in llama.cpp's {c.arch}"
        )
    elif c.window_theta == "own" and (
        out.keys.get("rope.scaling.attn_factor", 1.0) != 1.0 or out.keys.get("rope.scaling.type") == "yarn"
    ):
        out.refusals.append(
            f"{_at(spec, 0)}.scaling: an attention factor would reach the layers with a window in llama.cpp's {c.arch}"
        )
    elif c.window_theta == "same" and rope.theta != out.keys["rope.freq_base"]:
        out.refusals.append(
            f"{_at(spec, 0)}.theta: {rope.theta:g} in layers with a window; llama.cpp's {c.arch} has one for all"
        )
    else:
        _plain(spec, rope, a, out, "rope.freq_base_swa", "rope.dimension_count_swa", 1.0)


def _full(spec: Spec, c: Carrier, rope: Rope, a: Attention, out: Rotary) -> None:
    head_dim, s = a.head_dim or 0, rope.scaling
    dims = _dims(c, rope, a)
    if dims is None:
        out.refusals.append(
            f"{_at(spec, 0)}.fraction: {rope.fraction:g} of a head, where llama.cpp's {c.arch} rotates all of it"
        )
        return
    table = rope_table(rope, head_dim, spec.context)
    out.keys["rope.dimension_count"] = round(dims / c.full_dims)
    out.keys["rope.freq_base"] = _theta(rope, head_dim, spec.context)
    whole = dims == table.dim
    if not whole and table.factor != 1.0:
        out.refusals.append(
            f"{_at(spec, 0)}.scaling: {s.kind if s else 'none'} with an attention factor, which would reach the "
            f"dimensions that do not rotate in llama.cpp's {c.arch}"
        )
        return
    if isinstance(s, DynamicScaling):
        out.folds.append(f"dynamic rotary scaling: fixed for sessions of the whole context ({spec.context} tokens)")
        out.session = spec.context
    if whole and (s is None or isinstance(s, DynamicScaling)):
        return
    if whole and isinstance(s, LinearScaling) and "linear" in c.scaling:
        out.keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(s.factor)}
    elif isinstance(s, LongRopeScaling) and _native_longrope(spec, c, s, dims, out, rope, head_dim):
        pass
    elif c.freqs in ("freqs", "both") and not (c.window_theta and table.factor != 1.0 and _windows(spec)):
        if isinstance(s, LongRopeScaling):
            _fix_longrope(spec, s, out)
        base = float(out.keys["rope.freq_base"])
        out.tensors["rope_freqs.weight"] = divisors(table, base, dims)
        _attention_factor(table, out)
        if not whole:
            out.folds.append("partial rotation: frequency divisors of 1e30 leave the other pairs as they are (exact)")
        elif s is not None:
            out.folds.append(f"{s.kind} rotary scaling: one frequency divisor a pair")
    elif c.freqs == "longrope":
        if isinstance(s, LongRopeScaling):
            _fix_longrope(spec, s, out)
        same = divisors(table, float(out.keys["rope.freq_base"]), dims)
        out.tensors |= {"rope_factors_long.weight": same, "rope_factors_short.weight": same}
        _attention_factor(table, out)
        out.folds.append(f"{s.kind if s else 'partial'} rotation: one frequency divisor a pair")
    elif whole and isinstance(s, YarnScaling) and "yarn" in c.scaling and _plain_yarn(s):
        out.keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(s.factor),
            "rope.scaling.original_context_length": s.original_context,
        }
        default = 1.0 if s.factor <= 1 else 0.1 * np.log(s.factor) + 1.0
        if abs(table.factor / default - 1) > 1e-12:
            out.keys["rope.scaling.attn_factor"] = float(table.factor / default)
    else:
        kind = s.kind if s is not None else "partial"
        out.refusals.append(f"{_at(spec, 0)}.scaling: {kind}, which llama.cpp's {c.arch} cannot express")


def _windows(spec: Spec) -> bool:
    return any(b.attention.window is not None for b in spec.layers)


def _plain_yarn(s: YarnScaling) -> bool:
    return s.beta_fast == 32 and s.beta_slow == 1 and s.truncate


def _attention_factor(table: RopeTable, out: Rotary) -> None:
    if table.factor != 1.0:
        out.keys["rope.scaling.attn_factor"] = float(table.factor)


def _fix_longrope(spec: Spec, s: LongRopeScaling, out: Rotary) -> None:
    long = spec.context > s.original_context
    out.session = spec.context if long else None
    if long:
        out.folds.append(f"longrope: the long factors at every length (sessions of {spec.context} tokens)")


def _native_longrope(
    spec: Spec, c: Carrier, s: LongRopeScaling, dims: int, out: Rotary, rope: Rope, head_dim: int
) -> bool:
    """llama.cpp compares the session's length, rounded up to 256, with the original context."""
    if c.freqs not in ("longrope", "both") or s.original_context % 256 or spec.context <= s.original_context:
        return False
    if c.window_theta and _windows(spec):
        return False
    base = float(out.keys["rope.freq_base"])
    for name, length in (("long", spec.context), ("short", s.original_context)):
        out.tensors[f"rope_factors_{name}.weight"] = divisors(rope_table(rope, head_dim, length), base, dims)
    out.keys |= {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": s.original_context,
    }
    _attention_factor(rope_table(rope, head_dim, spec.context), out)
    return True


def divisors(table: RopeTable, base: float, dims: int) -> NDArray[np.float32]:
    """[dims / 2] such that base^(-2i / dims) / divisor[i] is the table's frequency; 1e30 beyond the table."""
    own = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    out = np.full(dims // 2, DEAD)
    n = len(table.inv_freq)
    out[:n] = own[:n] / table.inv_freq.astype(np.float64)
    return out.astype(np.float32)
