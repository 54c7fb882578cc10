"""`python -m benchmarks train`: tokens a second of training one Llama, with transformers and with ours."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from benchmarks.measure import Summary
from spec.errors import UserError

THEIRS = "transformers"
OURS = ("allotrope", "allotrope, compiled")
LLAMA = {"vocab": 4096, "width": 256, "depth": 6, "heads": 4, "kv_heads": 2, "hidden": 512}
"""5.6 M parameters."""


@dataclass(frozen=True)
class Options:
    """What to run."""

    precision: str
    batch: int
    length: int
    rounds: int
    steps: int
    threads: int


class Tool:
    """A trainer in a process of its own, which rests until it is asked."""

    def __init__(self, name: str, size: dict[str, Any]) -> None:
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # one that rests must not keep the cores
        command = [sys.executable, "-m", "benchmarks.trainer", name, json.dumps(size)]
        self.name = name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (not a pipe, which nobody reads until it is full)
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=environment
        )

    def answer(self) -> dict[str, Any]:
        """Wait for the next line. Raises `UserError` with the last line that the process said before it ended."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            status = self._child.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines() or [""]
            raise UserError(f"{self.name} ended with status {status}: {said[-1]}")
        return json.loads(line)

    def train(self, steps: int) -> dict[str, Any]:
        """Train that many steps."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{steps}\n")
        self._child.stdin.flush()
        return self.answer()

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._child.kill()
        self._child.communicate()
        self._said.close()


def benchmark(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """All tools by turns, a few steps each. Raises `UserError` where one fails."""
    size = {**LLAMA, "batch": options.batch, "length": options.length, "precision": options.precision}
    size["threads"] = options.threads
    tools = [Tool(name, size) for name in (THEIRS, *OURS)]
    try:
        started = []
        for tool in tools:  # one after another: a first step is timed, too
            say(f"{tool.name}: the first step")
            started.append(tool.answer())
        runs: list[list[dict[str, Any]]] = [[] for _ in tools]
        for n in range(options.rounds):
            say(f"round {n + 1} of {options.rounds}")
            for tool, found in zip(tools, runs, strict=True):
                found.append(tool.train(options.steps))
    finally:
        for tool in tools:
            tool.__exit__(None, None, None)
    if len({s["parameters"] for s in started}) != 1:
        raise AssertionError(f"not one model: {started}")
    tokens = options.batch * options.length * options.steps
    rates = [[tokens / r["seconds"] for r in found] for found in runs]
    rows = {
        tool.name: {
            "tokens_per_second": asdict(Summary.of(rate)),
            "ratio": asdict(Summary.of([a / b for a, b in zip(rate, rates[0], strict=True)])),
            "first_step_seconds": s["first"],
            "loss": found[-1]["loss"],
        }
        for tool, rate, s, found in zip(tools, rates, started, runs, strict=True)
    }
    return {
        **asdict(options),
        "parameters": started[0]["parameters"],
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "tools": rows,
    }


def print_table(result: dict[str, Any]) -> None:
    """Medians with their spread."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = (
        f"Training a Llama of {result['parameters'] / 1e6:.1f} M parameters, {result['batch']} x {result['length']} "
        f"tokens a step, {result['precision']}: {result['machine']}, {result['threads']} threads, "
        f"{result['rounds']} rounds of {result['steps']} steps, median (least..most)"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("tool", "tokens/s", "times transformers", "first step, s"):
        table.add_column(column, justify="left" if column == "tool" else "right")
    for name, row in result["tools"].items():
        speed, ratio = Summary(**row["tokens_per_second"]), Summary(**row["ratio"])
        table.add_row(name, speed.text(digits=0), ratio.text(digits=2), f"{row['first_step_seconds']:.1f}")
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
