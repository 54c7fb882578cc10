"""The loss curve as a picture."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def smoothed(
    points: Iterable[tuple[float, float]], without: Container[float] = (), weight: float = 0.9
) -> list[tuple[float, float]]:
    """Exponential moving average over (step, value) with its start corrected, as in Adam; steps in `without` (whose
    updates were not applied) do not count."""
    out: list[tuple[float, float]] = []
    mean = 0.0
    for step, value in points:
        if step not in without:
            mean = weight * mean + (1 - weight) * value
            out.append((step, mean / (1 - weight ** (len(out) + 1))))
    return out


def plot(steps: Sequence[Mapping[str, Any]], path: Path, title: str, marks: Iterable[int] = ()) -> bool:
    """The loss curve and the learning rate as a PNG; `marks` are steps that were skipped or rolled back. False where
    matplotlib is not installed or nothing was trained."""
    steps = [m for m in steps if m.get("loss") is not None]
    if not steps:
        return False
    os.environ.setdefault("MPLBACKEND", "Agg")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no loss curve: matplotlib is not installed (pip install 'allotrope[train]')")
        return False
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    bad = sorted(set(marks))
    x = [m["step"] for m in steps]
    curve = smoothed([(m["step"], m["loss"]) for m in steps], bad) or [(x[-1], steps[-1]["loss"])]
    loss.plot(x, [m["loss"] for m in steps], color="tab:blue", alpha=0.3, linewidth=1)
    loss.plot(*zip(*curve, strict=True), color="tab:blue", label="training, smoothed")
    scored = [m for m in steps if m.get("val_loss") is not None]
    if scored:
        loss.plot([m["step"] for m in scored], [m["val_loss"] for m in scored], "o-", color="tab:orange",
                  markersize=4, label="validation")  # fmt: skip
    seen = [*(m["val_loss"] for m in scored), *(y for _, y in curve)]
    if bad:
        loss.plot(bad, [min(seen)] * len(bad), "x", color="tab:red", label="skipped or rolled back")
    low, high = min(*(m["loss"] for m in steps), *seen), max(seen)  # a spike would press the curve flat
    room = 0.05 * (high - low or 1)
    loss.set(ylabel="loss (nats/token)", title=title, ylim=(low - room, high + room))
    loss.legend()
    loss.grid(alpha=0.3)
    rate.plot(x, [m["lr"] for m in steps], color="tab:green")
    rate.set(xlabel="step", ylabel="learning rate")
    rate.grid(alpha=0.3)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
    return True
