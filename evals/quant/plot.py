"""KL and perplexity against bits per weight, one kind of mark for each maker."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.quant.report import series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*Xphd<>8"


def draw(result: dict[str, Any], *paths: Path) -> None:
    """Two panels: mean KL (logarithmic, with standard errors) and perplexity, against stored bits per weight; written
    as each path's suffix says. Raises `ImportError` without matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "quant", "font.size": 9}):
        out = Figure(figsize=(11, 5), layout="constrained", dpi=120)
        kl, perplexity = out.subplots(1, 2)
        kl.set_yscale("log")
        for i, (by, found) in enumerate(series(result["rows"]).items()):
            ours = by.startswith("allotrope")
            style: dict[str, Any] = {
                "marker": MARKERS[i % len(MARKERS)], "markersize": 7 if ours else 4, "linestyle": "none",
                "elinewidth": 1, "capsize": 2, "label": by, "zorder": 3 if ours else 2,
            }  # fmt: skip
            names, bits = [r["name"] for r in found], [r["bits"] for r in found]
            divergence, values = [r["kl_mean"] for r in found], [math.exp(r["nll"]) for r in found]
            kl.errorbar(bits, divergence, [r["kl_se"] for r in found], **style)
            spread = [v * r["delta_nll_se"] for v, r in zip(values, found, strict=True)]
            perplexity.errorbar(bits, values, spread, **style)
            for axis, heights in ((kl, divergence), (perplexity, values)):
                _label(axis, names, bits, heights, ours, i)
        if result["original"]:
            perplexity.axhline(result["original"]["perplexity"], color="grey", linewidth=0.8, linestyle=":")
        kl.set_ylabel("mean KL divergence from the original (nats)")
        perplexity.set_ylabel("perplexity (bars: standard error of the difference; dotted: original)")
        for axis in (kl, perplexity):
            axis.set_xlabel("stored bits per weight, all matrices")
            axis.margins(x=0.12)
            axis.grid(alpha=0.25)
        kl.legend(fontsize=7)
        for path in paths:
            kind = path.suffix[1:]
            out.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})


def _label(axis: Axes, names: list[str], x: list[float], y: list[float], ours: bool, series: int) -> None:
    """Names beside the marks: ours on the left, others on the right, above and below in turn."""
    at = (-6, -2) if ours else (5, 2 - 6 * (series % 2))
    for name, a, b in zip(names, x, y, strict=True):
        axis.annotate(
            name, (a, b), xytext=at, textcoords="offset points", fontsize=7 if ours else 5.5, alpha=0.9,
            ha="right" if ours else "left",
        )  # fmt: skip
