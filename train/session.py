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

from backends.torch.checkpoint import empty, load_weights
from backends.torch.model import Decoder
from spec.config import Spec
from spec.errors import UserError
from spec.load import load as load_spec
from train import checkpoint, config, loop, optim, parallel, watch
from train.config import TrainConfig
from train.data import corpus, tokenizer
from train.data.batches import Batches, DataState, Sequences
from train.data.store import TokenData
from train.data.tokens import cache_folder, prepare
from train.engine import Engine, Pipelined, Whole
from train.parallel import Ranks

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
    c: TrainConfig, spec: Spec, say: Callable[[str], None], found_in: Path | None = None
) -> tuple[tokenizer.TextTokenizer, TokenData]:
    """The tokenizer (a resumed run has its own) and the tokens, from the cache where they are in it.

    Raises `UserError` for a text or a tokenizer that cannot be used.
    """
    found = corpus.read(c.data.source, c.data.validation)
    cache = cache_folder(c.data.cache)
    documents = len(found.train) + len(found.validation)
    say(f"data: {c.data.source}, {documents:,} documents, {found.size / 1e6:.1f} MB, {len(found.validation)} held out")
    given = found_in or c.tokenizer
    if given is None:
        tok = tokenizer.cached(found.train, found.hash, spec.vocab_size, spec.context, cache)
    else:
        tok = tokenizer.load(given)
    if tok.size > spec.vocab_size:
        raise UserError(
            f"spec.vocab_size: {spec.vocab_size} is fewer than the tokenizer's {tok.size} tokens (raise it)"
        )
    if tok.size < spec.vocab_size:
        say(f"tokenizer: {tok.size} tokens; the spec's other {spec.vocab_size - tok.size} rows stay unused")
    data = prepare(found, tok, cache)
    counts = [sum(len(s.tokens) for s in splits) for splits in (data.train, data.validation)]
    say(f"tokens: {counts[0]:,} to train on, {counts[1]:,} held out")
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

    found = checkpoint.newest(out_folder(c)) if resume else None
    spec = load_spec(found if found is not None else c.spec)
    out = out_folder(c, spec)
    taken = checkpoint.occupied(out)
    if taken and not resume and not force:
        raise UserError(f"{out}: {taken} is already there (--resume continues the run, --force replaces it, or --out)")
    length = c.data.length or spec.context
    shares = ranks.degrees.data
    if c.batch.sequences % (shares * (c.batch.micro or 1)):
        raise UserError(f"batch.sequences: {c.batch.sequences} is no multiple of {shares} ranks times batch.micro")
    with _first_rank_first(ranks):
        tok, data = text(c, spec, say, found)
    precision, why = parallel.choose_precision(c.precision, ranks.device)
    say(f"device: {ranks.device}, {ranks.world} rank(s); {precision} ({why})")

    stages = parallel.spans(spec, ranks.degrees.pp)
    parallel.check_passes(c.parallel, c.batch.sequences // shares // (c.batch.micro or c.batch.sequences // shares))
    decoder = empty(spec, torch.float32, ranks.device, length=length)
    if len(stages) > 1:
        decoder.keep(stages[ranks.place("pp")])
    if found is not None:
        load_weights(decoder, found)
    else:
        decoder.init_weights(c.seed)
    for reason, kernel in decoder.kernels(
        length, packed=c.data.document_mask, dtype=parallel.DTYPES[precision]
    ).items():
        say(f"attention: {kernel} ({reason})")
    if ranks.world > 1:
        parallel.shard(decoder, ranks, precision)
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
    if found is not None:
        loop.restore(run, *checkpoint.read(found))
        say(f"resumed: step {run.step} of {c.steps}, {out}")
    folder = checkpoint.RunFolder(out, spec, tok.files())
    journal = None
    if ranks.first:
        if force and not resume:
            checkpoint.clear(out)
        journal = _begin(folder, c, found, run.step)
    last = min(c.steps, stop_after or c.steps)
    stop = loop.Stop()
    shown = watch.Watch(console, run.step, last, c.log_every, silent=not ranks.first)
    try:
        with stop.listening():
            metrics = loop.fit(run, folder, journal, shown, last, stop)
    finally:
        shown.close()
        if journal is not None:
            journal.close()
    if ranks.first:
        steps = watch.history(out / "training" / "train.jsonl")
        watch.plot(steps, out / "training" / "loss.png", f"{spec.name}: {run.step} steps, {c.data.source}")
    return Result(out, run.step, c.steps, stop.signal, metrics)


def _engine(c: TrainConfig, decoder: Decoder, ranks: Ranks, precision: str) -> Engine:
    if ranks.degrees.pp == 1:
        return Whole(decoder, ranks, precision)
    return Pipelined(decoder, ranks, parallel.Stage(decoder, ranks, c.parallel.schedule, parallel.DTYPES[precision]))


def _begin(folder: checkpoint.RunFolder, c: TrainConfig, found: Path | None, step: int) -> watch.Journal:
    """The run's folder, its configuration and journal."""
    try:
        (folder.path / "training").mkdir(parents=True, exist_ok=True)
        checkpoint.write(folder.path / checkpoint.CONFIG, config.dump(c).encode())
        if found is not None:
            folder.publish(found)
        return watch.Journal(folder.path / "training" / "train.jsonl", step)
    except OSError as e:
        raise UserError(f"{folder.path}: cannot be written: {e.strerror}") from None
