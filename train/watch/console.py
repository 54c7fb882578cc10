"""Progress for people: a live bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from train.watch.metrics import Metrics


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def line(m: Metrics) -> str:
    """A step in a line; what is as usual (no wait, nothing skipped, unknown hardware) is left out."""
    speed = m.tokens_per_second if m.tokens_per_second_smooth is None else m.tokens_per_second_smooth
    parts = [f"loss {m.loss:.4f}", f"lr {m.lr:.1e}", f"norm {m.grad_norm:.2f}", f"{speed:,.0f} tokens/s"]
    if m.mfu is not None:
        parts.append(f"MFU {m.mfu:.1%}")
    if m.data_wait and m.seconds and m.data_wait > 0.1 * m.seconds:
        parts.append(f"waits for data {m.data_wait / m.seconds:.0%}")
    if m.skipped:
        parts.append(f"skipped {m.skipped}")
    if m.rollbacks:
        parts.append(f"rolled back {m.rollbacks}")
    return "  ".join(parts)


class Progressing:
    """The steps of one process on the console."""

    def __init__(self, console: Console, start: int, stop: int, every: int, *, silent: bool = False) -> None:
        self._console, self._start, self._stop, self._every, self._silent = console, start, stop, every, silent
        self._began = time.monotonic()
        self._done = 0
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
        self._done += 1  # not m.step - start: steps that were rolled back took their time too
        left = (time.monotonic() - self._began) / self._done * (self._stop - m.step)
        if self._bar is not None:
            self._bar.update(self._task, completed=m.step, description=f"{line(m)}  ETA {clock(left)}")
        elif m.step % self._every == 0 or m.step in (self._start + 1, self._stop):
            self.say(f"step {m.step}/{self._stop}  {line(m)}  ETA {clock(left)}")
        if m.val_loss is not None:
            bits = "" if m.val_bits_per_byte is None else f" = {m.val_bits_per_byte:.3f} bits/byte"
            each = "".join(f"  {name} {loss:.4f}" for name, loss in m.val_parts.items())
            self.say(f"step {m.step}/{self._stop}  validation loss {m.val_loss:.4f}{bits}{each}")

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self._silent:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.stop()
