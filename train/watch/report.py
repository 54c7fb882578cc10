"""OUT/training/report.html and loss.png, from what lies in the run's folder alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from spec import cost
from spec.config import Spec
from spec.errors import UserError
from spec.load import dump
from spec.load import load as load_spec
from spec.show import short, size
from train import config
from train.config import TrainConfig
from train.watch.board import ENVIRONMENT
from train.watch.charts import Series, chart
from train.watch.console import clock
from train.watch.journal import EVENTS, SAMPLES, STEPS, entries, history
from train.watch.metrics import TIMING, perplexity
from train.watch.png import plot, smoothed
from train.watch.portability import crippled

HTML, PNG = "report.html", "loss.png"
SHOWN = 60
"""Samples in a report, the newest."""


@dataclass(frozen=True)
class Record:
    """What a run has written about itself."""

    out: Path
    config: TrainConfig
    spec: Spec | None
    steps: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]

    @classmethod
    def read(cls, out: Path) -> Record:
        """Raises `UserError` where there is no run."""
        folder = out / "training"
        file = folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"{out}: no run (a run's folder has training/config.yaml)")
        c = config.parse(config.read(file), str(file))
        events = list(entries(folder / EVENTS))
        samples = list(entries(folder / SAMPLES))[-SHOWN:]
        return cls(out, c, _spec(out, c), history(folder / STEPS), samples, events, _environment(folder))

    @property
    def step(self) -> int:
        """The last step."""
        return self.steps[-1]["step"] if self.steps else 0

    @cached_property
    def scored(self) -> list[tuple[float, float]]:
        """(step, validation loss)."""
        start = [(0, e["val_loss"]) for e in self.events if e.get("event") == "start" and e.get("val_loss") is not None]
        return start[-1:] + self.points("val_loss")

    @property
    def skipped(self) -> set[int]:
        """Steps that are in the journal and were not applied."""
        return {e["step"] for e in self.events if e.get("event") in ("skip", "stop")}

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, figure), where there is one."""
        return [(m["step"], m[name]) for m in self.steps if m.get(name) is not None]


def _spec(out: Path, c: TrainConfig) -> Spec | None:
    """The run's own, or that which it was begun with where nothing was saved yet."""
    try:
        return load_spec(out if (out / "spec.yaml").is_file() else c.spec)
    except UserError:
        return None


def _environment(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write(out: Path, *, picture: bool = True) -> Path:
    """Write report.html, and with `picture` loss.png; each appears whole. Raises `UserError` where there is no run."""
    r = Record.read(out)
    folder = out / "training"
    name = r.spec.name if r.spec is not None else out.name
    partial = folder / f".{HTML}.partial"
    partial.write_text(page(r), encoding="utf-8")
    os.replace(partial, folder / HTML)
    if picture:
        marks = [e["step"] for e in r.events if e.get("event") in ("skip", "rollback", "stop")]
        plot(r.steps, folder / PNG, f"{name}: {r.step} steps, {r.config.data.source}", marks)
    return folder / HTML


def page(r: Record) -> str:
    """The report. Everything from the run is escaped; nothing is loaded from anywhere."""
    from importlib import resources

    from jinja2 import Environment, StrictUndefined

    text = (resources.files("train.watch") / "report.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
    name = r.spec.name if r.spec is not None else r.out.name
    files = [("config.yaml", config.dump(r.config))]
    files += [] if r.spec is None else [("spec.yaml", dump(r.spec))]
    return template.render(
        title=f"{name}: training",
        status=_status(r),
        tiles=_tiles(r),
        charts=_charts(r),
        events=[_event(e) for e in r.events if e.get("event") not in ("start", "quant")],
        samples=r.samples[::-1],
        tables=_tables(r),
        targets=_targets(r),
        crippled=[] if r.spec is None else crippled(r.spec, r.config.ships),
        following=following(r.out, r.config.quant.ships_at),
        files=files,
    )


def following(out: Path, level: str) -> list[str]:
    """What to type next."""
    return [
        f"python -m backends generate {out} --prompt 'def main('",
        f"convert {out} --to gguf --quant {level} --out {out.name}.gguf",
        f"python -m evals {out.name}.gguf --reference {out}",
    ]


def _status(r: Record) -> str:
    c = r.config
    done = f"step {r.step:,} of {c.steps:,}" if r.step < c.steps else f"all {c.steps:,} steps"
    level = f" for quant={c.quant.level}" if c.quant.on else ""
    level += f" after step {c.rounds_from}" if c.rounds_from else ""
    return f"{done}, trained on {c.data.source}{level}, in {r.out}"


def _tiles(r: Record) -> list[tuple[str, str]]:
    if not r.steps:
        return []
    last = r.steps[-1]
    spent = sum(m.get("seconds") or 0.0 for m in r.steps)
    tokens = sum((m.get("seconds") or 0.0) * (m.get("tokens_per_second") or 0.0) for m in r.steps)
    tiles: list[tuple[str, str]] = []
    if losses := smoothed(r.points("loss"), r.skipped):
        tiles.append(("training loss, smoothed (nats/token)", f"{losses[-1][1]:.4f}"))
    if r.scored:
        step, loss = r.scored[-1]
        alike = [
            p for p in r.scored if p[0] >= (r.config.rounds_from or 0)
        ] or r.scored  # in full precision is another loss
        best_step, best = min(alike, key=lambda p: p[1])
        tiles += [("validation loss", f"{loss:.4f}"), ("validation perplexity", f"{perplexity(loss):.2f}")]
        if best_step != step:
            tiles.append((f"best validation loss, step {best_step:.0f}", f"{best:.4f}"))
    if bits := r.points("val_bits_per_byte"):
        tiles.append(("validation bits/byte", f"{bits[-1][1]:.3f}"))
    tiles.append(("tokens seen", short(last["tokens"])))
    if spent:
        tiles += [("tokens/s", f"{tokens / spent:,.0f}"), ("time in steps", clock(spent))]
        waited = sum(m.get("data_wait") or 0.0 for m in r.steps)
        tiles.append(("of it waiting for data", f"{waited / spent:.1%}"))
    if mfu := r.points("mfu"):
        tiles.append(("MFU", f"{mfu[-1][1]:.1%}"))
    if memory := r.points("memory"):
        tiles.append(("memory of rank 0, peak", size(max(y for _, y in memory))))
    tiles.append(("steps skipped", str(last.get("skipped", 0))))
    if last.get("rollbacks"):
        tiles.append(("rollbacks", str(last["rollbacks"])))
    return tiles


def _charts(r: Record) -> list[dict[str, Any]]:
    from markupsafe import Markup

    bad = [(e["step"], f"step {e['step']}: {_event(e)['what']}, {e.get('reason', '')}") for e in r.events
           if e.get("event") in ("skip", "rollback", "stop")]  # fmt: skip
    loss = r.points("loss")
    curve = smoothed(loss, r.skipped)
    apart = [Series(f"validation of {name}", r.points(f"val_loss/{name}"), 4, "dots") for name in _sources(r)]
    parts = [Series("its cross-entropy, smoothed", smoothed(r.points("cross_entropy")), 3)]
    losses = [Series("", loss, 1, "faint"), Series("training, smoothed", curve, 1), *parts,
              Series("validation", r.scored, 2, "dots"), *apart]  # fmt: skip
    norms = r.points("grad_norm")
    steep = bool(norms) and max(y for _, y in norms) > 50 * max(min(y for _, y in norms), 1e-30)
    timed = [m for m in r.steps if m.get("data_wait") is not None and m.get("seconds")]
    wait = [(m["step"], 100 * m["data_wait"] / m["seconds"]) for m in timed]
    plots: list[tuple[str, list[Series], dict[str, Any]]] = [
        ("loss (nats/token)", losses, {"marks": bad, "width": 1220, "height": 320}),
        ("learning rate", [Series("", r.points("lr"), 3)], {}),
        ("gradient norm, before clipping", [Series("", norms, 4)], {"log": steep, "marks": bad}),
        ("tokens/s", [Series("", r.points("tokens_per_second"), 1, "faint"),
                      Series("smoothed", r.points("tokens_per_second_smooth"), 1)], {}),
        ("waiting for data (% of the step)", [Series("", wait, 2)], {}),
        ("memory of rank 0 (bytes)", [Series("", r.points("memory"), 3)], {}),
        ("MFU", [Series("", r.points("mfu"), 2)], {}),
    ]  # fmt: skip
    known = {"loss", "cross_entropy", "step", "lr", "grad_norm", "tokens", "skipped", "rollbacks", "perplexity"}
    names = dict.fromkeys(k for m in r.steps for k in m if not k.startswith("val_"))
    plots += [(name, [Series("", r.points(name), 1)], {}) for name in names if name not in known | TIMING]
    out: list[dict[str, Any]] = []
    for title, series, how in plots:
        if svg := chart(series, **how):
            legend: list[tuple[int | str, str]] = [(s.colour, s.name) for s in series if s.points and s.name]
            if how.get("marks"):
                legend.append(("bad", "skipped, rolled back, or stopped"))
            out.append({"title": title, "legend": legend, "svg": Markup(svg)})  # noqa: S704  (charts escape)
    return out


def _sources(r: Record) -> list[str]:
    found = dict.fromkeys(k for m in r.steps for k in m if k.startswith("val_loss/"))
    return [name.removeprefix("val_loss/") for name in found]


def _event(e: Mapping[str, Any]) -> dict[str, Any]:
    what = {"skip": "step skipped", "stop": "stopped", "end": "ended early"}.get(e["event"], e["event"])
    if e["event"] == "rollback":
        what = f"rolled back to step {e.get('to')}, on behind the batch"
    return {"step": e["step"], "what": what, "reason": e.get("reason", "")}


def _tables(r: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    out: list[tuple[str, list[tuple[str, str]]]] = []
    if r.spec is not None:
        s, length = r.spec, r.config.length(r.spec)
        n = cost.count(s)
        weights = ", ".join(f"{level} {size(cost.weight_bytes(s, level))}" for level in ("f16", "q8", "q4"))
        rows = [("parameters", f"{n.total:,}"), ("layers", f"{s.depth} of width {s.width:,}"),
                ("vocabulary", f"{s.vocab_size:,}"), ("context", f"{s.context:,} tokens, trained at {length:,}"),
                ("arithmetic", f"{short(cost.training_flops(s, length))}FLOP a token of training"),
                ("weights", f"{weights} at most"), ("hash", s.hash[:16])]  # fmt: skip
        if (active := cost.active(s)) != n.total:
            rows.insert(1, ("used by a token", f"{active:,}"))
        out.append(("Model", rows))
    if r.environment:
        rows = []
        for key, value in r.environment.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            if value not in (None, "", {}):
                rows.append((key, text))
        out.append(("Where it ran", rows))
    return out


def _targets(r: Record) -> list[Any]:
    from backends.targets import targets

    if r.spec is None or not r.config.ships:
        return []
    try:
        return targets(r.spec, levels=r.config.ships)
    except UserError:
        return []
