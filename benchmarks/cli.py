"""The command line of the benchmarks. This process stays small: children inherit its size in their peak memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

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
    options = Options(quant, size, repeats, threads, folder)
    _show(benchmark(options, lambda line: print(line, file=sys.stderr)), json, print_table)


@app.command
def train(
    *,
    precision: Annotated[Literal["float32", "bfloat16"], Parameter(help="Of both (bfloat16: autocast).")] = "float32",
    batch: Annotated[int, Parameter(help="Sequences in a step.")] = 8,
    length: Annotated[int, Parameter(help="Tokens in a sequence.")] = 256,
    rounds: Annotated[int, Parameter(help="Times that each tool has its turn.")] = 7,
    steps: Annotated[int, Parameter(help="Steps in a turn.")] = 3,
    threads: Annotated[int | None, Parameter(help="Default: all cores.")] = None,
    json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for programs.")] = False,
) -> None:
    """Train one Llama of 5.6 M parameters on the CPU: transformers' eager loop, ours, and ours with compiled layers.

    The tools run by turns, each in a process of its own; a ratio is that of two turns of one round.
    """
    from benchmarks.train import Options, benchmark, print_table
    from spec.errors import UserError

    if min(batch, length, rounds, steps) < 1:
        raise UserError("--batch, --length, --rounds and --steps are at least 1")
    options = Options(precision, batch, length, rounds, steps, threads or os.cpu_count() or 1)
    _show(benchmark(options, lambda line: print(line, file=sys.stderr)), json, print_table)


@app.command
def mfu(
    *,
    spec: Annotated[str, Parameter(help="A preset or a YAML file.")] = "examples/billion",
    batch: Annotated[int, Parameter(help="Sequences in a step.")] = 8,
    length: Annotated[int, Parameter(help="Tokens in a sequence.")] = 2048,
    steps: Annotated[int, Parameter(help="Steps that are timed, after a few that are not.")] = 20,
    precision: Annotated[Literal["bfloat16", "float16", "tf32", "fp8"], Parameter(help="Arithmetic.")] = "bfloat16",
    kernel: Annotated[str, Parameter(help="Attention kernel.")] = "auto",
    checkpointing: Annotated[Literal["none", "full", "selective"], Parameter(help="Of activations.")] = "none",
    json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for programs.")] = False,
) -> None:
    """The share of a GPU's peak arithmetic that training reaches (MFU), with compiled layers, on one GPU."""
    from benchmarks.mfu import Options, benchmark, print_row
    from spec.errors import UserError

    if min(batch, length, steps) < 1:
        raise UserError("--batch, --length and --steps are at least 1")
    options = Options(spec, batch, length, steps, precision, kernel, checkpointing)
    _show(benchmark(options, lambda line: print(line, file=sys.stderr)), json, print_row)


def _show(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        from json import dumps

        print(dumps(result, indent=2))
    else:
        show(result)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can fix ends with one line and exit status 2."""
    from spec.errors import UserError

    try:
        app(argv)
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
