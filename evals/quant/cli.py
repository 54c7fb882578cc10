"""`python -m evals quant SOURCE --levels ... --text FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from spec.errors import MissingDependency, UserError

app = App(
    name="quant",
    help="""Measure levels of one checkpoint side by side, ours and other tools' own quantizers: a table and a plot of
KL divergence and perplexity against bits per weight.

Example: python -m evals quant runs/tiny --levels q8,q4,q6_k,q4_k_m,mlx-lm-4bit-g32,ort-int4 --text held-out.txt

Levels are ours (q8, q4, q4-g128), a container's own types by name (q4_k_m, iq4_xs, mlx-q4), or another tool's
quantizer: llama.cpp-TYPE and llama.cpp-TYPE-imatrix; mlx-lm-4bit-g32, -4bit-g64, -8bit-g64, -mixed_3_6, -mixed_4_6,
-dwq-g32 and -g64, -gptq-g32 and -g64; ort-int4, -int4-g128, -int4-sym, -rtn, -k_quant, -hqq, -hqq-g64 and -gptq;
torchao-int4 and -int4-g128. `peers` stands for the usual ones of each. All are decoded from the files that they were
written to and scored by one float32 forward. What is measured already is not measured again.

Exit status 0: measured; 1: something could not be measured; 2: something to fix in the command or its files.""",
    version_flags=[],
)
WIDTH = 130
"""Of a table that goes into a file."""
PEERS = ("llama.cpp-q4_k_m", "llama.cpp-q4_k_m-imatrix", "mlx-lm-4bit-g32", "mlx-lm-4bit-g64", "mlx-lm-mixed_4_6",
         "ort-int4", "ort-hqq", "ort-gptq", "torchao-int4")  # fmt: skip


@app.default
def quant(
    source: Path,
    /,
    *,
    text: str,
    levels: str | None = None,
    effort: str | None = None,
    calibrate: str | None = None,
    tokens: int = 8192,
    baseline: str | None = None,
    out: Path | None = None,
    threads: int | None = None,
    keep: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measure levels of one checkpoint side by side.

    Parameters
    ----------
    source
        A checkpoint folder, a Hugging Face folder or a GGUF file.
    text
        A UTF-8 file of text that nothing was trained or calibrated on, or `stdlib` for a few modules of the standard
        library.
    levels
        What to measure, with commas between; by default a choice of ours and of the others.
    effort
        How our levels are rounded: fast, good or best, with commas between for several. By default fast, and good where
        --calibrate is given. With good or best, llama.cpp's types come with importance too.
    calibrate
        The text that calibrates what wants calibrating: a UTF-8 file, or `stdlib` (the default).
    tokens
        How many tokens of the text to score.
    baseline
        What the others are compared with, token by token; by default q4_k_m, with its importance matrix if measured.
    out
        The folder for quant.json, .csv, .md, .svg and .png and for what is kept of each measurement; by default
        SOURCE.quant in the working directory.
    threads
        Threads of each process; by default the libraries' own choice.
    keep
        Keep every variant's files.
    json
        Print JSON instead of the table.
    """
    from rich.console import Console

    from evals.quant import report
    from evals.quant.study import Options, run
    from evals.quant.variants import DEFAULT, parse

    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: must be at least 1")
    names = [n for part in (levels.split(",") if levels is not None else DEFAULT) if (n := part.strip())]
    names = [x for n in names for x in (PEERS if n == "peers" else (n,))]
    efforts = _split(effort) if effort is not None else ["fast", "good"] if calibrate is not None else ["fast"]
    variants = parse(names, efforts)
    options = Options(text, tokens, calibrate or "stdlib", baseline, threads, keep)
    folder = out or Path(f"{source.resolve().name}.quant")
    told = Console(stderr=True)
    with told.status("reading") as status:
        result = run(source, variants, options, folder, status.update if told.is_terminal else told.print)
    missing = report.absent(result)
    try:
        written = report.write(result, folder)
    except MissingDependency as e:
        written, missing = [], [*missing, str(e)]
    if json:
        from convert.verify.report import dumps

        print(dumps(result))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        console.print(report.table(result))
        for line in missing:
            console.print(f"not measured: {line}", highlight=False, markup=False, soft_wrap=True)
        for path in written:
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return 1 if missing else 0


def _split(text: str) -> list[str]:
    return [n for part in text.split(",") if (n := part.strip().lower())]
