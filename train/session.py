"""From a configuration to a run that can begin: data, tokenizer, decoder, optimizer, the checkpoint to go on from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from train import checkpoint, config, loop, optim, parallel, watch
from train.config import TrainConfig
from train.data import prepare, tokenizer
from train.data.batches import Batches, DataState, Sequences
from train.data.progress import shown
from train.data.store import TokenData
from train.data.tokens import cache_folder
from train.engine import Engine, Pipelined, Whole
from train.parallel import Ranks
from train.watch import portability, profile
from train.watch.console import Progressing
from train.watch.trackers import trackers

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


def out_folder(c: TrainConfig, spec: Spec | None = None) -> Path:
    """Where the run lives."""
    return Path(c.out) if c.out is not None else Path("runs") / (spec or load_spec(c.spec)).name


def resumed(chosen: Mapping[str, Any]) -> tuple[TrainConfig, Path, list[str]]:
    """The configuration to go on with, its folder, and what differs from the run's own.

    The run's own configuration counts, and what the user chose now is laid over it. Raises `UserError` where there is
    no run, or where the spec would be another.
    """
    out = out_folder(config.layered(chosen))
    found = checkpoint.newest(out)
    own = (found or out) / checkpoint.CONFIG
    if not own.is_file():
        raise UserError(f"{out}: no run to resume (leave --resume out to begin one, or name its folder with --out)")
    saved = config.parse(config.read(own), str(own))
    changed = config.layered(saved.model_dump(), chosen)
    if found is not None and "spec" in chosen and load_spec(changed.spec).hash != load_spec(found).hash:
        raise UserError(f"spec: {changed.spec} is not the spec that {out} was begun with (choose another --out)")
    if found is not None and changed.tokenizer != saved.tokenizer:
        raise UserError(f"tokenizer: {out} was begun with another, and has its own (leave --tokenizer out)")
    shown = changed.model_copy(update={"out": saved.out})  # the folder may have moved; that changes nothing
    return changed, out, config.differences(saved, shown)


@contextmanager
def _first_rank_first(ranks: Ranks) -> Iterator[None]:
    """Rank 0 runs the block (and fills the caches) before the others do."""
    if ranks.world > 1 and not ranks.first:
        dist.barrier()
    yield
    if ranks.world > 1 and ranks.first:
        dist.barrier()


def text(
    c: TrainConfig, spec: Spec, console: Console, found_in: Path | None = None
) -> tuple[tokenizer.TextTokenizer, TokenData]:
    """The tokenizer (a resumed run has its own) and the tokens, from the cache where they are in it.

    Raises `UserError` for a text or a tokenizer that cannot be used.
    """

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    cache = cache_folder(c.data.cache)
    found = prepare.read(c.data, cache)
    say(f"data: {found.name}, {found.files:,} file(s), {found.size / 1e6:,.1f} MB")
    tok = prepare.tokenizer_of(found, found_in or c.tokenizer, spec.vocab_size, spec.context, cache)
    if tok.size > spec.vocab_size:
        raise UserError(
            f"spec.vocab_size: {spec.vocab_size} is fewer than the tokenizer's {tok.size} tokens (raise it)"
        )
    if tok.size < spec.vocab_size:
        say(f"tokenizer: {tok.size} tokens; the spec's other {spec.vocab_size - tok.size} rows stay unused")
    with shown(console, "tokenising", found.size) as progress:
        data = prepare.tokenize(found, tok, cache, c.data.workers, progress)
    for what, splits in (("to train on", data.train), ("held out", data.validation)):
        tokens, documents = sum(len(s.tokens) for s in splits), sum(s.documents for s in splits)
        say(f"tokens: {tokens:,} {what}, {documents:,} document(s)")
    return tok, data


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
    with parallel.ranks(c.device, c.parallel) as ranks:
        return _train(c, ranks, resume, force, stop_after, console)


def _train(c: TrainConfig, ranks: Ranks, resume: bool, force: bool, stop_after: int | None, console: Console) -> Result:
    def say(line: str) -> None:
        if ranks.first:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    found = ranks.agree(checkpoint.newest(out_folder(c))) if resume else None
    spec = load_spec(found if found is not None else c.spec)
    out = out_folder(c, spec)
    taken = checkpoint.occupied(out)
    if taken and not resume and not force:
        raise UserError(f"{out}: {taken} is already there (--resume continues the run, --force replaces it, or --out)")
    length = c.data.length or spec.context
    parallel.check(spec, ranks.degrees, length)
    shares = ranks.degrees.data
    if c.batch.sequences % (shares * (c.batch.micro or 1)):
        raise UserError(f"batch.sequences: {c.batch.sequences} is no multiple of {shares} ranks times batch.micro")
    folder = out / "training"
    chosen = trackers(c.watch, folder)
    if found is None:
        portability.tell(spec, c.spec, c.quant, console if ranks.first else None)
    with _first_rank_first(ranks):
        tok, data = text(c, spec, console if ranks.first else Console(quiet=True), found)
    precision, why = parallel.choose_precision(c.precision, ranks.device)
    say(f"device: {ranks.device}, {ranks.world} rank(s); {precision} ({why})")

    stages = parallel.spans(spec, ranks.degrees.pp)
    parallel.check_passes(c.parallel, c.batch.sequences // shares // (c.batch.micro or c.batch.sequences // shares))
    with torch.device("meta"):  # so that no rank ever has the whole model
        decoder = Decoder(spec, length=length)
    if len(stages) > 1:
        decoder.keep(stages[ranks.place("pp")])
    if ranks.world > 1:
        parallel.shard(decoder, ranks, precision)
    decoder.to_empty(device=ranks.device)
    if found is None:
        decoder.init_weights(c.seed)
    kernels = decoder.kernels(length, packed=c.data.document_mask, dtype=parallel.DTYPES[precision])
    for reason, kernel in kernels.items():
        say(f"attention: {kernel} ({reason})")
    torch.manual_seed(c.seed + ranks.rank)  # dropout
    fingerprint = f"{data.fingerprint}:{length}"
    cut = (length, data.eos, data.bos, c.data.document_mask)
    run = loop.Run(
        c,
        ranks,
        decoder,
        _engine(c, decoder, ranks, precision),
        optim.build(decoder, spec, c.optimizer),
        Batches(Sequences(data.train[0], *cut), DataState(fingerprint, seed=c.seed)),
        Sequences(data.validation[0], *cut) if data.validation else None,
    )
    best = None
    if found is not None:
        best = checkpoint.best_of(checkpoint.restore(run, found), found)
        say(f"resumed: step {run.step} of {c.steps}, {out}")
    run.meter = watch.Meter(ranks.device, cost.training_flops(spec, length))
    run.sampler = _sampler(run, tok, data, say)
    files = checkpoint.RunFolder(out, spec, tok.files())
    last = min(c.steps, stop_after or c.steps)
    stop = loop.Stop()
    shown = Progressing(console, run.step, last, c.log_every, silent=not ranks.first)
    board = watch.Board(shown, folder if ranks.first else None, c.model_dump(mode="json"), chosen)
    traced = profile.span(c.profile) if c.profile is not None and ranks.first else range(0)
    tracer = watch.Profile(traced, folder / "profile", ranks.device, board.say)
    try:
        say(_intent(spec, c, run, length, sum(len(s.tokens) for s in data.train)))
        if ranks.first:
            if force and not resume:
                checkpoint.clear(out)
            _begin(files, c, found)
            board.begin(run.step, run.batches.state.batches, watch.environment(c, ranks, precision, kernels))
        with stop.listening(), checkpoint.Saver(files, ranks, c, say, best) as saver:
            metrics = loop.fit(run, saver, board, last, stop, tracer)
    finally:
        tracer.close()
        board.close()
        board.report(picture=True)
    return Result(out, run.step, c.steps, stop.signal, metrics, run.ended)


def _engine(c: TrainConfig, decoder: Decoder, ranks: Ranks, precision: str) -> Engine:
    if ranks.degrees.pp == 1:
        return Whole(decoder, ranks, precision)
    return Pipelined(decoder, ranks, parallel.Stage(decoder, ranks, c.parallel.schedule, parallel.DTYPES[precision]))


def _intent(spec: Spec, c: TrainConfig, run: loop.Run, length: int, tokens: int) -> str:
    """What is about to be done, in a line."""
    step = c.batch.sequences * length
    passes = f", {step * c.steps / tokens:.2g} times all of the data" if tokens else ""
    size = short(cost.count(spec).total)
    return (
        f"training {spec.name} ({size} parameters) for {c.steps - run.step:,} steps of {c.batch.sequences} x {length} = "
        f"{step:,} tokens{passes}; Ctrl-C saves and stops"
    )


def _sampler(
    run: loop.Run, tok: tokenizer.TextTokenizer, data: TokenData, say: Callable[[str], None]
) -> watch.Sampler | None:
    """What writes samples, where they are wanted and one rank has a whole layer."""
    c, d = run.config.samples, run.ranks.degrees
    if c.every == 0 or not c.prompts:
        return None
    if d.pp > 1 or d.tp > 1:
        say("samples: none, since layers are cut over ranks (parallel.tp, parallel.pp)")
        return None
    begin = data.eos if data.bos is None else data.bos
    autocast = parallel.autocast(run.ranks, run.engine.precision) if isinstance(run.engine, Whole) else None
    return watch.Sampler(c, run.decoder, run.ranks, Text(tok.fast, tok.config), [begin], autocast)


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
