"""Rotary tables and ALiBi slopes: computed once, in float64, rounded to float32 once, the same for every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spec.config import (
    Alibi,
    Attention,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Spec,
    YarnScaling,
)


@dataclass(frozen=True, eq=False)
class RopeTable:
    """What a rotation needs: angle = position * inv_freq; cos and sin are multiplied by `factor`."""

    inv_freq: NDArray[np.float32]
    """[rotary_dim / 2], angles per position."""
    factor: float
    """Attention factor (1.0 without YaRN or LongRoPE)."""

    @property
    def dim(self) -> int:
        """Rotated dimensions of a head."""
        return 2 * len(self.inv_freq)


def longrope_attention_factor(context: int, original: int) -> float:
    """sqrt(1 + ln(s) / ln(original)) with s = context / original, 1 where s <= 1 (Ding et al. 2024)."""
    s = context / original
    return 1.0 if s <= 1 else math.sqrt(1 + math.log(s) / math.log(original))


def rope_table(rope: Rope, head_dim: int, length: int) -> RopeTable:
    """The table of one rotary setting.

    `rope` comes from a resolved layer. `length` is the session's declared maximum length in tokens: the
    length-dependent scalings (dynamic, longrope) choose once by it, so that prefill, chunks and single tokens agree.
    """
    dim = rope.rotary_dim(head_dim)
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    freq = rope.theta**-exponent
    factor, s = 1.0, rope.scaling
    match s:
        case LinearScaling():
            freq = freq / s.factor
        case DynamicScaling():
            assert s.original_context is not None
            n = max(length, s.original_context)
            grown = s.factor * n / s.original_context - (s.factor - 1)
            freq = (rope.theta * grown ** (dim / (dim - 2))) ** -exponent
        case Llama3Scaling():
            freq = _llama3(freq, s)
        case YarnScaling():
            freq = _yarn(freq, s, rope.theta, dim)
            factor = s.attention_factor if s.attention_factor is not None else _yarn_factor(s.factor)
        case LongRopeScaling():
            chosen = s.long_factor if length > s.original_context else s.short_factor
            freq = freq / np.asarray(chosen, dtype=np.float64)
            assert s.attention_factor is not None
            factor = s.attention_factor
        case None:
            pass
    return RopeTable(freq.astype(np.float32), factor)


def _llama3(freq: NDArray[np.float64], s: Llama3Scaling) -> NDArray[np.float64]:
    turns = s.original_context * freq / (2 * math.pi)  # rotations over the original context
    smooth = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0, 1)
    return freq * (smooth + (1 - smooth) / s.factor)


def _yarn_factor(factor: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def _yarn(freq: NDArray[np.float64], s: YarnScaling, theta: float, dim: int) -> NDArray[np.float64]:
    assert s.original_context is not None

    def index(rotations: float) -> float:
        return dim * math.log(s.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))  # type: ignore[operator]

    low, high = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    return freq / s.factor * ramp + freq * (1 - ramp)


def alibi_slopes(alibi: Alibi, heads: int) -> NDArray[np.float32]:
    """[heads] slopes of Press et al. 2021, with the interleaving of its reference code for other head counts."""
    n = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-alibi.max_bias * np.arange(1, n + 1, dtype=np.float64) / n)
    if n != heads:  # the slopes of the smaller power of two (every second one), then the ones between
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:heads]
    return slopes.astype(np.float32)


def layer_table(a: Attention, length: int) -> RopeTable | None:
    """The rotary table of a resolved layer's attention, or none where it does not rotate."""
    assert a.head_dim is not None
    return rope_table(a.position, a.head_dim, length) if isinstance(a.position, Rope) else None


def rope_keys(spec: Spec) -> tuple[int | None, ...]:
    """For every layer the index of its table in `rope_tables`, or none."""
    return tuple(key for key, _ in _tables(spec))


def rope_tables(spec: Spec, length: int | None = None) -> tuple[RopeTable, ...]:
    """The distinct tables of a spec, for sessions of at most `length` tokens (default: the spec's context)."""
    out: dict[int, RopeTable] = {}
    for key, a in _tables(spec):
        if key is not None and key not in out:
            table = layer_table(a, length or spec.context)
            assert table is not None
            out[key] = table
    return tuple(out.values())


def _tables(spec: Spec) -> list[tuple[int | None, Attention]]:
    known: dict[tuple[Rope, int], int] = {}
    out: list[tuple[int | None, Attention]] = []
    for b in spec.layers:
        a = b.attention
        if isinstance(a.position, Rope) and a.head_dim is not None:
            out.append((known.setdefault((a.position, a.head_dim), len(known)), a))
        else:
            out.append((None, a))
    return out
