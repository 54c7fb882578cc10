"""`allotrope COMMAND ...`: every command under one name that no other program has."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from spec.errors import nearest

COMMANDS = {
    "convert": ("convert.cli", "a checkpoint into an artifact of a runtime, verified"),
    "train": ("train.cli", "train a spec on text"),
    "spec": ("spec.cli", "check and show specs, list presets and targets"),
    "backends": ("backends.cli", "list runtimes, generate text from any artifact"),
    "evals": ("evals.cli", "measure artifacts side by side"),
}
"""Command to the module whose `main(argv)` runs it, and what it does."""


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["Usage: allotrope COMMAND ...", "", *lines, "", "allotrope COMMAND --help says more."]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; only the chosen one is imported. Exit status 2 for an unknown one."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        sys.exit(0 if args else 2)
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        sys.stderr.write(f"allotrope: {name}: no such command ({nearest(name, COMMANDS)})\n")
        sys.exit(2)
    sys.exit(importlib.import_module(COMMANDS[name][0]).main(rest))
