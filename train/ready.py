"""What stops a run before its first step, and what is known of it by then. The run and `--check` ask alike, before
anything is tokenised or built."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backends.targets import Target
from backends.torch.attention import chosen
from spec.config import Spec
from spec.errors import UserError
from train import checkpoint, losses, optim, parallel
from train.config import TrainConfig
from train.config.sources import CHATML
from train.data import tokenizer
from train.data.chat import template_of
from train.data.prepare import fits
from train.data.tokenizer import TextTokenizer
from train.parallel import Degrees
from train.quant.check import describe
from train.watch import portability
from train.watch.trackers import Tracker, trackers


@dataclass(frozen=True)
class Ready:
    """What nothing stands in the way of."""

    stages: list[range]
    """The layers of each stage of the pipeline."""
    precision: str
    compiled: bool
    arithmetic: str
    """The precision, whether layers are compiled, and why, for people."""
    loss: str
    """What is minimised, for people."""
    quant: str
    """What is quantized, for people; empty where nothing is."""
    targets: list[Target]
    """What will carry the model at the levels of `ship`."""
    trackers: list[tuple[str, Tracker]]


def check(
    c: TrainConfig,
    spec: Spec,
    degrees: Degrees,
    device: torch.device,
    out: Path,
    given: str | Path | None,
    *,
    resume: bool = False,
    force: bool = False,
) -> Ready:
    """What is known of a run before it begins. Raises `UserError` with a line for everything that would stop it.

    `given` is the tokenizer, none = trained on the text. With `resume` the run goes on from the newest checkpoint in
    `out`, with `force` it replaces what is there.
    """
    length = c.length(spec)
    problems: list[UserError] = []

    def ask(what: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return what(*args, **options)
        except UserError as e:
            problems.append(e)

    ask(_folder, c, out, resume, force)
    loss = ask(losses.describe, c, spec, length)
    ask(optim.check, c.optimizer)
    ask(parallel.check, spec, degrees, length)
    ask(parallel.check_batch, c.batch, degrees)
    ask(parallel.check_passes, c.parallel, c.batch.passes(degrees.data))
    stages = ask(parallel.spans, spec, degrees.pp)
    quantized = ask(describe, c, spec, degrees)
    ask(checkpoint.check_exports, spec, c.checkpoint.export)
    targets = ask(portability.carriers, spec, c.ships)
    chosen_trackers = ask(trackers, c.watch, out / "training")
    budget, moving = c.memory.checkpointing == "budget", degrees.ep > 1
    compiled = ask(parallel.choose_compile, c.compile, device, experts_move=moving, budget=budget)
    precision = ask(_arithmetic, c, spec, length, device)
    ask(_text, c, spec, given)
    if len(problems) == 1:  # as it is: a missing package is an error of its own kind
        raise problems[0]
    if problems:
        raise UserError("\n".join(map(str, problems)))
    layers = f"layers are {'' if compiled[0] else 'not '}compiled ({compiled[1]})"
    arithmetic = f"{precision[0]} ({precision[1]}); {layers}"
    return Ready(stages, precision[0], compiled[0], arithmetic, loss, quantized, targets, chosen_trackers)


def _folder(c: TrainConfig, out: Path, resume: bool, force: bool) -> None:
    found = checkpoint.newest(out) if resume else None
    if found is not None and (step := checkpoint.number(found)) > c.steps:
        raise UserError(f"steps: {c.steps}, and {out} is at step {step} already (raise it, or leave it out)")
    taken = checkpoint.occupied(out)
    if taken and not resume and not force:
        raise UserError(f"{out}: {taken} is already there (--resume continues the run, --force replaces it, or --out)")
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    try:  # what permissions say is not the whole truth: file systems may be read-only, or no place for files
        with tempfile.TemporaryDirectory(prefix=".allotrope-", dir=there):
            pass
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror} in {there} (choose another --out)") from None


def _arithmetic(c: TrainConfig, spec: Spec, length: int, device: torch.device) -> tuple[str, str]:
    """The precision, and why."""
    if c.memory.offload and device.type not in ("cuda", "xpu"):
        raise UserError(f"memory.offload: weights are in the memory of {device} already (memory.offload: false)")
    precision, why = parallel.choose_precision(c.precision, device)
    packed = c.data.packing == "documents" or c.data.document_mask
    kinds = dict.fromkeys(b.attention for b in spec.layers)
    dtype, strict = parallel.DTYPES[precision], not c.attention.allow_fallback
    try:
        chosen(kinds, c.attention.kernel, length, device=device, dtype=dtype, packed=packed, strict=strict)
    except UserError as e:
        raise UserError(f"attention.kernel: {e}") from None
    return precision, why


def _text(c: TrainConfig, spec: Spec, given: str | Path | None) -> None:
    """The tokenizer's and the templates' files; the text itself is read when it is tokenised."""
    tok = None if given is None else tokenizer.load(given)
    if tok is not None:
        fits(tok, spec)
    named = any(s.template is not None for s in c.data.sources)  # the others are written with it too
    for s in c.data.sources:
        known = tok is not None or s.template != CHATML  # a tokenizer to be trained will have ChatML's tokens
        if s.chat and known and (s.template is not None or not named):
            template_of(s, tok or TextTokenizer("", {}))
