"""A study as a table, as files (JSON, CSV, Markdown), and as a plot."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec.errors import MissingDependency

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]


def _digits(x: float, se: float, form: str = "") -> str:
    """A value and its standard error, to two digits of the error."""
    if not math.isfinite(x):
        return "-"
    if se <= 0:
        return f"{x:{form}.3g}"
    digits = max(0, 1 - math.floor(math.log10(se)))
    return f"{x:{form}.{digits}f} ± {se:.{digits}f}"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("bits/weight", lambda r: f"{r['bits']:.3f}"),
    ("in the file", lambda r: f"{r['file_bits']:.3f}"),
    ("KL x 1000", lambda r: _digits(1000 * r["kl_mean"], 1000 * r["kl_se"])),
    ("KL / baseline", lambda r: _digits(r["against"]["kl_ratio"], r["against"]["kl_ratio_se"])),
    ("NLL x 1000", lambda r: _digits(1000 * r["delta_nll"], 1000 * r["delta_nll_se"], "+")),
    ("perplexity", lambda r: f"{math.exp(r['nll']):.3f}"),
    ("top-1", lambda r: f"{r['top1']:.2%}"),
    ("seconds", lambda r: f"{r['seconds']:.0f}"),
)


def cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of text; a row that could not be measured has its reason in the third column. Divergences and
    losses are thousandths of a nat; a loss is the difference from the original's."""
    heads = ["", "made by", *(name for name, _ in COLUMNS)]
    rows = []
    for r in result["rows"]:
        if "kl_mean" not in r:
            rows.append([r["name"], r["by"], r["reason"]])
            continue
        values = []
        for _, show in COLUMNS:
            try:
                values.append(show(r))
            except KeyError:
                values.append("-")
        rows.append([r["name"], r["by"], *values])
    return heads, rows


def caption(result: dict[str, Any]) -> str:
    """What was measured, in one sentence."""
    told = f"{Path(result['source']).name} ({result['weights'] / 1e6:.1f} M weights), {result['tokens']} tokens of "
    told += f"{Path(result['text']).name} in windows of {result['window']}"
    if result["original"]:
        told += f"; the original's perplexity is {result['original']['perplexity']:.3f}"
    if result["baseline"]:
        told += f"; baseline: {result['baseline']}"
    return told


def table(result: dict[str, Any]) -> Table:
    """For a terminal."""
    from rich.table import Table

    heads, rows = cells(result)
    shown = [i for i, head in enumerate(heads) if head not in ("made by", "in the file", "seconds")]
    out = Table(title=caption(result), title_justify="left")
    for i in shown:
        out.add_column(heads[i], justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        if len(row) == len(heads):
            out.add_row(*(row[i] for i in shown))
    return out


def absent(result: dict[str, Any]) -> list[str]:
    """A line for each variant that could not be measured."""
    return [f"{r['name']}: {r['reason']}" for r in result["rows"] if "kl_mean" not in r]


def markdown(result: dict[str, Any]) -> str:
    """A table, its caption above, what is missing below."""
    heads, rows = cells(result)
    whole = [row for row in rows if len(row) == len(heads)]
    lines = [caption(result) + ".", ""]
    lines += ["| " + " | ".join(heads) + " |", "|" + "|".join(["---"] * 2 + ["---:"] * (len(heads) - 2)) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in whole]
    missing = absent(result)
    if missing:
        lines += ["", "Not measured:", "", *(f"- {line}" for line in missing)]
    return "\n".join(lines) + "\n"


FIELDS = ("name", "by", "bits", "file_bits", "kl_mean", "kl_se", "kl_999", "kl_max", "nll", "nll_se", "delta_nll",
          "delta_nll_se", "top1", "top1_clear", "seconds", "reason")  # fmt: skip


def comma_separated(result: dict[str, Any]) -> str:
    """Every number, a line for each variant."""
    out = io.StringIO()
    compared = ("kl_ratio", "kl_ratio_se", "nll_difference", "nll_difference_se")
    writer = csv.DictWriter(out, [*FIELDS, *compared], restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for r in result["rows"]:
        writer.writerow({**r, **r.get("against", {})})
    return out.getvalue()


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """quant.json, .csv, .md, .svg and .png in a folder; without matplotlib no pictures, and `MissingDependency` once
    the others are written."""
    from convert.verify.report import dumps
    from evals.quant.plot import draw

    texts = {"json": dumps(result), "csv": comma_separated(result), "md": markdown(result)}
    written = []
    for kind, text in texts.items():
        path = folder / f"quant.{kind}"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    if not any("kl_mean" in r for r in result["rows"]):
        return written
    pictures = [folder / "quant.svg", folder / "quant.png"]
    try:
        draw(result, *pictures)
    except ImportError:
        why = "no plot: matplotlib is not installed (pip install 'allotrope[train]')"
        raise MissingDependency(f"{folder}: {why}") from None
    return [*written, *pictures]


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Measured rows by who made them, each in the order of its bits."""
    out: dict[str, list[Row]] = {}
    for r in rows:
        if "kl_mean" in r:
            out.setdefault(r["by"], []).append(r)
    return {by: sorted(found, key=lambda r: r["bits"]) for by, found in out.items()}
