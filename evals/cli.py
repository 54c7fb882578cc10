"""The command line of `python -m evals`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from backends.threads import share_cores
from evals.quant.cli import app as quant
from spec.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

app = App(
    name="evals",
    suppress_keyboard_interrupt=False,
    help="""Measure artifacts side by side: size, perplexity, divergence from the original, speed, memory, proof.

Example: python -m evals tiny.q4.gguf tiny.q8.gguf --reference runs/tiny

`python -m evals quant SOURCE` makes the levels of a checkpoint itself, ours and other tools', and measures them.

Exit status 0: measured and nothing failed; 1: an artifact crashed or failed a check; 2: something to fix in the command
or its files.""",
    version_flags=[],
)
app.command(quant)


@app.default
def run(
    artifacts: Annotated[list[Path], Parameter(negative_iterable=(), consume_multiple=True)],
    /,
    *,
    reference: Path,
    text: str = "stdlib",
    tokens: int = 2048,
    threads: int | None = None,
    repeats: int = 3,
    checks: bool = True,
    cache: str | None = None,
    json: bool = False,
) -> int:
    """Measure artifacts against the checkpoint they came from.

    Parameters
    ----------
    artifacts
        Files or folders of any backend.
    reference
        The checkpoint (or Hugging Face folder) that they were converted from.
    text
        A UTF-8 file to score, or `stdlib` for a few modules of the standard library.
    tokens
        How many tokens of it.
    threads
        Threads of the runtimes; by default their own choice.
    repeats
        Timed repetitions, of which the median is shown; 0 skips timing.
    checks
        Run the four checks and the tokenizer check too, at the runtime's stock settings.
    cache
        How keys and values are kept, for gguf and mlx; with commas between, each artifact is measured with each
        (f16,q8,q4).
    json
        Print JSON instead of a table.
    """
    from evals.compare import Options, compare

    if tokens < 2:
        raise UserError(f"--tokens {tokens}: at least 2")
    if repeats < 0:
        raise UserError(f"--repeats {repeats}: cannot be negative")
    from rich.console import Console

    kinds = tuple(c.strip() for c in cache.split(",")) if cache is not None else (None,)
    options = Options(text, tokens, threads, repeats, checks, kinds)
    with Console(stderr=True).status("reading") as status:
        result = compare(artifacts, reference, options, status.update)
    if json:
        from convert.verify.report import dumps

        print(dumps(result))
    else:
        Console().print(table(result))
    rows = result["artifacts"]
    return 1 if any("error" in r or not r.get("checks", {}).get("ok", True) for r in rows) else 0


def _pm(x: float, se: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(se))) if se > 0 else 4
    return f"{x:.{digits}f} ± {se:.{digits}f}"


ROWS: tuple[tuple[str, Any], ...] = (
    ("size", lambda r: f"{r['bytes'] / 1e6:,.2f} MB"),
    ("bits / weight", lambda r: f"{r['bits_per_weight']:.3f}"),
    ("perplexity", lambda r: _pm(r["perplexity"], r["perplexity_se"])),
    ("bits / byte", lambda r: f"{r['bits_per_byte']:.4f}"),
    ("delta NLL", lambda r: f"{r['quality']['delta_nll']:+.2g} ± {r['quality']['delta_nll_se']:.1g}"),
    ("KL mean", lambda r: f"{r['quality']['kl_mean']:.2e} ± {r['quality']['kl_se']:.0e}"),
    ("KL 99.9%", lambda r: f"{r['quality']['kl_999']:.2e}"),
    ("KL max", lambda r: f"{r['quality']['kl_max']:.2e}"),
    ("top-1 agreement", lambda r: f"{r['quality']['top1']:.2%}"),
    ("prefill", lambda r: f"{r['prefill_tokens_per_s']:,.0f} tokens/s"),
    ("decode", lambda r: f"{r['decode_tokens_per_s']:,.0f} tokens/s"),
    ("load", lambda r: f"{r['load_s']:.2f} s"),
    ("cache", lambda r: f"{r['cache_bytes_per_token']:,.0f} bytes/token"),
    ("peak memory", lambda r: f"{r['peak_bytes'] / 1e6:,.0f} MB (model {r['peak_above_base_bytes'] / 1e6:,.0f})"),
)


def table(result: dict[str, Any]) -> Table:
    """One column an artifact, one row a measurement."""
    from rich.table import Table

    title = (
        f"{result['reference']} ({result['weights'] / 1e6:.1f} M weights, {result['reference_computed_by']}), "
        f"{result['tokens']} tokens of {result['text']} in windows of {result['window']}"
    )
    out = Table(title=title, title_justify="left")
    out.add_column("")
    rows = result["artifacts"]
    for r in rows:
        out.add_column(Path(r["artifact"]).name + (f" ({r['cache']} cache)" if "cache" in r else ""), justify="right")
    for name, show in ROWS:
        cells = []
        for r in rows:
            try:
                cells.append(show(r))
            except KeyError:
                cells.append("-")
        if any(c != "-" for c in cells):
            out.add_row(name, *cells)
    if any("checks" in r for r in rows):
        out.add_section()
        for name in dict.fromkeys(c["name"] for r in rows for c in r.get("checks", {}).get("checks", [])):
            out.add_row(name, *(_verdict(r, name) for r in rows))
    for r in rows:
        if "error" in r:
            out.add_section()
            out.add_row(f"[bold red]{Path(r['artifact']).name}", f"[red]{r['error']}")
    return out


def _verdict(row: dict[str, Any], name: str) -> str:
    from convert.verify.report import check_from, number

    for c in row.get("checks", {}).get("checks", []):
        if c["name"] == name:
            check = check_from(c)
            colour = {"PASS": "yellow" if check.flags else "green", "FAIL": "bold red"}.get(check.status, "yellow")
            word = "over budget" if check.flags and name == "quality" else str(check.status)
            of = f" {number(check.measured)} / {number(check.gate)}" if check.gate else ""
            return f"[{colour}]{word}[/]{of}"
    return "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what the user can fix is one line and exit status 2."""
    share_cores()
    try:
        return int(app(argv, exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except UserError as e:
        print(e, file=sys.stderr)
    except CycloptsError as e:
        print(f"evals: {' '.join(str(e).split())} (--help lists the options)", file=sys.stderr)
    except KeyboardInterrupt:
        print("evals: interrupted", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
