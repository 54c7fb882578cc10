"""From a configuration to a run that can begin: data, tokenizer, decoder, optimizer, the checkpoint to go on from."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from backends.text import Text
from backends.torch.model import Decoder
from spec import cost
from spec.config import Spec
from spec.errors import UserError
from spec.load import load as load_spec
from spec.show import short
from train import checkpoint, config, loop, losses, optim, parallel, quant, ready, watch
from train.checkpoint import init
from train.config import TrainConfig
from train.data import tokenizer
from train.data.feed import feed, outlook
from train.data.prepare import text
from train.data.store import TokenData
from train.engine import Engine, Pipelined, Whole
from train.parallel import Ranks
from train.watch import portability, profile
from train.watch.console import Progressing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    out: Path
    step: int
    steps: int
    signal: int
    """0, or the signal that ended it."""
    metrics: watch.Metrics | None
    """Of the last step, if any was made."""
    ended: bool = False
    """Whether it ended early, since the validation no longer improved."""
    ships_at: str = "q4"
    """The level to convert to."""


def out_folder(c: TrainConfig, spec: Spec | None = None) -> Path:
    """Where the run lives."""
    return Path(c.out) if c.out is not None else Path("runs") / (spec or init.spec_of(c)).name


def resumed(chosen: Mapping[str, Any]) -> tuple[TrainConfig, Path, list[str]]:
    """The configuration to go on with, its folder, and what differs from the run's own.

    The run's own configuration counts, and what the user chose now is laid over it. Raises `UserError` where there is
    no run, or where the spec would be another.
    """
    out = out_folder(config.parse(chosen))
    found = checkpoint.newest(out)
    own = (found or out) / checkpoint.CONFIG
    if not own.is_file():
        raise UserError(f"{out}: no run to resume (leave --resume out to begin one, or name its folder with --out)")
    saved = config.parse(config.read(own), str(own))
    changed = config.resumed(saved, chosen)
    if found is not None and "spec" in chosen and load_spec(changed.spec).hash != load_spec(found).hash:
        raise UserError(f"spec: {changed.spec} is not the spec that {out} was begun with (choose another --out)")
    if found is not None and changed.init != saved.init:
        raise UserError(f"init: {out} goes on from its own weights (leave --init out, or choose another --out)")
    if found is not None and changed.tokenizer != saved.tokenizer:
        raise UserError(f"tokenizer: {out} was begun with another, and has its own (leave --tokenizer out)")
    shown = changed.model_copy(update={"out": saved.out})  # the folder may have moved; that changes nothing
    return changed, out, config.differences(saved, shown)


def restarted(chosen: Mapping[str, Any]) -> bool:
    """Whether torchrun started this process again since a rank was lost, and the run in the folder is the one that it
    began: not another one, which made it end."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return False
    try:
        return not resumed(chosen)[2]
    except UserError:
        return False


def going_on(c: TrainConfig) -> tuple[bool, bool]:
    """Whether to resume, and whether to replace what lies in the run's folder: what was begun and saved nothing."""
    out = out_folder(c)
    return checkpoint.newest(out) is not None, checkpoint.unsaved(out)


@contextmanager
def _first_rank_first(ranks: Ranks) -> Iterator[None]:
    """Rank 0 runs the block (and fills the caches) before the others do, however long it takes."""
    if ranks.world == 1:
        yield
        return
    if not ranks.first:
        dist.barrier(ranks.control)
    yield
    if ranks.first:
        dist.barrier(ranks.control)


def train(
    c: TrainConfig,
    *,
    resume: bool = False,
    force: bool = False,
    stop_after: int | None = None,
    console: Console | None = None,
) -> Result:
    """Run it. With `resume`, `c` is what `resumed` returned. Raises `UserError` for all that the user can fix."""
    console = console or Console()
    with parallel.ranks(c.device, c.parallel, grouped=c.memory.offload) as ranks, ExitStack() as held:
        c, resume, force = ranks.agree((c, resume, force))  # what each saw of a shared disk may differ
        return _train(c, ranks, held, resume, force, stop_after, console)


def _train(
    c: TrainConfig,
    ranks: Ranks,
    held: ExitStack,
    resume: bool,
    force: bool,
    stop_after: int | None,
    console: Console,
) -> Result:
    def say(line: str) -> None:
        if ranks.first:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    found = ranks.agree(checkpoint.newest(out_folder(c))) if resume else None
    with _first_rank_first(ranks):  # it may be fetched
        spec = load_spec(found) if found is not None else init.spec_of(c)
        given = found or init.tokenizer_of(c) or c.tokenizer
    out = out_folder(c, spec)
    known = ready.check(c, spec, ranks.degrees, ranks.device, out, given, resume=resume, force=force)
    say(f"device: {parallel.describe(ranks.device, c.device)}, {ranks.world} rank(s)")
    say(f"precision: {known.arithmetic}")
    held.enter_context(checkpoint.alone(out, ranks))
    there = ranks.agree(checkpoint.newest(out) if resume else checkpoint.occupied(out))
    if there != found if resume else there and not force:
        raise UserError(f"{out}: another run was just there (start again)")
    if found is None and c.ships and ranks.first:
        portability.tell(spec, c.init or c.spec, c.ships, known.targets, console)
    with _first_rank_first(ranks):
        tok, data = text(c, spec, console if ranks.first else Console(quiet=True), given)
    run, kernels = _begun(c, spec, ranks, known, tok, data, found, say)
    best = None
    if found is not None:
        best = checkpoint.best_of(checkpoint.restore(run, found), found)
        say(f"resumed: step {run.step} of {c.steps}, {out}")
    run.sampler = _sampler(run, tok, data, known.precision, say)
    files, folder = checkpoint.RunFolder(out, spec, tok.files()), out / "training"
    last = min(c.steps, stop_after or c.steps)
    stop = loop.Stop()
    shown = Progressing(console, run.step, last, c.log_every, silent=not ranks.first)
    board = watch.Board(shown, folder if ranks.first else None, c.model_dump(mode="json"), known.trackers)
    traced = profile.span(c.profile) if c.profile is not None and ranks.first else range(0)
    tracer = watch.Profile(traced, folder / "profile", ranks.device, board.say)
    try:
        say(_intent(spec, c, run))
        ranks.agree(None)  # all have read what they need of the folder, which may hold their `init`
        if ranks.first:
            if force and not resume:
                checkpoint.clear(out)
            _begin(files, c, found)
            environment = watch.environment(c, ranks, known.precision, kernels)
            board.begin(run.step, run.batches.state.batches, environment)
        with stop.listening(), checkpoint.Saver(files, ranks, c, say, best) as saver:
            metrics = loop.fit(run, saver, board, last, stop, tracer)
    finally:
        run.batches.close()
        tracer.close()
        board.close()
        board.report(picture=True)
    return Result(out, run.step, c.steps, stop.signal, metrics, run.ended, c.quant.ships_at)


def _begun(
    c: TrainConfig,
    spec: Spec,
    ranks: Ranks,
    known: ready.Ready,
    tok: tokenizer.TextTokenizer,
    data: TokenData,
    found: Path | None,
    say: Callable[[str], None],
) -> tuple[loop.Run, dict[str, str]]:
    """A run at step 0, with its first weights unless it was `found`; and its attention kernels by reason."""
    length, dtype, m = c.length(spec), parallel.DTYPES[known.precision], c.memory
    batches, held_out = feed(c, data, length, ranks)
    if not held_out and (c.data.validation or c.data.validation_source):
        say("validation: none, since the data is too small to hold a part out (name other: data.validation_source)")
    for line in outlook(batches, c.steps, c.batch.sequences):
        say(f"order: {line}")
    parallel.prepare(known.precision)
    if ranks.device.type == "cpu":
        parallel.keep_memory()
    wraps = [parallel.recomputing(m), *([parallel.compile_layer] if known.compiled else [])]
    decoder, kept = parallel.build(
        spec,
        ranks,
        known.precision,
        wraps,
        length=length,
        kernel=c.attention.kernel,
        strict=not c.attention.allow_fallback,
        stages=known.stages,
        offload=m.offload,
    )
    if kept:
        say(f"fp8: {len(kept)} linears stay in bfloat16, since a width is no multiple of 16: {', '.join(kept[:3])} ...")
    if found is None and c.init is not None:
        init.fill(decoder, c.init)
    elif found is None:
        decoder.init_weights(c.seed)
    kernels = decoder.kernels(length, packed=batches.masked, dtype=dtype)
    for reason, kernel in kernels.items():
        say(f"attention: {kernel} ({reason})")
    say(f"loss: {known.loss}")
    if known.quant:
        say(f"quant: {known.quant}")
    objective = losses.build(losses.Setting(c, spec, tok, length, dtype, ranks))
    torch.manual_seed(c.seed + ranks.rank)  # dropout
    run = loop.Run(
        c,
        ranks,
        decoder,
        _engine(c, decoder, ranks, known.precision, objective),
        optim.build(decoder, spec, c.optimizer),
        batches,
        held_out,
        losses.Losses(objective, losses.routers_of(decoder, c.experts, ranks)),
        meter=watch.Meter(
            ranks.device,
            cost.training_flops(spec, length),
            parallel.peak_flops(ranks.device, known.precision, ranks.world),
        ),
        scaler=parallel.scaler(known.precision),
        quant=quant.Quantized(decoder, c, spec) if c.quant.on else None,
    )
    return run, kernels


def _engine(c: TrainConfig, decoder: Decoder, ranks: Ranks, precision: str, objective: losses.Objective) -> Engine:
    if ranks.degrees.pp == 1:
        return Whole(decoder, ranks, precision, criterion=objective)
    stage = parallel.Stage(decoder, ranks, c.parallel.schedule, parallel.DTYPES[precision])
    return Pipelined(decoder, ranks, stage, criterion=objective)


def _intent(spec: Spec, c: TrainConfig, run: loop.Run) -> str:
    """What is about to be done, in a line."""
    return (
        f"training {spec.name} ({short(cost.count(spec).total)} parameters) for {c.steps - run.step:,} steps of "
        f"{c.batch.sequences} x {c.length(spec)} tokens; Ctrl-C saves and stops"
    )


def _sampler(
    run: loop.Run, tok: tokenizer.TextTokenizer, data: TokenData, precision: str, say: Callable[[str], None]
) -> watch.Sampler | None:
    """What writes samples, where they are wanted and every rank has a part of each layer."""
    c, d = run.config.samples, run.ranks.degrees
    if c.every == 0 or not c.prompts:
        return None
    if d.pp > 1:
        say("samples: none, since the layers are on different ranks (parallel.pp)")
        return None
    begin = data.eos if data.bos is None else data.bos
    text, autocast = Text(tok.fast, tok.config), parallel.autocast(run.ranks, precision)
    return watch.Sampler(c, run.decoder, run.ranks, text, [begin], autocast)


def _begin(folder: checkpoint.RunFolder, c: TrainConfig, found: Path | None) -> None:
    """The run's folder and its configuration."""
    try:
        (folder.path / "training").mkdir(parents=True, exist_ok=True)
        folder.clean()
        checkpoint.write(folder.path / checkpoint.CONFIG, config.dump(c).encode())
        if found is not None:
            folder.publish(found)
    except OSError as e:
        raise UserError(f"{folder.path}: cannot be written: {e.strerror}") from None
