"""What a run tells: a progress line, train.jsonl, the loss curve, and what to type next."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Metrics:
    """One optimizer step."""

    step: int
    loss: float
    """Nats a token."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens_per_second: float
    tokens: int
    """Valid targets since the run began."""
    skipped: int
    """Steps skipped since the run began, because something was not finite."""
    val_loss: float | None = None
    """Nats a token."""
    val_bits_per_byte: float | None = None


class Journal:
    """train.jsonl: one JSON object a step. Resuming drops what came after the checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [m for m in history(path) if m["step"] <= step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, m: Metrics) -> None:
        """Append a step. A number that is not finite becomes null, which every JSON reader takes."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(m).items()}
        self._file.write(json.dumps({k: v for k, v in plain.items() if v is not None or k == "loss"}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def history(path: Path) -> list[dict[str, Any]]:
    """The steps in a journal; a last line cut by a crash is left out."""
    out: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                out.append(json.loads(line))
            except ValueError:
                break
    return out


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Watch:
    """Progress for people: a live bar on a terminal, a plain line now and then in a log."""

    def __init__(self, console: Console, start: int, stop: int, every: int, *, silent: bool = False) -> None:
        self._console, self._start, self._stop, self._every, self._silent = console, start, stop, every, silent
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal and not silent:
            columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=stop, completed=start)
            self._bar.start()

    def step(self, m: Metrics) -> None:
        """Show a step."""
        if self._silent:
            return
        left = (time.monotonic() - self._began) / (m.step - self._start) * (self._stop - m.step)
        skipped = f"  skipped {m.skipped}" if m.skipped else ""
        text = f"loss {m.loss:.4f}  lr {m.lr:.1e}  norm {m.grad_norm:.2f}  {m.tokens_per_second:,.0f} tokens/s{skipped}"
        if self._bar is not None:
            self._bar.update(self._task, completed=m.step, description=f"{text}  ETA {clock(left)}")
        elif m.step % self._every == 0 or m.step in (self._start + 1, self._stop):
            self.say(f"step {m.step}/{self._stop}  {text}  ETA {clock(left)}")
        if m.val_loss is not None:
            bits = "" if m.val_bits_per_byte is None else f" = {m.val_bits_per_byte:.3f} bits/byte"
            self.say(f"step {m.step}/{self._stop}  validation loss {m.val_loss:.4f}{bits}")

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self._silent:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.stop()


def plot(steps: Sequence[dict[str, Any]], path: Path, title: str) -> bool:
    """The loss curve and the learning rate as a PNG. False where matplotlib is not installed or nothing was trained."""
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
    x = [m["step"] for m in steps]
    loss.plot(x, [m["loss"] for m in steps], color="tab:blue", alpha=0.3, linewidth=1)
    loss.plot(x, _smooth([m["loss"] for m in steps]), color="tab:blue", label="training, smoothed")
    scored = [m for m in steps if m.get("val_loss") is not None]
    if scored:
        loss.plot([m["step"] for m in scored], [m["val_loss"] for m in scored], "o-", color="tab:orange",
                  markersize=4, label="validation")  # fmt: skip
    loss.set(ylabel="loss (nats/token)", title=title)
    loss.legend()
    loss.grid(alpha=0.3)
    rate.plot(x, [m["lr"] for m in steps], color="tab:green")
    rate.set(xlabel="step", ylabel="learning rate")
    rate.grid(alpha=0.3)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
    return True


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average with its start corrected, as in Adam."""
    out: list[float] = []
    mean = 0.0
    for n, v in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * v
        out.append(mean / (1 - weight**n))
    return out
