"""What a conversion says: progress while it runs, and what came of it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

    from convert.pipeline import Result
    from convert.verify import Check, Report

BYTES = "convert"
"""The stage that counts bytes."""
EVERY = 5.0
"""Seconds between plain progress lines."""


class Reporting:
    """Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, highlight=False, quiet=quiet, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = self._said = time.monotonic()
        self._stage, self._finished = "", False

    def __call__(self, stage: str, done: int, total: int) -> None:
        """How much of a stage is done, and all of it: bytes of the source, or layers of a calibration."""
        now = time.monotonic()
        if stage != self._stage:
            self.stop()
            self._stage, self._started, self._said = stage, now, now
        elif self._finished:
            return
        self._finished = done >= total
        if self.console.is_terminal:
            if self._bar is None:
                self._bar = self._new_bar()
                self._task = self._bar.add_task(stage, total=total)
            self._bar.update(self._task, completed=done)
        elif self._finished or now - self._said >= EVERY:
            self._said = now
            rate = done / max(now - self._started, 1e-9)
            left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
            what = f"{done} of {total} steps"
            if stage == BYTES:
                what = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB  {rate / 1e6:,.1f} MB/s"
            self.console.print(f"{stage}: {done / max(total, 1):4.0%}  {what}{left}", markup=False)
        if self._finished:
            self.stop()

    def checked(self, backend: str, check: Check) -> None:
        """A check of an artifact's verification ended."""
        from convert.verify.report import number

        measured = "" if check.measured is None else f"  {number(check.measured)}"
        limit = "budget" if check.name == "quality" else "gate"
        gate = "" if check.gate is None else f" ({limit} {number(check.gate)})"
        flags = "".join(f"; {flag}" for flag in check.flags)
        self.console.print(f"verify {backend}: {check.name} {check.status}{measured}{gate}{flags}", markup=False)

    def table(self, report: Report) -> None:
        """The whole report."""
        self.console.print(report.table())

    def stop(self) -> None:
        """Let go of the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _new_bar(self) -> Progress:
        from rich import progress

        amount = (progress.DownloadColumn(), progress.TransferSpeedColumn())
        columns = amount if self._stage == BYTES else (progress.MofNCompleteColumn(),)
        bar = progress.Progress("{task.description}", progress.BarColumn(), *columns, progress.TimeRemainingColumn(),
                                console=self.console)  # fmt: skip
        bar.start()
        return bar


@contextmanager
def progress(quiet: bool) -> Iterator[Reporting]:
    """Progress that lets go of the terminal whatever happens."""
    reporting = Reporting(quiet)
    try:
        yield reporting
    finally:
        reporting.stop()


def dumps(data: dict[str, Any]) -> str:
    """One JSON document."""
    return json.dumps(data, indent=1, sort_keys=True) + "\n"


def _facts(result: Result) -> Iterator[tuple[str, str]]:
    yield "carrier", f"{result.backend} {result.support.carrier}".strip()
    levels = ", ".join(f"{n} x {level}" for level, n in result.levels.items())
    yield "tensors", levels
    disk = "" if result.file_bits is None else f", {result.file_bits:.2f} on disk"
    yield "bits/weight", f"{result.bits:.2f} over all matrices{disk} ({result.weights:,} weights)"
    if result.calibration is not None:
        yield "calibrated", calibration(result.calibration) + _took(result)
    for fold in result.support.folds:
        yield "exact rewrite", fold
    for note in result.notes:
        yield "note", note


def calibration(record: dict[str, Any]) -> str:
    """A rounding's record in a line, or what a dry run expects."""
    told = f"effort {record['effort']}, {record['tokens']:,} tokens of {record['text']}"
    if "seconds" not in record:
        return told
    return (f"{told}, {record['rounded']} matrices: about {_duration(record['seconds'])}, "
            f"{record['memory_bytes'] / 1e6:,.0f} MB of memory, {record['disk_bytes'] / 1e6:,.0f} MB in "
            f"{record['folder']}")  # fmt: skip


def _took(result: Result) -> str:
    return f", in {_duration(result.calibrating)}" if result.calibrating else ""


def _lines(rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<13}  {value}" for name, value in rows)


def show_expected(result: Result) -> None:
    """A dry run's findings, on stdout."""
    console = Console(highlight=False, soft_wrap=True)

    def rows() -> Iterator[tuple[str, str]]:
        yield "would write", str(result.out)
        yield from _facts(result)
        yield "size", f"{result.size / 1e6:,.1f} MB"
        yield "memory", f"{result.memory / 1e6:,.0f} MB of row blocks"
        yield "time", f"about {_duration(result.seconds)} to read, round and write (from one block), then verification"

    console.print(_lines(rows()), markup=False)


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def show_result(result: Result) -> None:
    """What was made, on stdout."""
    console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
    if result.report is not None:
        console.print(result.report.table())
        for flag in result.report.flagged:
            console.print(f"flag: {flag}", markup=False)

    def rows() -> Iterator[tuple[str, str]]:
        yield (
            ("not written" if result.failed else "wrote"),
            (f"{result.out} ({result.size / 1e6:,.1f} MB in {_duration(result.seconds)})"),
        )
        yield from _facts(result)
        if result.report is None:
            yield "note", "not verified (--no-verify)"

    console.print(_lines(rows()), markup=False)


def show_summary(results: Sequence[Result]) -> None:
    """Several artifacts side by side, on stdout; the whole reports are in their receipts."""
    from rich.table import Table

    table = Table()
    for column in ("artifact", "size", "bits/weight", "parity", "verified in"):
        right = column in ("size", "bits/weight", "verified in")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for r in results:
        verdict, took = "not verified", "-"
        if r.report is not None:
            counts = Counter(str(c.status) for c in r.report.checks)
            verdict = ", ".join(f"{n} {status}" for status, n in counts.items())
            flags = sum(len(c.flags) for c in r.report.checks)
            verdict += f", {flags} flag{'s' * (flags > 1)}" if flags else ""
            took = _duration(r.report.seconds)
        where = f"{r.out} (not written)" if r.failed else str(r.out)
        style = "bold red" if r.failed else None
        table.add_row(where, f"{r.size / 1e6:,.1f} MB", f"{r.file_bits:.2f}", verdict, took, style=style)
    console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
    for r in results:
        for kind, words in _remarks(r):
            console.print(f"{r.backend}: {kind}: {words}", markup=False)
    Console(highlight=False, file=sys.stdout).print(table)
    levels = ", ".join(f"{n} x {level}" for level, n in results[0].levels.items())
    seconds = _duration(results[0].seconds)
    levels += f" ({results[0].bits:.2f} bits/weight over all matrices)"
    if results[0].calibration is not None:
        levels += f"; calibrated: {calibration(results[0].calibration)}{_took(results[0])}"
    console.print(f"{levels}; read, rounded and written in one pass of {seconds}", markup=False)


def _remarks(result: Result) -> Iterator[tuple[str, str]]:
    """What a reader must know of one artifact among several."""
    yield "carrier", result.support.carrier
    yield from (("exact rewrite", fold) for fold in result.support.folds)
    yield from (("note", note) for note in result.notes)
    yield from (("flag", flag) for flag in (result.report.flagged if result.report else ()))
