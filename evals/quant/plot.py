"""KL and perplexity against bits per weight, one kind of mark for each maker."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from evals.quant.report import series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "osD^vP*Xphd<>8"


def figure(result: dict[str, Any]) -> Figure:
    """Two panels: mean KL (logarithmic, with standard errors) and perplexity, against stored bits per weight. Raises
    `ImportError` without matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = series(result["rows"])
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "quant", "font.size": 9}):
        out = Figure(figsize=(11, 5), layout="constrained", dpi=120)
        kl, perplexity = out.subplots(1, 2)
        for i, (by, found) in enumerate(rows.items()):
            ours = by.startswith("allotrope")
            style: dict[str, Any] = {
                "marker": MARKERS[i % len(MARKERS)], "markersize": 7 if ours else 4, "linestyle": "none",
                "elinewidth": 1, "capsize": 2, "label": by, "zorder": 3 if ours else 2,
            }  # fmt: skip
            bits = [r["bits"] for r in found]
            kl.errorbar(bits, [r["kl_mean"] for r in found], [r["kl_se"] for r in found], **style)
            values = [math.exp(r["nll"]) for r in found]
            spread = [math.exp(r["nll"]) * r["delta_nll_se"] for r in found]
            perplexity.errorbar(bits, values, spread, **style)
            for r, y in zip(found, values, strict=True):
                at = {"xytext": (3, 3), "textcoords": "offset points", "fontsize": 5.5, "alpha": 0.8}
                kl.annotate(r["name"], (r["bits"], r["kl_mean"]), **at)
                perplexity.annotate(r["name"], (r["bits"], y), **at)
        if result["original"]:
            perplexity.axhline(result["original"]["perplexity"], color="grey", linewidth=0.8, linestyle=":")
        kl.set_yscale("log")
        kl.set_ylabel("mean KL divergence from the original (nats)")
        perplexity.set_ylabel("perplexity (bars: standard error of the difference; dotted: original)")
        for axis in (kl, perplexity):
            axis.set_xlabel("stored bits per weight, all matrices")
            axis.grid(alpha=0.25)
        kl.legend(fontsize=7)
    return out
