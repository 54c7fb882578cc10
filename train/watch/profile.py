"""`--profile`: where the time and the memory of a few steps go."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

ROWS = 15
"""Lines of the printed list."""


def span(steps: str) -> range:
    """`10..12` as steps, both ends included."""
    first, _, last = steps.partition("..")
    return range(int(first), int(last or first) + 1)


class Profile:
    """Traces the steps of a span on this process; nothing at all for an empty span."""

    def __init__(self, steps: range, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self._steps, self._folder, self._device, self._say = steps, folder, device, say
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Step `step` is about to begin."""
        if step != self._steps.start or not len(self._steps):
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        self._profiler = profile(activities=activities, profile_memory=True, record_shapes=True)
        self._profiler.__enter__()

    def after(self, step: int) -> None:
        """Step `step` is done: its tail writes the trace and prints the list."""
        if self._profiler is not None and step + 1 >= self._steps.stop:
            self.close()

    def close(self) -> None:
        """Write what was traced. A disk that refuses costs one line."""
        if self._profiler is None:
            return
        found, self._profiler = self._profiler, None
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        found.__exit__(None, None, None)
        name = f"steps-{self._steps.start}-{self._steps.stop - 1}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            if cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}-memory.pickle"))
            order = "self_device_time_total" if cuda else "self_cpu_time_total"
            averages = found.key_averages()
            table = averages.table(sort_by=order, row_limit=200, max_name_column_width=60)
            (self._folder / f"{name}.txt").write_text(table, encoding="utf-8")
        except (OSError, RuntimeError) as e:
            self._say(f"profile: cannot be written to {self._folder}: {e}")
            return
        finally:
            if cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
        self._say(f"profile of {name.replace('-', ' ', 1)}: {self._folder} (open the trace at ui.perfetto.dev)")
        for line in top(averages, cuda):
            self._say(line)


def top(averages: Any, cuda: bool) -> list[str]:
    """The operations that took longest by themselves."""

    def own(e: Any) -> float:
        return e.self_device_time_total if cuda else e.self_cpu_time_total

    total = sum(own(e) for e in averages) or 1.0
    rows = sorted(averages, key=own, reverse=True)[:ROWS]
    width = max([9, *(len(e.key[:60]) for e in rows)])
    lines = [f"{'operation':<{width}}  {'self time':>11}  {'share':>6}  {'calls':>6}"]
    for e in rows:
        lines.append(f"{e.key[:60]:<{width}}  {own(e) / 1e3:>8.1f} ms  {own(e) / total:>6.1%}  {e.count:>6}")
    return lines
