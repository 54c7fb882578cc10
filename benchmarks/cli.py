"""The command line of the benchmarks. This process stays small: children inherit its size in their peak memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

app = App(
    name="benchmarks",
    help="Allotrope against the tools that you would use instead.",
    version_flags=[],
    help_format="plaintext",
)


@app.command
def convert(
    *,
    quant: Annotated[tuple[str, ...], Parameter(help="Levels (may be repeated).")] = ("q8_0", "q4_k_m"),
    size: Annotated[int, Parameter(help="Millions of parameters of the random model.")] = 150,
    repeats: Annotated[int, Parameter(help="Runs of each tool, taken in turns.")] = 3,
    threads: Annotated[int | None, Parameter(help="Threads of the quantizers; default: all cores.")] = None,
    folder: Annotated[Path | None, Parameter(help="Where models go; default: a temporary folder.")] = None,
    json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for programs.")] = False,
) -> None:
    """Convert one Hugging Face folder to GGUF: llama.cpp's converter and quantizer, and ours, by turns.

    The model is a Llama with random float16 weights and a vocabulary of 8192. Medians with the smallest and largest
    value; peak memory is the largest resident set of any process of a tool. llama.cpp's converter comes from the source
    distribution of llama-cpp-python, in the version that is installed.
    """
    from benchmarks.convert import Options, benchmark, print_table
    from spec.errors import UserError

    if repeats < 1 or size < 10:
        raise UserError(f"--repeats {repeats} --size {size}: at least 1 and 10")
    result = benchmark(Options(quant, size, repeats, threads, folder), lambda line: print(line, file=sys.stderr))
    if json:
        from json import dumps

        print(dumps(result, indent=2))
    else:
        print_table(result)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can fix ends with one line and exit status 2."""
    from spec.errors import UserError

    try:
        app(argv)
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
