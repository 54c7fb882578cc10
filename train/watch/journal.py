"""A run's own record: JSON lines in OUT/training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

STEPS, SAMPLES, EVENTS = "train.jsonl", "samples.jsonl", "events.jsonl"


class Lines:
    """A file of JSON lines that grows. What the disk refuses is kept and written with the next line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._pending = b""

    def begin(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Open it, with only those of its lines that `keep` wants. Raises OSError."""
        self.close()
        if self.path.is_file():
            partial = self.path.with_name(f".{self.path.name}.partial")
            with partial.open("w", encoding="utf-8") as f:
                f.writelines(json.dumps(m) + "\n" for m in entries(self.path) if keep(m))
            partial.replace(self.path)
        # Unbuffered: after a write that failed it is known what is on the disk.
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line. A number that is not finite becomes null, which every JSON reader takes. Raises OSError."""
        line = json.dumps({k: _plain(v) for k, v in entry.items()}, allow_nan=False, ensure_ascii=False)
        self._pending += line.encode("utf-8", "replace") + b"\n"
        while self._pending:
            self._pending = self._pending[os.write(self._file, self._pending) :]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._pending = None, b""


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; it ends before a line that a crash has cut."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as f:
        for line in f:
            try:
                found = json.loads(line)
            except ValueError:
                return
            if isinstance(found, dict):
                yield found


def history(path: Path) -> list[dict[str, Any]]:
    """The steps in a journal; a last line cut by a crash is left out."""
    return list(entries(path))


class Journal:
    """train.jsonl, one object a step, and samples.jsonl, one a sample. Resuming drops what came after the step."""

    def __init__(self, folder: Path) -> None:
        self._steps, self._samples = Lines(folder / STEPS), Lines(folder / SAMPLES)

    def begin(self, config: Mapping[str, Any], step: int) -> None:
        """Go on behind `step`."""
        for lines in (self._steps, self._samples):
            lines.begin(lambda m: m.get("step", math.inf) <= step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a step."""
        self._steps.write({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        """Append a sample."""
        self._samples.write({"step": step, "prompt": name, "text": text})

    def close(self) -> None:
        """Close the files."""
        self._steps.close()
        self._samples.close()
