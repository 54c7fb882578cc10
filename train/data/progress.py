"""How far tokenising is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

EVERY = 10.0
"""Seconds between two lines in a log; nothing is shown of what takes less."""


@contextmanager
def shown(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that takes bytes done, of `total`."""
    if console.is_terminal:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as Speed

        columns = (TextColumn(what), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda n: bar.advance(task, n)
        return
    began = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            speed = done / 1e6 / (now - began)
            line = f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {speed:.1f} MB/s"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    yield advance
