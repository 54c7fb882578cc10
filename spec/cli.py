"""`python -m spec`: check, show and measure a spec without building anything. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

if TYPE_CHECKING:
    from spec.config import Spec

app = App(
    name="spec",
    help="Check, show and measure a model spec: a YAML file, a folder with a spec.yaml, or a preset.",
    version_flags=[],
    help_format="plaintext",
)

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON for programs.")]
Length = Annotated[int | None, Parameter(help="Sequence length in tokens; default: the spec's context.")]


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


def _load(source: str, length: int | None = None) -> Spec:
    from spec.errors import UserError
    from spec.load import load

    if length is not None and length < 1:
        raise UserError(f"--length: {length} must be at least 1")
    if source.endswith(".gguf"):
        return import_module("backends.gguf.read").open_any(Path(source))[0].source
    return load(source)


@app.command
def check(*sources: str, json: Json = False) -> int:
    """Say everything that is wrong with one or more specs: YAML path, value, rule, fix. Exit status 2 if anything is.

    Parameters
    ----------
    sources
        YAML files, folders with a spec.yaml, or presets.
    """
    from spec.cost import count
    from spec.errors import SpecError, UserError
    from spec.load import load

    if not sources:
        raise UserError("check: name a YAML file, a folder or a preset")
    report: list[dict[str, Any]] = []
    for source in sources:
        entry: dict[str, Any] = {"source": source, "ok": True, "problems": []}
        try:
            spec = load(source)
        except UserError as e:
            entry["ok"] = False
            if isinstance(e, SpecError):
                entry["problems"] = [
                    {"path": p.path, "value": _plain(p.value), "rule": p.rule, "fix": p.fix} for p in e.problems
                ]
            else:
                entry["problems"] = [{"path": "", "value": None, "rule": str(e), "fix": ""}]
            if not json:
                print(e, file=sys.stderr)
        else:
            entry |= {"name": spec.name, "parameters": count(spec).total, "hash": spec.hash}
            if not json:
                print(f"{source}: a valid spec of {entry['parameters']:,} parameters")
        report.append(entry)
    if json:
        _print_json(report)
    return 0 if all(entry["ok"] for entry in report) else 2


def _plain(value: object) -> Any:
    """A problem's value as JSON can hold it."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@app.command
def show(source: str, *, length: Length = None, json: Json = False) -> None:
    """Show the resolved spec: layers, parameters, FLOPs per token, KV cache, memory to train and to run.

    Parameters
    ----------
    source
        A YAML file, a folder with a spec.yaml, or a preset.
    """
    from spec.show import facts, print_facts

    spec = _load(source, length)
    if json:
        _print_json(facts(spec, length))
    else:
        print_facts(spec, length)


@app.command
def params(source: str, *, json: Json = False) -> None:
    """List every parameter: canonical name, shape, size.

    Parameters
    ----------
    source
        A YAML file, a folder with a spec.yaml, or a preset.
    """
    from spec.params import params as all_params
    from spec.show import print_params

    spec = _load(source)
    if json:
        _print_json([{"name": p.name, "shape": p.shape, "role": p.role, "size": p.size} for p in all_params(spec)])
    else:
        print_params(spec)


@app.command
def schema(*, output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None) -> None:
    """Print the JSON Schema of a spec, for editors (`# yaml-language-server: $schema=spec.schema.json`).

    Parameters
    ----------
    output
        Write to this file instead of the terminal.
    """
    from spec.errors import UserError
    from spec.schema import json_schema

    text = json.dumps(json_schema(), indent=2)
    if output is None:
        print(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{output}: {e.strerror}") from None


@app.command
def targets(
    source: str,
    *,
    to: Annotated[tuple[str, ...], Parameter(help="Only this backend (may be repeated).")] = (),
    quant: Annotated[tuple[str, ...], Parameter(help="Only this precision level (may be repeated).")] = (),
    json: Json = False,
) -> None:
    """Say which backends and precision levels carry the spec, what is folded, and what is refused and why.

    Parameters
    ----------
    source
        A YAML file, a folder with a spec.yaml, or a preset.
    """

    # The language knows no backend: this one command looks them up by name, when it is asked to.
    found = import_module("backends.targets").targets(_load(source), to, quant)
    if json:
        _print_json([t.as_dict() for t in found])
        return
    from spec.show import print_targets

    print_targets(source, found, every=bool(quant))


@app.command(name="list")
def list_presets(*, json: Json = False) -> None:
    """List the presets."""
    from spec.show import preset_rows, print_presets

    if json:
        _print_json(preset_rows())
    else:
        print_presets()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can fix ends with one line a problem and exit status 2."""
    from spec.errors import UserError

    try:
        app(argv, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except CycloptsError as e:
        print(f"spec: {' '.join(str(e).split())} (--help lists the options)", file=sys.stderr)
        sys.exit(2)
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` closed the pipe: that is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
