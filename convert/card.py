"""The model card beside an artifact: what it is, what was measured, how to run and check it again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import backends
from backends.base import Backend

if TYPE_CHECKING:
    from convert.pipeline import Result
    from convert.verify import Report

INSIDE = "README.md"
"""Its name inside an artifact that is a folder."""


def card(result: Result, backend: Backend, receipt: dict[str, Any], report: Report | None) -> str:
    """The card in Markdown."""
    spec, name = result.spec, result.out.name
    rows = [
        ("parameters", f"{result.weights:,}"),
        ("level", f"{result.level} ({result.bits:.2f} bits/weight over all matrices)"),
        ("stored as", ", ".join(f"{n} × {level}" for level, n in receipt["levels"].items())),
        ("size", f"{result.size / 1e6:,.1f} MB"),
        ("carrier", f"{receipt['backend']} {receipt['carrier']}".strip()),
        ("context", f"{spec.context:,} tokens"),
        ("source", f"{receipt['source']['name']}, weights sha256 {receipt['source']['hash']}"),
        ("spec sha256", receipt["spec_hash"]),
    ]
    if receipt["weights_hash"]:
        rows.append(("codes and scales sha256", receipt["weights_hash"]))
    front = ["---", f"library_name: {backend.hub}", "pipeline_tag: text-generation", "---", ""] if backend.hub else []
    lines = [*front, f"# {name}", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""]
    if receipt["folds"]:
        lines += ["Exact rewrites on the way:", "", *(f"- {f}" for f in receipt["folds"]), ""]
    if result.notes:
        lines += ["Notes:", "", *(f"- {n}" for n in result.notes), ""]
    lines += ["## Measured", ""]
    if report is None:
        lines += ["Not verified (`--no-verify`).", ""]
    else:
        lines += [report.markdown(), ""]
    lines += ["## Use", "", "```", f"python -m backends generate {name} --prompt 'Once upon a time'"]
    if backend.tool:
        flags = f" {result.support.flags}" if result.support.flags else ""
        lines.append(backend.tool.format(name=name, flags=flags))
    lines += [f"python -m convert.verify {name} --source CHECKPOINT", "```", ""]
    if backends.has(backend, "card"):
        own = backends.part(backend, "card")
        lines += [f"```{own.LANGUAGE}", own.snippet(name).rstrip(), "```", ""]
    lines += ["Made with " + ", ".join(f"{k} {v}" for k, v in receipt["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def beside(out: Path) -> Path:
    """Where the card lies."""
    return out.with_name(out.name + ".md")
