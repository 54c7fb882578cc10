"""`python -m train`: train a spec on text."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError
from pydantic import BaseModel, ValidationError

from backends.threads import share_cores
from spec.errors import SpecError, UserError, problems_from
from train.config import TrainConfig

HELP = """Train a model spec on text.

Without arguments: the `tiny` preset on the Python standard library's own source, about 3 minutes on two CPU cores."""

EXAMPLES = """Examples:

  python -m train
  python -m train --spec nano --data ~/texts --out runs/nano --steps 5000
  python -m train --config run.yaml --optimizer.lr 3e-4 --batch.sequences 64 --batch.micro 8
  python -m train --out runs/tiny --resume
  python -m train --spec my.yaml --check
  python -m train prepare --spec nano --data ~/texts
  torchrun --nproc-per-node 2 -m train --batch.sequences 16

Ctrl-C and SIGTERM save a checkpoint and exit with 130 and 143; a second one ends at once.
Exit status 2: something that you can fix, named in one line."""


def explain(error: CycloptsError) -> Any:
    """A command-line error in one line a problem, the configuration's fields by their paths."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        return "\n".join(f"--{p}" for p in problems_from(cause, {}, TrainConfig))
    if isinstance(error, UnknownOptionError) and (found := _sectioned(error.token.keyword or error.token.value)):
        return f"Unknown option: {error.token.keyword or error.token.value}. Did you mean {' or '.join(found)}?"
    return str(error)


def _sectioned(option: str) -> list[str]:
    """`--optimizer.lr` for `--lr`: the sections' fields of that name."""
    name = option.removeprefix("--").replace("-", "_")
    sections = {s: type(f.default) for s, f in TrainConfig.model_fields.items() if isinstance(f.default, BaseModel)}
    return [f"--{s}.{name.replace('_', '-')}" for s, model in sections.items() if name in model.model_fields]


app = App(
    name="train",
    suppress_keyboard_interrupt=False,
    help=HELP,
    version_flags=[],
    help_format="plaintext",
    help_epilogue=EXAMPLES,
    error_formatter=explain,
)

Flag = Parameter(negative="")


@app.default
def train(
    *,
    config: Annotated[Path | None, Parameter(name="--config")] = None,
    resume: Annotated[bool, Flag] = False,
    go_on: Annotated[bool, Parameter(name="--continue", negative="")] = False,
    force: Annotated[bool, Flag] = False,
    stop_after: int | None = None,
    check: Annotated[bool, Flag] = False,
    ranks: int | None = None,
    json: Annotated[bool, Flag] = False,
    options: Annotated[TrainConfig | None, Parameter(name="*")] = None,
) -> int:
    """Train.

    Parameters
    ----------
    config
        A YAML file with the fields below (`optimizer: {lr: 3e-4}`); the command line wins.
    resume
        Go on from the newest checkpoint in --out, with the run's own configuration.
    go_on
        The same where there is a checkpoint, and begin the run where there is none: one command for a job that the
        scheduler starts again and again. What torchrun starts again does it by itself.
    force
        Replace the run in --out.
    stop_after
        Save and stop after this step, as a preemption would; the schedule stays that of --steps.
    check
        Print the plan and which backends can carry the spec, and train nothing.
    ranks
        The plan of --check is for so many ranks; none = those that torchrun started, or that --parallel asks for.
    json
        Print the plan of --check as JSON.
    """
    from spec.config import merge
    from train.config import layered, parse, read

    chosen = merge(
        {} if config is None else read(config), {} if options is None else options.model_dump(exclude_unset=True)
    )
    settings = parse(chosen) if resume else layered(chosen)  # what is given to a run is judged together with its own
    if force and (resume or go_on):
        given = "--resume" if resume else "--continue"
        raise UserError(f"{given} and --force contradict each other (continue the run, or replace it)")
    if stop_after is not None and stop_after < 1:
        raise UserError(f"--stop-after: {stop_after} must be at least 1")
    if not check and (ranks is not None or json):
        raise UserError("--ranks and --json belong to --check (torchrun --nproc-per-node N starts N ranks)")
    if ranks is not None and ranks < 1:
        raise UserError(f"--ranks: {ranks} must be at least 1")
    _need_torch()
    from rich.console import Console

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    from train import session

    console, changed = Console(), list[str]()
    if not resume and (go_on or session.restarted(chosen)):
        resume, force = session.going_on(settings)
    if resume:
        settings, out, changed = session.resumed(chosen)
        settings = settings.model_copy(update={"out": str(out)})
    if check:
        from train.plan import show

        show(settings, console, ranks, as_json=json, resume=resume, force=force)
        return 0
    for line in changed if first_rank() else ():
        console.print(f"changed since the run began: {line}", markup=False, highlight=False)
    result = session.train(settings, resume=resume, force=force, stop_after=stop_after, console=console)
    for line in summary(result):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 128 + result.signal if result.signal else 0


@app.command
def prepare(
    *,
    config: Annotated[Path | None, Parameter(name="--config")] = None,
    json: Annotated[bool, Flag] = False,
    options: Annotated[TrainConfig | None, Parameter(name="*")] = None,
) -> int:
    """Train the tokenizer and tokenise the data ahead of a run, which finds both in the cache.

    Takes a run's configuration and flags (--data, --spec, --tokenizer ...). What was interrupted goes on.

    Parameters
    ----------
    config
        The YAML file of the run.
    json
        Print what there is as JSON, for programs.
    """
    from rich.console import Console

    from train.config import layered, read
    from train.data.prepare import ahead

    settings = layered(
        {} if config is None else read(config), {} if options is None else options.model_dump(exclude_unset=True)
    )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    console = Console(stderr=json)
    made = ahead(settings, console)
    if json:
        from json import dumps

        print(dumps(made, indent=2))
    else:
        console.print(f"cached in {made['cache']}", markup=False, highlight=False, soft_wrap=True)
    return 0


def first_rank() -> bool:
    """Whether this process speaks for all that torchrun started."""
    import os

    return os.environ.get("RANK", "0") == "0"


def _launcher() -> str:
    """What starts as many processes as there are now."""
    import os

    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return "python"
    nodes = f"--nnodes {world // local} " if world > local else ""
    return f"torchrun {nodes}--nproc-per-node {local}"


def summary(result: Any) -> list[str]:
    """How the run ended, and what to type next."""
    if not first_rank():
        return []
    m, out = result.metrics, Path(result.out)
    if result.step < result.steps and not result.ended:
        resume = f"{_launcher()} -m train --out {out} --resume"
        return ["", f"stopped and saved at step {result.step} of {result.steps}; continue with", f"  {resume}"]
    loss = "" if m is None or m.val_loss is None else f", validation loss {m.val_loss:.4f} nats/token"
    bits = "" if m is None or m.val_bits_per_byte is None else f" = {m.val_bits_per_byte:.3f} bits/byte"
    from train.watch.report import following

    return [
        "",
        f"trained {result.step} steps{loss}{bits}",
        f"checkpoint {out}, report {out / 'training' / 'report.html'}, metrics {out / 'training' / 'train.jsonl'}",
        "next:",
        *(f"  {line}" for line in following(out, result.ships_at)),
    ]


@app.command
def report(out: Path, /) -> int:
    """Write a run's report (training/report.html and loss.png) again, from its folder alone.

    Parameters
    ----------
    out
        The run's folder.
    """
    _need_torch()
    from train.watch.report import write

    print(write(out))
    return 0


def _need_torch() -> None:
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        from spec.errors import MissingDependency

        raise MissingDependency("training needs torch: pip install 'allotrope[train]'")


def _let_speak(seconds: float, *, all_alike: bool = False) -> None:
    """Under torchrun, which ends all ranks when one ends: wait for the rank that knows better what went wrong. Where
    all may say the same, that is rank 0."""
    import os
    import time

    if os.environ.get("WORLD_SIZE", "1") != "1" and not (all_alike and os.environ.get("RANK") == "0"):
        time.sleep(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what the user can fix ends with one line a problem and exit status 2."""
    share_cores()
    try:
        app(argv, exit_on_error=False, print_error=False)
    except CycloptsError as e:
        if first_rank():  # all have the same command line
            print(explain(e), file=sys.stderr)
        else:
            _let_speak(seconds=10)
        sys.exit(2)
    except (UserError, SpecError) as e:
        _let_speak(seconds=10, all_alike=True)
        print(e, file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if "Connection closed by peer" in str(e):
            _let_speak(seconds=5)
        raise
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        sys.exit(130)
