"""Everything that hears of a run: the console, the journal, trackers, the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from spec.errors import UserError
from train.watch.console import Progressing
from train.watch.journal import EVENTS, Journal, Lines
from train.watch.metrics import Metrics
from train.watch.trackers import Tracker

ENVIRONMENT = "environment.json"
"""Versions, devices and ranks of the last start, in OUT/training."""

JOURNAL = "the journal"

SHARE = 0.01
"""Of the time, at most, goes into reports while the run goes on."""


class Board:
    """Rank 0's; the other ranks have one without a folder, which says nothing.

    A tracker that fails is reported once and left out from then on. The journal is not left out: what the disk refuses
    is written when it takes it again.
    """

    def __init__(
        self,
        progress: Progressing,
        folder: Path | None = None,
        config: Mapping[str, Any] | None = None,
        trackers: Iterable[tuple[str, Tracker]] = (),
    ) -> None:
        """`folder` is OUT/training."""
        self._progress, self._folder, self._config = progress, folder, dict(config or {})
        self._trackers: dict[str, Tracker] = {} if folder is None else {JOURNAL: Journal(folder), **dict(trackers)}
        self._events = None if folder is None else Lines(folder / EVENTS)
        self._failed: set[str] = set()
        self._begun = False
        self._reported, self._cost = time.monotonic(), 0.0

    def begin(self, step: int, batches: int, environment: Mapping[str, Any]) -> None:
        """Open everything behind `step`, and drop events behind batch `batches`. Raises `UserError` where the folder
        cannot be written."""
        if self._folder is None:
            return
        assert self._events is not None
        text = json.dumps(dict(environment), indent=2, ensure_ascii=False) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / ENVIRONMENT).write_text(text, encoding="utf-8")
            self._events.begin(lambda e: e.get("batches", 0) <= batches)
            self._trackers[JOURNAL].begin(self._config, step)
        except OSError as e:
            raise UserError(f"{self._folder}: cannot be written: {e.strerror}") from None
        self._begun = True
        for name in [n for n in self._trackers if n != JOURNAL]:
            self._tell(name, lambda t: t.begin(self._config, step))

    def rewind(self, step: int) -> None:
        """The run goes on behind an earlier step."""
        for name in list(self._trackers):
            self._tell(name, lambda t: t.close())
            self._tell(name, lambda t: t.begin(self._config, step))

    def step(self, m: Metrics) -> None:
        """A step is done."""
        self._progress.step(m)
        values = m.values()
        for name in list(self._trackers):
            self._tell(name, lambda t: t.log(m.step, values))

    def text(self, step: int, name: str, text: str) -> None:
        """The model wrote something."""
        for tracker in list(self._trackers):
            self._tell(tracker, lambda t: t.text(step, name, text))

    def event(self, kind: str, step: int, batches: int, reason: str, **more: Any) -> None:
        """A step was skipped, the run was rolled back, stopped, resumed: said, and kept for the report."""
        if kind != "start":
            self.say(f"step {step}: {kind}: {reason}")
        if self._events is not None:
            entry = {"event": kind, "step": step, "batches": batches, "reason": reason, **more}
            self._try(JOURNAL, lambda: self._events.write(entry) if self._events else None)

    def say(self, text: str) -> None:
        """A line on the console."""
        self._progress.say(text)

    def saved(self) -> None:
        """A checkpoint is there: refresh the report, unless that would take more than a hundredth of the time."""
        if time.monotonic() - self._reported > self._cost / SHARE:
            self.report(picture=False)

    def report(self, *, picture: bool) -> None:
        """Write the report of what there is so far. What fails costs a line and never the run."""
        if self._folder is None or not self._begun:
            return
        from train.watch.report import write

        out, began = self._folder.parent, time.monotonic()
        self._try("the report", lambda: write(out, picture=picture))
        self._reported = time.monotonic()
        self._cost = self._reported - began

    def close(self) -> None:
        """Close everything; trackers send what they have."""
        self._progress.close()
        for name in list(self._trackers):
            self._tell(name, lambda t: t.close())
        if self._events is not None:
            self._events.close()

    def _tell(self, name: str, call: Callable[[Tracker], None]) -> None:
        tracker = self._trackers[name]
        if not self._try(name, lambda: call(tracker)) and name != JOURNAL:
            del self._trackers[name]

    def _try(self, name: str, call: Callable[[], Any]) -> bool:
        try:
            call()
        except Exception as e:  # a library's, over a network: any at all
            if name not in self._failed:
                self._failed.add(name)
                what = str(e).splitlines()[0] if str(e) else type(e).__name__
                left = "the run goes on" if name.startswith("the ") else "the run goes on without it"
                self.say(f"{name}: {what} ({left})")
            return False
        return True
