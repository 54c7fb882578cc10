"""Finished checkpoints in other forms while training goes on: `convert` in a process of the lowest priority."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import backends
from spec.config import Spec
from spec.errors import UserError
from train.checkpoint.folder import RunFolder, number

LOG = "training/export.log"


class Exporter:
    """Converts one checkpoint at a time to every target. What fails is said, and stops nothing.

    A checkpoint that comes while another is being converted waits; a newer one takes its place.
    """

    def __init__(self, folder: RunFolder, targets: Sequence[str], say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._targets = [parts(t) for t in targets]
        self._turn = threading.Condition()
        self._waiting: Path | None = None
        self._current: Path | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._ended = self._interrupted = False
        self._thread = threading.Thread(target=self._run, name="export", daemon=True)
        self._thread.start()

    @property
    def held(self) -> set[int]:
        """Steps whose checkpoints are still needed."""
        with self._turn:
            return {number(f) for f in (self._waiting, self._current) if f is not None}

    def offer(self, checkpoint: Path) -> None:
        """Convert this one next."""
        with self._turn:
            if self._waiting is not None:
                self._say(f"export: step {number(self._waiting)} is left out, the one before it takes too long")
            self._waiting = checkpoint
            self._turn.notify()

    def close(self, wait: bool) -> None:
        """End, after what is being converted and what waits, or at once."""
        with self._turn:
            self._ended = True
            if not wait:
                self._interrupted, self._waiting = True, None
                if self._child is not None:
                    with suppress(OSError):
                        self._child.terminate()  # `convert` leaves nothing partial behind
            self._turn.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._turn:
                self._current = None
                self._turn.wait_for(lambda: self._waiting is not None or self._ended)
                if self._waiting is None:
                    return
                self._current, self._waiting = self._waiting, None
            for to, level in self._targets:
                self._convert(self._current, to, level)

    def _convert(self, checkpoint: Path, to: str, level: str) -> None:
        out = self._folder.path / "exports" / checkpoint.name / artifact(self._folder.spec.name, to, level)
        command = [sys.executable, "-m", "convert", str(checkpoint), "--to", to, "--quant", level, "--out", str(out)]
        log = self._folder.path / LOG
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as f:
                f.write(f"\n$ {' '.join(command)}\n".encode())
                f.flush()
                with self._turn:
                    if self._interrupted:
                        return
                    self._child = subprocess.Popen([*command, "--force"], stdout=f, stderr=f, env=_environment())
                _last_in_line(self._child.pid)
                code = self._child.wait()
        except OSError as e:
            self._say(f"export: step {number(checkpoint)} to {to} {level} failed: {e.strerror or e}")
            return
        finally:
            self._child = None
        if code:
            self._say(f"export: step {number(checkpoint)} to {to} {level} failed (status {code}), see {log}")
        else:
            self._say(f"export: {out}")


def parts(target: str) -> tuple[str, str]:
    """Target and level of `gguf:q4`; `hf` alone is exact."""
    to, _, level = target.partition(":")
    return to, level or "f32"


def check(spec: Spec, wanted: Sequence[str]) -> None:
    """Raises `UserError` for what `convert` would refuse, before anything is trained."""
    from backends.targets import targets

    for target in wanted:
        to, level = parts(target)
        try:
            found = targets(spec, (to,), (level,))
        except UserError as e:
            raise UserError(f"checkpoint.export: {target}: {e}") from None
        for refusal in (r for t in found for r in t.refusals):
            raise UserError(f"checkpoint.export: {target}: {refusal}")


def artifact(name: str, to: str, level: str) -> str:
    """What a target's artifact is called: name.q4.gguf, name.f32-hf."""
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    return f"{stem}.{level}{backends.get(to).suffix or f'-{to}'}"


def _environment() -> dict[str, str]:
    """The child leaves the accelerators to the training."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def _last_in_line(process: int) -> None:
    if hasattr(os, "setpriority"):
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process, 19)
