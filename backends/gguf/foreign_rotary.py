"""A file's rotations as a spec has them, the inverse of `backends.gguf.rotary`.

llama.cpp turns pair i of n by position * base^(-i / n) / (factor * divisor[i]). Divisors come as a tensor without a
word on where they are from, so the formulas are tried and one is believed only if it gives these very divisors:
bit for bit as this program writes them, or within the rounding of the float32 steps of llama.cpp's own converter.
Other divisors stay what they are: a factor for each pair, which is what the spec's `longrope` holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.carriers import Carrier
from backends.gguf.keys import Keys, decimal
from backends.gguf.rotary import DEAD, divisors
from spec.config import Rope
from spec.rope import rope_table

Vector = Callable[[str], NDArray[np.float32] | None]
"""A float32 tensor of the file by its name, or none."""
Position = dict[str, Any]

PUBLISHED = ((1.0, 4.0, 8192),)
"""low_freq_factor, high_freq_factor and original context of the models that have the llama3 scaling."""
_POWERS = tuple((1.0, 4.0, 1 << n) for n in range(4, 21))


def rotations(c: Carrier, k: Keys, vector: Vector, head_dim: int, context: int, windows: bool) -> list[Position]:
    """The positions of layers without a window and with one. Problems are noted with the keys."""
    count = k.whole("rope.dimension_count", head_dim)
    local_dims = k.whole("rope.dimension_count_swa", count)
    sections = k.raw("rope.dimension_sections", [])
    if any(sections if isinstance(sections, list) else [sections]):
        k.bad("rope.dimension_sections", "is not read (rotation in sections)")
    dims = int((count or 0) * c.full_dims)
    if dims < 2 or dims % 2 or dims > head_dim or (dims < head_dim and not c.partial):
        k.bad("rope.dimension_count", f"does not fit heads of {head_dim} in llama.cpp's {c.arch}")
        return []
    theta = k.number("rope.freq_base", 10000.0)
    full = _full(c, k, vector, theta, dims, head_dim, context, windows)
    base = {"own": c.local_theta or theta, "same": theta, "": theta}[c.window_theta]
    local_theta = k.number("rope.freq_base_swa", base)
    if c.window_theta != "own" and local_theta != theta:
        k.bad("rope.freq_base_swa", f"is not rope.freq_base ({theta:g}), and llama.cpp's {c.arch} has one base")
    if k.problems:
        return []
    local = full if not c.window_theta else _plain(local_theta, local_dims, head_dim)
    return [full, local]


def _plain(theta: float, dims: int, head_dim: int, scaling: dict[str, Any] | None = None) -> Position:
    return {"kind": "rope", "theta": float(theta), "fraction": _fraction(dims, head_dim), "scaling": scaling}


def _fraction(dims: int, head_dim: int) -> float:
    """The share of a head of which the whole part is `dims`."""
    share = dims / head_dim
    return share if int(head_dim * share) == dims else float(np.nextafter(share, 1))


def _full(
    c: Carrier, k: Keys, vector: Vector, theta: float, dims: int, head_dim: int, context: int, windows: bool
) -> Position:
    kind = k.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        k.bad("rope.scaling.type", "is no scaling that is read", "none, linear, yarn or longrope")
    factor = k.number("rope.scaling.factor", 0.0) or k.number("rope.scale_linear", 0.0) or 1.0
    k.raw("rope.scale_linear")
    factor = 1.0 if kind == "none" else factor
    attention = k.number("rope.scaling.attn_factor", 1.0)
    original = k.whole("rope.scaling.original_context_length", context)
    declared = k.number("rope.scaling.yarn_attn_factor", None)
    tensors = {n: vector(f"rope_{n}.weight") for n in _tensors(c, kind)}
    found = {n: v[: dims // 2].astype(np.float64) for n, v in tensors.items() if v is not None}
    for n, v in found.items():
        if len(v) < dims // 2 or not np.isfinite(v).all() or (v <= 0).any():
            k.bad("rope.dimension_count", f"needs {dims // 2} positive divisors in rope_{n}.weight")
    if declared is not None and declared not in (1.0, decimal(_yarn(factor))):
        k.bad(
            "rope.scaling.yarn_attn_factor", f"is not read by llama.cpp's {c.arch}, whose factor is {_yarn(factor):g}"
        )
    if c.window_theta == "own" and windows and (attention != 1 or kind == "yarn"):
        k.bad("rope.scaling.attn_factor" if attention != 1 else "rope.scaling.type",
              f"reaches the layers with a window too in llama.cpp's {c.arch}, which a spec cannot say")  # fmt: skip
    if found and (factor != 1 or kind == "yarn"):
        k.bad("rope.scaling.type", f"comes together with {next(iter(found))} divisors")
    if not found and factor != 1 and kind in ("linear", "yarn", "longrope") and kind not in (*c.scaling, "longrope"):
        k.bad("rope.scaling.factor", f"has an effect in llama.cpp's {c.arch} that a spec cannot say")
    if attention != 1 and any((v >= DEAD / 10).any() for v in found.values()):
        k.bad("rope.scaling.attn_factor", "reaches pairs that stand still, which a spec cannot say")
    if k.problems:
        return {}
    if len(found) == 2:
        return _longrope(found["factors_short"], found["factors_long"], theta, head_dim, original, attention)
    if "freqs" in found:
        return from_divisors(found["freqs"], theta, dims, head_dim, context, attention)
    if found:
        k.bad("rope.scaling.type", f"has {next(iter(found))} alone, and long and short ones belong together")
    if kind == "yarn":
        scaling = {"kind": "yarn", "factor": factor, "original_context": original}
        if attention != 1:
            scaling["attention_factor"] = _yarn(factor) * attention
        return _plain(theta, dims, head_dim, scaling)
    if attention != 1:
        return _plain(theta, dims, head_dim, _each(np.full(dims // 2, factor), context, attention))
    return _plain(theta, dims, head_dim, {"kind": "linear", "factor": factor} if factor != 1 else None)


def _tensors(c: Carrier, kind: str) -> tuple[str, ...]:
    """The tensors of divisors that the graph reads."""
    long = ("factors_long", "factors_short")
    if c.freqs == "both":
        return long if kind == "longrope" else ("freqs",)
    return {"no": (), "freqs": ("freqs",), "longrope": long}[c.freqs]


def _yarn(factor: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def _each(factors: NDArray[np.float64], context: int, attention: float) -> dict[str, Any]:
    """A factor for each pair, at every length."""
    same = [float(f) for f in factors]
    return {"kind": "longrope", "short_factor": same, "long_factor": same, "original_context": context,
            "attention_factor": float(attention)}  # fmt: skip


def _alive(*tensors: NDArray[np.float64]) -> int:
    """Pairs that turn: divisors from a position on may be those of pairs that stand still."""
    return max((int((t < DEAD / 10).sum()) for t in tensors), default=0)


def _longrope(
    short: NDArray[np.float64], long: NDArray[np.float64], theta: float, head_dim: int, original: int, attention: float
) -> Position:
    n, dims = _alive(short, long), 2 * len(short)
    if n == 0:
        return {"kind": "none"}
    own = theta ** (-np.arange(0, dims, 2) / dims)[:n]
    mine = theta ** (-np.arange(0, 2 * n, 2) / (2 * n))
    both = [[decimal(float(np.float32(f))) if 2 * n == dims else float(f) for f in t[:n] * mine / own]
            for t in (short, long)]  # fmt: skip
    scaling = {"kind": "longrope", "short_factor": both[0], "long_factor": both[1], "original_context": original,
               "attention_factor": float(attention)}  # fmt: skip
    return _plain(theta, 2 * n, head_dim, scaling)


def from_divisors(
    f: NDArray[np.float64], theta: float, dims: int, head_dim: int, context: int, attention: float
) -> Position:
    """The position that `rope_freqs` stands for."""
    n = _alive(f)
    if n == 0:
        return {"kind": "none"}
    own = theta ** (-np.arange(0, dims, 2) / dims)[:n]
    mine = theta ** (-np.arange(0, 2 * n, 2) / (2 * n))
    relative = f[:n] if 2 * n == dims else f[:n] * mine / own
    if attention == 1 and (f[n:] >= DEAD / 10).all():
        for scaling in _candidates(relative, mine, context):
            position = _plain(theta, 2 * n, head_dim, scaling)
            table = rope_table(Rope.model_validate(position), head_dim, context)
            if np.array_equal(divisors(table, theta, dims), f.astype(np.float32)):
                return position
            if scaling and scaling["kind"] == "llama3" and 2 * n == dims and _converters(f, theta, dims, scaling):
                return position
    return _plain(theta, 2 * n, head_dim, _each(relative, context, attention))


def _candidates(f: NDArray[np.float64], freq: NDArray[np.float64], context: int) -> Iterator[dict[str, Any] | None]:
    yield None
    top = float(f.max())
    for factor in dict.fromkeys((round(top, 4), decimal(float(np.float32(top))))):  # rounding moves the largest too
        if factor <= 1:
            continue
        yield {"kind": "linear", "factor": factor}
        for low, high, original in (*PUBLISHED, *_POWERS, *_fitted(f, freq, factor)):
            yield {"kind": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                   "original_context": original}  # fmt: skip


def _fitted(f: NDArray[np.float64], freq: NDArray[np.float64], factor: float) -> Iterator[tuple[float, float, int]]:
    """Bands from the pairs between them: their smoothing s is (original freq / 2 pi - low) / (high - low)."""
    between = (f > 1 + 1e-6) & (f < factor - 1e-6)
    if not between.any():
        return
    s = ((1 / f - 1 / factor) / (1 - 1 / factor))[between]
    original = round(float(np.median((3 * s + 1) * 2 * math.pi / freq[between])))
    if original >= 1:
        yield 1.0, 4.0, original
    if between.sum() < 2:
        return
    slope, shift = np.polyfit(freq[between], s, 1)
    if slope <= 0 or shift >= 0:
        return
    high = round(float(1 - 1 / shift), 3)  # with low = 1: the function depends on original / low and original / high
    original = round(float(2 * math.pi * slope * (high - 1)))
    if high > 1 and original >= 1:
        yield 1.0, high, original


def _converters(f: NDArray[np.float64], theta: float, dims: int, s: dict[str, Any]) -> bool:
    """Whether these are the divisors of llama.cpp's converter, which takes every step in float32.

    Its power function is good to one unit in the last place, so the steps are taken from the correctly rounded power
    and from both its neighbours; each divisor must lie between the results, and one unit around them for the last
    step.
    """
    one = np.float32(1)
    exponent = (np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)).astype(np.float64)
    power = (float(np.float32(theta)) ** exponent).astype(np.float32)
    low, high, old, factor = (
        np.float32(s[n]) for n in ("low_freq_factor", "high_freq_factor", "original_context", "factor")
    )
    results = []
    for p in (np.nextafter(power, np.float32(0)), power, np.nextafter(power, np.float32(np.inf))):
        wave = (one / (one / p)) * np.float32(2 * math.pi)
        smooth = ((one / wave) * old - low) / np.float32(high - low)
        middle = one / ((one - smooth) / factor + smooth)
        results.append(np.where(wave < old / high, one, np.where(wave > old / low, factor, middle)))
    lowest, highest = np.minimum.reduce(results), np.maximum.reduce(results)
    x = f.astype(np.float32)
    return bool(((x >= np.nextafter(lowest, np.float32(0))) & (x <= np.nextafter(highest, np.float32(np.inf)))).all())
