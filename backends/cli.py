"""`python -m backends`: what is installed, and text from any artifact. Heavy imports wait until they are needed."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from backends.threads import share_cores

app = App(
    name="backends",
    suppress_keyboard_interrupt=False,
    help="The runtimes: which are installed, and text from any artifact.",
    version_flags=[],
    help_format="plaintext",
)

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for programs.")]


@app.command(name="list")
def list_backends(*, json: Json = False) -> None:
    """List the backends: whether what they need is installed, versions, devices, and what they open.

    Example: python -m backends list --json
    """
    from backends import REGISTRY, devices, missing, versions

    rows = [
        {
            "name": b.name,
            "installed": not missing(b),
            "missing": missing(b),
            "install": f"pip install 'allotrope[{b.extra}]'" if b.extra else "",
            "opens": f"*{b.suffix}" if b.suffix else f"a folder with {' + '.join(b.marks)}" if b.marks else "a folder",
            "versions": versions(b),
            "devices": devices(b),
        }
        for b in REGISTRY
    ]
    if json:
        print(jsonlib.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("backend", "installed", "devices", "opens", "to install"):
        table.add_column(column, overflow="fold")
    for row in rows:
        found = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        lacks = ", ".join(row["missing"])
        table.add_row(
            row["name"], found if row["installed"] else f"no ({lacks} missing)", ", ".join(row["devices"]) or "-",
            row["opens"], "" if row["installed"] else escape(row["install"]),
        )  # fmt: skip
    Console().print(table)


@app.command
def generate(
    artifact: Path,
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    backend: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    cache: str | None = None,
    json: Json = False,
) -> None:
    """Continue a prompt with an artifact's model, as it is written.

    Example: python -m backends generate model.gguf --prompt "def main():" --max-tokens 64 --seed 1

    Parameters
    ----------
    artifact
        A file or folder of any backend.
    prompt
        The text to continue; "-" reads it from the standard input.
    max_tokens
        Most tokens to write.
    temperature
        Divides the logits; 0 always takes the likeliest token.
    top_k
        Draw from the k likeliest tokens only; 0 is off.
    top_p
        Draw from the fewest tokens whose probabilities reach p; 1 is off.
    min_p
        Draw from tokens at least p times as likely as the likeliest; 0 is off.
    repetition_penalty
        Above 1 makes tokens that have occurred less likely.
    seed
        Makes the text repeatable.
    stop
        End before this text (may be repeated).
    backend
        Which backend opens the artifact, where it could be several.
    threads
        CPU threads.
    context
        Tokens of the longest sequence; default: the model's.
    device
        Where it runs, for backends that have a choice: cpu, cuda, mps, gpu.
    dtype
        Precision, for backends that have a choice: f32, bf16, f16.
    cache
        How keys and values are kept, for gguf and mlx: q8 takes about half of f16's memory, q4 about a quarter;
        KEYS/VALUES (q8/q4) gives each its own.
    """
    import time

    from backends import load
    from backends.generate import generate as pieces

    given = {"threads": threads, "context": context, "device": device, "dtype": dtype, "cache": cache}
    options = {name: value for name, value in given.items() if value is not None}
    text_in = sys.stdin.read() if prompt == "-" else prompt
    with load(artifact, backend, **options) as runtime:
        ids = runtime.encode(text_in)
        while len(ids) > 1 and ids[-1] in runtime.eos_ids:  # a tokenizer that ends texts must not end the prompt
            ids.pop()
        tokens: list[int] = []
        texts: list[str] = []
        start = time.perf_counter()
        stream = pieces(
            runtime, ids, max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, seed=seed, stop=stop, on_token=tokens.append,
        )  # fmt: skip
        if not json:
            print(text_in, end="", flush=True)
        for piece in stream:
            texts.append(piece)
            if not json:
                print(piece, end="", flush=True)
        seconds = time.perf_counter() - start
        if not json:
            print()
            return
        out = {
            "prompt": text_in, "text": "".join(texts), "prompt_ids": ids, "ids": tokens,
            "seconds": seconds, "info": runtime.info(),
        }  # fmt: skip
        print(jsonlib.dumps(out, indent=2))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can fix ends with one line a problem and exit status 2."""
    share_cores()
    from spec.errors import UserError

    try:
        app(argv, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as e:
        print(f"backends: {' '.join(str(e).split())} (--help lists the options)", file=sys.stderr)
        sys.exit(2)
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("backends: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` closed the pipe: that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
