"""The proof of an artifact: packing, graph, arithmetic, quality and tokenizer, each on its own.

`verify` runs them in a child process, since a runtime may abort (a GGML_ASSERT is a SIGABRT): a crash becomes a FAIL
that names the signal and the check it died in.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert.verify.report import Check, Report, Status, check_from
from spec.errors import UserError

__all__ = ["Check", "Report", "Status", "last_words", "verify"]


def verify(
    artifact: str | Path,
    backend: str,
    source_path: str | Path,
    level: str,
    text: str | Path | None = None,
    *,
    adapters: Sequence[str | Path] = (),
    rounding: str | Path | None = None,
    imatrix: str | Path | None = None,
    threads: int | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> Report:
    """Check an artifact against the source it was converted from.

    adapters: what was merged into the source's weights. rounding: the folder of what a calibration chose; without it,
    calibrated codes are held to the receipt's hashes. imatrix: llama.cpp's file of importance, likewise. text: a UTF-8
    file whose first tokens the numeric checks run on (none: a few standard library modules).
    on_check: called with each check as it ends. Raises `UserError` where artifact, source or text cannot be read; what
    is wrong with the artifact itself is a FAIL in the report.
    """
    report = Report(str(artifact), backend, level, str(source_path))
    command = ["-m", "convert.verify", str(artifact), "--backend", backend]
    command += ["--source", str(source_path), "--level", level]
    command += ["--text", str(text)] if text is not None else []
    command += ["--threads", str(threads)] if threads else []
    command += ["--rounding", str(rounding)] if rounding is not None else []
    command += ["--imatrix", str(imatrix)] if imatrix is not None else []
    command += [word for a in adapters for word in ("--adapter", str(a))]
    return watch(command, report, on_check)


def watch(command: Sequence[str], report: Report, on_check: Callable[[Check], None] | None = None) -> Report:
    """Run Python with these arguments and `--journal FILE`, and collect into the report what it writes there.

    A death in between becomes a FAIL of the check that was under way. Raises `UserError` with what the child says is
    the user's to fix.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        journal, errors = Path(folder) / "journal.jsonl", Path(folder) / "stderr"
        journal.touch()
        whole = [sys.executable, *command, "--journal", str(journal)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with errors.open("w+b") as stderr:
            child = subprocess.Popen(whole, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=env)
            try:
                state = _follow(child, journal, report, on_check)
            finally:
                child.kill()
                child.wait()
        tail = errors.read_bytes()[-8000:].decode("utf-8", "replace")
    if "error" in state:
        raise UserError(state["error"])
    if not state.get("done"):
        name = state.get("start", "verification")
        died = f"took more than {state['limit']} seconds" if state.get("late") else _death(child.returncode)
        reason = f"the runtime {died} during {name}{last_words(tail)}"
        report.checks.append(Check(name, Status.FAIL, reason=reason))
        if on_check is not None:
            on_check(report.checks[-1])
    report.seconds = round(time.monotonic() - started, 2)
    return report


def _follow(
    child: subprocess.Popen[bytes], journal: Path, report: Report, on_check: Callable[[Check], None] | None
) -> dict[str, Any]:
    """Read the journal while the child writes it, until it ends or its step takes longer than the `limit` that it
    told; returns the last state."""
    state: dict[str, Any] = {}
    since = time.monotonic()
    with journal.open(encoding="utf-8") as lines:
        partial = ""
        while True:
            ended = child.poll() is not None
            for line in iter(lines.readline, ""):
                partial += line
                if not partial.endswith("\n"):
                    continue
                event, partial = json.loads(partial), ""
                if "check" in event:
                    check = check_from(event["check"])
                    report.checks.append(check)
                    if on_check is not None:
                        on_check(check)
                elif "facts" in event:
                    for key, value in event["facts"].items():
                        setattr(report, key, value)
                else:
                    state |= event
                    since = time.monotonic()
            if ended:
                return state
            if state.get("limit") and time.monotonic() - since > state["limit"]:
                return state | {"late": True}
            time.sleep(0.02)


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with status {code}"


def last_words(stderr: str) -> str:
    """`: ` and the line of a dead process's stderr that tells most, or nothing."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    told = [line for line in lines if "ASSERT" in line or "rror" in line]
    words = (told or lines)[-1:]
    return f": {words[0][:300]}" if words else ""
