"""Line charts as inline SVG: text and lines take their colours from the page's style sheet, light and dark alike."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 600, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 10, 26
"""Room around a chart, in the units of its width and height: pixels of the page, about."""
BUCKETS = 400
"""Points of a curve, about: what is finer than that is drawn by bucket."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Points
    colour: int
    """1 to 4, of the page's style sheet."""
    kind: Literal["line", "faint", "dots"] = "line"
    """A curve (bucket means), a pale one behind it (bucket extremes), or dots with values (too many are a curve)."""


def thin(points: Points, *, extremes: bool = False) -> list[tuple[float, float]]:
    """At most about `BUCKETS` points: the mean of each bucket, or its least and greatest value."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    size = -(-len(points) // BUCKETS)
    out: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        if extremes:
            found = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
            out += sorted(found)
        else:
            out.append((sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)))
    return out


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within low..high, about `count` of them, 1, 2 or 5 times a power of ten apart."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(v: float) -> str:
    """A tick's label: 0.15, 1200, 35k, 1.2M, 3e-05."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(v) >= 10 * size or (unit != "k" and abs(v) >= size):
            return f"{v / size:.4g}{unit}"
    return f"{v:.4g}"


def chart(
    series: Iterable[Series],
    *,
    marks: Iterable[tuple[float, str]] = (),
    log: bool = False,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> str:
    """An SVG element. `marks` are steps with a reason, drawn as lines across; `log` is a logarithmic axis.

    Of a pale curve the vertical axis holds all but the outermost hundredths.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return ""
    values = [y for s in drawn for y in _counting(s) if y > 0 or not log]
    xs = [x for s in drawn for x, _ in s.points]
    if not values:
        return ""
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    room = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-12)
    positive = min(values) >= 0 and not log
    low, high = (max(0.0, low - room) if positive else low - room), high + room
    first, last = min(xs), max(max(xs), min(xs) + 1)
    right, bottom = width - RIGHT, height - BOTTOM

    def x_of(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (right - LEFT)

    def y_at(v: float) -> float:
        return bottom - (min(max(v, low), high) - low) / (high - low) * (bottom - TOP)

    def y_of(y: float) -> float:
        return y_at(scale(y) if y > 0 or not log else low)

    body: list[str] = []
    for v in ticks(low, high):
        if log and v != round(v) and high - low >= 1:
            continue
        name = number(10**v if log else v)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y_at(v):.1f}" y2="{y_at(v):.1f}"/>')
        body.append(f'<text x="{LEFT - 6}" y="{y_at(v) + 4:.1f}" text-anchor="end">{name}</text>')
    for v in ticks(first, last, 8):
        body.append(f'<text x="{x_of(v):.1f}" y="{height - 8}" text-anchor="middle">{number(v)}</text>')
    body.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for at, reason in marks:
        if first <= at <= last:
            line = f'<line class="mark" x1="{x_of(at):.1f}" x2="{x_of(at):.1f}" y1="{TOP}" y2="{bottom}"/>'
            body.append(f"<g><title>{html.escape(reason)}</title>{line}</g>")
    for s in drawn:
        if s.kind == "dots" and len(s.points) <= BUCKETS:
            where = [(x_of(x), y_of(y), x, y) for x, y in s.points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in where)
            body.append(f'<polyline class="line c{s.colour}" points="{path}"/>')
            body += [
                f'<circle class="dot c{s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>step {step:g}: {value:.4f}</title></circle>"
                for x, y, step, value in where
            ]
        else:
            faint, kind = s.kind == "faint", "faint" if s.kind == "faint" else "line"
            path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in thin(s.points, extremes=faint))
            body.append(f'<polyline class="{kind} c{s.colour}" points="{path}"/>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(body)}</svg>'


def _counting(s: Series) -> list[float]:
    values = sorted(y for _, y in s.points)
    cut = len(values) // 100 + 1 if s.kind == "faint" and len(values) > 2 else 0
    return values[cut : len(values) - cut]
