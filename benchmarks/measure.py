"""Time and peak memory of a command."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spec.errors import UserError


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    seconds: float
    """Wall clock."""
    peak: int
    """Bytes: the largest resident set of any process of the run."""

    def then(self, other: Cost) -> Cost:
        """This run, and another one after it."""
        return Cost(self.seconds + other.seconds, max(self.peak, other.peak))


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command and measure it. Raises `UserError` with its last line if it fails.

    The peak is what the kernel counts for the child and the descendants that it waited for. A child starts from the
    caller's resident set, so callers import nothing large.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(
            [str(c) for c in command], stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines() or [""]
            raise UserError(f"{Path(command[0]).name} {command[1]} ended with status {child.returncode}: {said[-1]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(seconds, usage.ru_maxrss * unit)


@dataclass(frozen=True)
class Summary:
    """Several runs of the same thing."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Median, smallest and largest."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1, digits: int = 1) -> str:
        """`2.4 (2.3..2.6)`"""
        m, low, high = (f"{v / scale:.{digits}f}" for v in (self.median, self.low, self.high))
        return f"{m} ({low}..{high})"
