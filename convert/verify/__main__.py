"""`python -m convert.verify ARTIFACT --source CHECKPOINT`: prove an artifact again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from spec.errors import UserError

app = App(
    name="verify",
    help="""Check an artifact against the source it was converted from: packing, graph, arithmetic, quality, tokenizer.

Example: python -m convert.verify model.q4.gguf --source runs/tiny --level q4

Exit status 0: nothing failed; 1: a check failed; 2: something to fix in the command or its files.""",
    version_flags=[],
)


@app.default
def main(
    artifact: Path,
    *,
    source: str,
    adapter: list[str] | None = None,
    rounding: Path | None = None,
    imatrix: Path | None = None,
    level: str | None = None,
    backend: str | None = None,
    text: Path | None = None,
    threads: int | None = None,
    json: bool = False,
    journal: Annotated[Path | None, Parameter(show=False)] = None,
) -> int:
    """Verify an artifact.

    Parameters
    ----------
    artifact
        The file or folder to check.
    source
        The checkpoint, Hugging Face folder, GGUF file or hf:owner/name@revision that it was converted from.
    adapter
        A LoRA adapter that was merged in, a folder or hf:owner/name@revision; once for each.
    rounding
        The work folder of a calibrated conversion (convert --work): its codes are compared bit for bit; without it,
        their hashes with the receipt's.
    imatrix
        llama.cpp's file of importance that it was converted with (convert --imatrix, --imatrix-out); without it, the
        hashes of its bytes are compared with the receipt's.
    level
        The precision level it was converted at; by default its receipt says so.
    backend
        By default recognised from the artifact.
    text
        UTF-8 text to run the numeric checks on; by default standard library modules.
    threads
        Threads of the runtime.
    json
        Print the report as JSON.
    journal
        Where a parent process reads along.
    """
    if journal is not None:
        from convert.verify.run import run

        run(artifact, backend or "", source, level or "", text, threads, journal, adapter or (), rounding, imatrix)
        return 0
    from convert.verify import verify
    from convert.verify.run import describe

    found, declared = describe(artifact, backend)
    report = verify(
        artifact,
        found,
        source,
        level or declared,
        text,
        adapters=adapter or (),
        rounding=rounding,
        imatrix=imatrix,
        threads=threads,
    )
    if json:
        from convert.verify.report import dumps

        print(dumps(report.to_dict()))
    else:
        from rich.console import Console

        Console().print(report.table())
    return 0 if report.ok else 1


def run_command() -> int:
    """Run the command; what the user can fix is one line and exit status 2."""
    try:
        return int(app(exit_on_error=False, result_action="return_value") or 0)
    except UserError as e:
        print(e, file=sys.stderr)
    except CycloptsError:
        pass  # already printed
    return 2


if __name__ == "__main__":
    sys.exit(run_command())
