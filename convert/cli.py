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
  convert runs/tiny --to gguf,mlx,onnx,coreml,hf --quant q4 --out shipped
  convert runs/tiny --to mlx --quant q4 --effort good --override embed=q8
  convert runs/tiny --quant q4 --size 2GB --calibrate book.txt --check
  convert hf:Qwen/Qwen3-0.6B --adapter lora --to mlx
  convert model.Q8_0.gguf --to hf --quant q8

Portable levels: f32, bf16, f16, q8, q4, q4-g128; and every type of the target
by its own name (q4_k_m, q6_k, ...).

Exit status 0: written and verified; 1: a verification failed and that artifact
was kept back; 2: something that you can fix, named in one line; 130: interrupted.
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
    source: str,
    /,
    *,
    to: str = "gguf",
    quant: str | None = None,
    override: Annotated[list[str] | None, Flag] = None,
    recipe: Path | None = None,
    bits: float | None = None,
    size: str | None = None,
    effort: str | None = None,
    calibrate: str | None = None,
    work: Path | None = None,
    device: str | None = None,
    imatrix: Path | None = None,
    imatrix_out: Path | None = None,
    out: Path | None = None,
    adapter: Annotated[list[str] | None, Flag] = None,
    push: str | None = None,
    private: Annotated[bool, Flag] = False,
    verify: bool = True,
    check: Annotated[bool, Flag] = False,
    force: Annotated[bool, Flag] = False,
    threads: int | None = None,
    text: Path | None = None,
    profile: str | None = None,
    compute: str | None = None,
    activations: str | None = None,
    functions: str | None = None,
    architecture: str | None = None,
    json: Annotated[bool, Flag] = False,
) -> int:
    """Convert a checkpoint.

    Parameters
    ----------
    source
        A checkpoint folder (spec.yaml), a Hugging Face folder (config.json), a GGUF file, or hf:owner/name[@revision].
    to
        The target, or several with commas between: gguf, mlx, onnx, coreml, hf, tensorrt.
    quant
        The precision level; by default what the checkpoint was trained for, else q4.
    override
        GLOB=LEVEL for the matrices that the glob names, as in head=q8 or 'layers.*.attn.v=q8'; once for each, the last
        that matches holds.
    recipe
        A YAML file with level, overrides (a mapping), and bits or size.
    bits
        Bits per weight that q4 or q4-g128 may spend, with q8 where it pays most (4.95).
    size
        The same as bytes of the largest artifact: 2GB, 700MB, 1.5GiB.
    effort
        fast: the scales are searched. good: codes are chosen for what they cost on a text, which needs torch.
        best: the same, for longer.
    calibrate
        That text: a UTF-8 file, a folder of them, JSON lines with a text each, or stdlib. Means --effort good.
    work
        Keep what was calibrated in this folder: for the next conversion at the same levels, and for python -m
        convert.verify --rounding.
    device
        Where the calibrated model runs: cpu, cuda, mps; by default CUDA where there is some.
    imatrix
        GGUF: llama.cpp's file of importance, which its own types are rounded by, instead of --calibrate.
    imatrix_out
        Write such a file of what was calibrated.
    out
        The artifact, or for several targets the folder they go into; by default SOURCE.LEVEL.gguf, SOURCE.LEVEL-mlx
        and so on in the working directory.
    adapter
        A LoRA adapter to merge into the weights, in PEFT's format: a folder or hf:owner/name[@revision]; once for each.
    push
        Upload what was made to this repository of the Hugging Face Hub (owner/name), once everything passed.
    private
        Make that repository a private one, where it is new.
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
    profile
        ONNX: ort (ONNX Runtime's fused operators) or portable (the standard operator set only).
    compute
        MLX, ONNX, Core ML, TensorRT: the dtype that the artifact computes in, f32, f16 or bf16; by default the
        target's own for the level.
    activations
        ONNX: how products with q8 or q4 weights take their inputs: int8 (in blocks, on CPUs: faster, and the default
        with --compute f32) or float.
    functions
        Core ML: one (prompts and single tokens) or two (prefill and decode, which share the weights).
    architecture
        Hugging Face: transformers' class of models, such as llama; by default that of the source, where it has one
        that fits, else the simplest that computes the same.
    json
        Print the result as JSON.
    """
    from convert.asked import asked
    from convert.pipeline import convert_all as run
    from convert.push import Push
    from convert.show import dumps, progress, show_expected, show_result, show_summary
    from spec.errors import UserError

    given = {
        "profile": profile,
        "compute": compute,
        "activations": activations,
        "functions": functions,
        "architecture": architecture,
    }
    options = {name: value for name, value in given.items() if value is not None}
    targets = [t for t in (name.strip().lower() for name in to.split(",")) if t]

    if private and push is None:
        raise UserError("--private: says how --push makes a repository (give --push owner/name too)")
    with progress(quiet=json or check) as reporting:
        results = run(
            source, targets, asked(quant, recipe, override or (), bits, size), out, effort=effort, calibrate=calibrate,
            work=work, device=device, imatrix=imatrix, imatrix_out=imatrix_out, options=options, adapters=adapter or (),
            push=None if push is None else Push(push, private), verify=verify, force=force, check=check,
            threads=threads, text=text, progress=reporting, on_check=reporting.checked,
        )  # fmt: skip
    failed = [r for r in results if r.failed]
    if json:
        found = [r.to_dict() for r in results]
        sys.stdout.write(dumps(found[0] if len(found) == 1 else {"ok": not failed, "artifacts": found}))
    else:
        if len(results) > 1 and not check:
            show_summary(results)
        else:
            for r in results:
                (show_expected if check else show_result)(r)
        if results[0].pushed is not None:
            sys.stdout.write(f"{'would push' if check else 'pushed':<13}  {results[0].pushed}\n")
    for r in failed:
        assert r.report is not None
        _say(f"convert: {r.out}: verification failed, it was not written: {r.report.summary}")
    if failed and push is not None:
        _say(f"convert: --push {push}: nothing was uploaded")
    return 1 if failed else 0


def _say(message: str) -> None:
    sys.stderr.write(message + "\n")


def _kept(e: BaseException) -> list[str]:
    """What an exception says is kept, and how to go on."""
    return list(getattr(e, "__notes__", ()))


class Terminated(BaseException):
    """SIGTERM."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that nothing partial is left behind."""

    def stop(*_: object) -> None:
        raise Terminated

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
    except KeyboardInterrupt as e:
        _say("; ".join(["convert: interrupted; nothing was written", *_kept(e)]))
        sys.exit(130)
    except Terminated as e:
        _say("; ".join(["convert: terminated; nothing was written", *_kept(e)]))
        sys.exit(143)
    except MemoryError as e:
        _say("; ".join(["convert: not enough memory", *_kept(e)]))
    except ValueError as e:
        from spec.errors import UserError  # brings the whole schema, which --help can do without

        if not isinstance(e, UserError):
            raise
        for line in (*str(e).splitlines(), *_kept(e)):
            _say("convert: " + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line))  # names from a folder
    sys.exit(2)
