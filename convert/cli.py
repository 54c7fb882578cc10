"""The command line: `convert SOURCE --to gguf --quant q4`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

HELP = """\
Convert a checkpoint and prove that the result computes the same function.

For example:

  convert runs/tiny --to gguf --quant q4
  convert ~/models/Llama-3.2-1B --quant q4_k_m --check
  convert runs/tiny --to gguf --quant q8 --out tiny.gguf --force

Portable levels: f32, bf16, f16, q8, q4; and every type of the target by its
own name (q4_k_m, q6_k, ...).

Exit status 0: written and verified; 1: verification failed and nothing was
replaced; 2: something that you can fix, named in one line; 130: interrupted.
"""

app = App(
    name="convert",
    help=HELP,
    version_flags=[],
    help_format="plaintext",
    error_formatter=str,
    suppress_keyboard_interrupt=False,  # `main` says that nothing was written
)

Flag = Parameter(negative="")


@app.default
def convert(
    source: Path,
    /,
    *,
    to: str = "gguf",
    quant: str = "q4",
    out: Path | None = None,
    verify: bool = True,
    check: Annotated[bool, Flag] = False,
    force: Annotated[bool, Flag] = False,
    threads: int | None = None,
    text: Path | None = None,
    json: Annotated[bool, Flag] = False,
) -> int:
    """Convert a checkpoint.

    Parameters
    ----------
    source
        A checkpoint folder (spec.yaml), or a Hugging Face folder (config.json).
    to
        The target.
    quant
        The precision level.
    out
        The file to write; by default SOURCE.LEVEL.gguf in the working directory.
    verify
        Run the result against the source before it gets its name.
    check
        Dry run: what carries it, what is rewritten, levels, size, memory, time, and every refusal.
    force
        Replace an existing file, once the new one is whole and verified.
    threads
        Threads that round and verify; by default one for each core.
    text
        UTF-8 text for the quality check; by default some of the standard library.
    json
        Print the result as JSON.
    """
    from convert.pipeline import VerificationFailed
    from convert.pipeline import convert as run
    from convert.show import dumps, progress, show_expected, show_result

    with progress(quiet=json or check) as reporting:
        try:
            result = run(
                source, to, quant, out, verify=verify, force=force, check=check, threads=threads, text=text,
                progress=reporting, on_check=reporting.checked,
            )  # fmt: skip
        except VerificationFailed as e:
            reporting.stop()
            if json:
                sys.stdout.write(dumps({"ok": False, "report": e.report.to_dict()}))
            else:
                reporting.table(e.report)
            _say(f"convert: verification failed, nothing was written: {e}")
            return 1
    if json:
        sys.stdout.write(dumps(result.to_dict()))
    elif check:
        show_expected(result)
    else:
        show_result(result)
    return 0


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that nothing partial is left behind."""

    def stop(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit: what the user can fix is one line (or one a problem) and status 2."""
    try:
        with _terminable():
            sys.exit(app(argv, exit_on_error=False, print_error=False, result_action="return_value") or 0)
    except CycloptsError as e:
        _say(f"convert: {' '.join(str(e).split())} (convert --help lists the options)")
    except KeyboardInterrupt:
        _say("convert: interrupted; nothing was written")
        sys.exit(130)
    except ValueError as e:
        from spec.errors import UserError  # brings the whole schema, which --help can do without

        if not isinstance(e, UserError):
            raise
        for line in str(e).splitlines():
            _say(f"convert: {line}")
    sys.exit(2)
