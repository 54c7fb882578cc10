"""The model card of an artifact: what it is and comes from, what was measured, how to run and check it again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backends
from backends.base import Backend
from convert.levels import LEVELS
from convert.provenance import Provenance
from spec.load import dump

if TYPE_CHECKING:
    from convert.pipeline import Result
    from convert.verify import Report

INSIDE = "README.md"
"""Its name inside an artifact that is a folder."""
Rows = Sequence[tuple[str, str]]


def card(
    result: Result,
    backend: Backend,
    receipt: dict[str, Any],
    report: Report | None,
    known: Provenance,
    called: str = "",
) -> str:
    """The card in Markdown. called: what clients find the artifact under, where that is not its own name."""
    spec, name = result.spec, called or result.out.name
    source = receipt["source"]
    rows = [
        ("parameters", f"{result.weights:,}"),
        ("level", f"{result.level} ({result.bits:.2f} bits/weight over all matrices)"),
        ("stored as", ", ".join(f"{n} × {level}" for level, n in receipt["levels"].items())),
        *((("calibrated", _calibrated(receipt["rounding"])),) if "rounding" in receipt else ()),
        ("size", f"{result.size / 1e6:,.1f} MB"),
        ("carrier", f"{receipt['backend']} {receipt['carrier']}".strip()),
        ("context", f"{spec.context:,} tokens"),
        ("source", f"{source.get('repo', source['name'])}, weights sha256 {source['hash']}"),
        *((("revision", source["revision"]),) if "revision" in source else ()),
        *(("adapter", f"{a.get('repo', a['name'])}, sha256 {a['sha256']}") for a in source.get("adapters", ())),
        ("spec sha256", receipt["spec_hash"]),
    ]
    if receipt["weights_hash"]:
        rows.append(("codes and scales sha256", receipt["weights_hash"]))
    lines = [front(result, [backend], receipt, known), f"# {name}", "", *_table(rows)]
    for title, items in (("Exact rewrites on the way:", receipt["folds"]), ("Notes:", [*result.notes, *known.notes])):
        if items:
            lines += [title, "", *(f"- {item}" for item in items), ""]
    if known.training:
        lines += ["## Training", "", *_table(known.training)]
    lines += ["## Measured", ""]
    lines += ["Not verified (`--no-verify`)." if report is None else report.markdown(), ""]
    lines += ["## Use", "", "```", f"python -m backends generate {result.out.name} --prompt 'Once upon a time'"]
    if backend.tool:
        flags = f" {result.support.flags}" if result.support.flags else ""
        lines.append(backend.tool.format(name=name, flags=flags))
    lines += [f"python -m convert.verify {result.out.name} --source {_source(source)}", "```", ""]
    if backends.has(backend, "card"):
        own = backends.part(backend, "card")
        lines += [f"```{own.LANGUAGE}", own.snippet(name).rstrip(), "```", ""]
    lines += ["## Spec", "", "```yaml", dump(spec).rstrip(), "```", ""]
    lines += ["Made with " + ", ".join(f"{k} {v}" for k, v in receipt["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def front(result: Result, made: Sequence[Backend], receipt: dict[str, Any], known: Provenance) -> str:
    """The front matter that the Hub reads, in the Hub's own form."""
    from huggingface_hub import ModelCardData

    libraries = [b.hub for b in made if b.hub]
    level = LEVELS.get(result.level)
    quantized = "base_model" in known.front and (level is None or level.group is not None)
    carried: dict[str, Any] = dict(known.front)
    if quantized and not receipt["source"].get("adapters"):
        carried["base_model_relation"] = "quantized"
    data = ModelCardData(
        **carried,
        library_name=libraries[0] if len(made) == 1 and libraries else None,
        pipeline_tag="text-generation",
        tags=["allotrope", *(b.name for b in made), result.level],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def index(results: Sequence[Result], made: Sequence[Backend], repo: str, known: Provenance) -> str:
    """The card of a repository that holds several artifacts."""
    first = results[0]
    lines = [front(first, made, first.receipt, known), f"# {repo}", ""]
    lines += ["| artifact | size | bits/weight | verified | card |", "|---|---|---|---|---|"]
    for r, backend in zip(results, made, strict=True):
        assert r.report is not None, "only verified artifacts are uploaded"
        marks: dict[str, int] = {}
        for c in r.report.checks:
            marks[str(c.status)] = marks.get(str(c.status), 0) + 1
        verdict = ", ".join(f"{n} {status}" for status, n in marks.items())
        where = beside(r.out).name if backend.suffix else f"{r.out.name}/{INSIDE}"
        lines.append(f"| `{r.out.name}` | {r.size / 1e6:,.1f} MB | {r.bits:.2f} | {verdict} | [{where}]({where}) |")
    lines += (
        ["", f"Codes and scales sha256: {first.receipt['weights_hash']}", ""] if first.receipt["weights_hash"] else []
    )
    return "\n".join(lines) + "\n"


def beside(out: Path) -> Path:
    """Where the card lies."""
    return out.with_name(out.name + ".md")


def _table(rows: Rows) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows), ""]


def _calibrated(record: dict[str, Any]) -> str:
    return (f"effort {record['effort']}, {record['tokens']:,} tokens of {record['text']} "
            f"(sha256 of their ids {record['text_hash']})")  # fmt: skip


def _source(source: dict[str, Any]) -> str:
    """What a conversion was made from, as `--source` and `--adapter` take it."""
    words = [f"hf:{source['repo']}@{source['revision']}" if "repo" in source else "CHECKPOINT"]
    for a in source.get("adapters", ()):
        words.append(f"--adapter hf:{a['repo']}@{a['revision']}" if "repo" in a else f"--adapter {a['name'].upper()}")
    return " ".join(words)
