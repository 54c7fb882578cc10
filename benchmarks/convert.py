"""`python -m benchmarks convert`: one Hugging Face folder to GGUF, with llama.cpp's tools and with ours."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backends.gguf.support import levels
from benchmarks import llama_cpp
from benchmarks.measure import Cost, Summary, run
from spec.errors import UserError, nearest

OURS, OURS_VERIFIED, THEIRS = "allotrope", "allotrope, verified", "llama.cpp"

EQUIVALENT = {"q8": "q8_0", "q4": "q4_0"}
"""What stands for a portable level on llama.cpp's side. (q4 spends a little more than q4_0.)"""


@dataclass(frozen=True)
class Options:
    """What to run."""

    levels: tuple[str, ...]
    size: int
    repeats: int
    threads: int | None
    folder: Path | None


def benchmark(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """All runs of all tools, by turns. Raises `UserError` where a tool is missing or fails."""
    for level in options.levels:
        if level.lower() not in levels():
            raise UserError(f"--quant {level}: no such level ({nearest(level.lower(), levels())})")
    versions = {"llama-cpp-python": llama_cpp.version(), "python": platform.python_version()}
    threads = options.threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.folder) as temporary:
        model = Path(temporary) / "model"
        say(f"writing a random model of about {options.size} M parameters")
        made = [sys.executable, "-m", "benchmarks.model", str(model), str(options.size)]
        parameters = int(subprocess.run(made, check=True, capture_output=True, text=True).stdout)
        say("fetching llama.cpp's converter (once)")
        llama_cpp.converter()
        rows = [_level(level, model, Path(temporary), threads, options.repeats, say) for level in options.levels]
    return {
        "parameters": parameters, "threads": threads, "repeats": options.repeats, "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", "levels": rows,
    }  # fmt: skip


def _level(
    level: str, model: Path, folder: Path, threads: int, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    level = level.lower()
    costs: dict[str, list[Cost]] = {THEIRS: [], OURS: [], OURS_VERIFIED: []}
    parts: dict[str, list[Cost]] = {"convert": [], "quantize": []}
    files = {name: folder / f"{n}.{level}.gguf" for n, name in enumerate(costs)}
    for i in range(repeats):
        say(f"{level}: round {i + 1} of {repeats}")
        steps = llama_cpp.convert(model, files[THEIRS], EQUIVALENT.get(level, level), threads)
        costs[THEIRS].append(steps["convert"].then(steps["quantize"]))
        for name, cost in steps.items():
            parts[name].append(cost)
        costs[OURS].append(_ours(model, files[OURS], level, threads, verify=False))
        costs[OURS_VERIFIED].append(_ours(model, files[OURS_VERIFIED], level, threads, verify=True))
    sizes = {name: file.stat().st_size for name, file in files.items()}
    same = tensors_equal(files[THEIRS], files[OURS])
    for file in files.values():
        file.unlink()
    tools = {name: {"bytes": sizes[name], **_summary(runs)} for name, runs in costs.items()}
    tools[THEIRS]["steps"] = {name: _summary(runs) for name, runs in parts.items()}
    return {"level": level, "tools": tools, "equal_tensors": same}


def _ours(model: Path, out: Path, level: str, threads: int, *, verify: bool) -> Cost:
    command = [sys.executable, "-m", "convert", model, "--to", "gguf", "--quant", level, "--out", out, "--force"]
    command += ["--threads", str(threads), "--verify" if verify else "--no-verify"]
    return run(command)


def _summary(runs: list[Cost]) -> dict[str, Any]:
    return {
        "seconds": asdict(Summary.of([r.seconds for r in runs])),
        "peak_bytes": asdict(Summary.of([r.peak for r in runs])),
        "runs": [asdict(r) for r in runs],
    }


def tensors_equal(a: Path, b: Path) -> dict[str, int]:
    """How many tensors of two GGUF files have the same type and bytes, in a child process: it maps the files."""
    code = (
        "import sys, gguf\n"
        "a, b = ({t.name: t for t in gguf.GGUFReader(f).tensors} for f in sys.argv[1:])\n"
        "same = [n for n in a if n in b and a[n].tensor_type == b[n].tensor_type"
        " and a[n].data.tobytes() == b[n].data.tobytes()]\n"
        "print(len(same), len(a.keys() | b.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, a, b], check=True, capture_output=True, text=True)
    same, total = (int(n) for n in done.stdout.split())
    return {"same": same, "of": total}


def print_table(result: dict[str, Any]) -> None:
    """Medians with their spread."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    title = (
        f"Hugging Face f16 to GGUF: {result['parameters'] / 1e6:.0f} M parameters, {result['machine']}, "
        f"{result['threads']} threads, {result['repeats']} runs each, median (least..most)"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("level", "tool", "seconds", "peak memory, MB", "file, MB", "tensors equal to llama.cpp's"):
        table.add_column(column, justify="left" if column in ("level", "tool") else "right")
    for row in result["levels"]:
        same = row["equal_tensors"]
        for name, tool in row["tools"].items():
            seconds, peak = Summary(**tool["seconds"]), Summary(**tool["peak_bytes"])
            equal = f"{same['same']} of {same['of']}" if name == OURS else ""
            table.add_row(row["level"], name, seconds.text(), peak.text(1e6, 0), f"{tool['bytes'] / 1e6:.1f}", equal)
        table.add_section()
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
