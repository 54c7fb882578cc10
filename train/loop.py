"""The training loop: read it from `fit` upwards.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import FrameType

import torch
from torch import Tensor

from backends.torch.model import Decoder
from spec.errors import UserError
from train import checkpoint, config, optim
from train.checkpoint import Saver
from train.data.batches import Batches, Sequences, validation_rows
from train.engine import Engine
from train.losses import Losses
from train.parallel import Ranks, Scaler
from train.quant import Quantized
from train.watch import Board, Guard, Meter, Metrics, Profile, Sampler, Score, Verdict, by_name


@dataclass
class Run:
    """Everything that a step reads and changes."""

    config: config.TrainConfig
    ranks: Ranks
    decoder: Decoder
    engine: Engine
    optimizer: optim.Optimizer
    batches: Batches
    held_out: tuple[Sequences, ...]
    losses: Losses = field(default_factory=Losses)
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the last step's loss was made of."""
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    guard: Guard = field(default_factory=Guard)
    meter: Meter = field(default_factory=Meter)
    sampler: Sampler | None = None
    scaler: Scaler | None = None
    """Keeps float16's gradients in range."""
    quant: Quantized | None = None
    """What rounds the weights that forward passes read."""
    verdict: Verdict | None = None
    """Of the last step, where its update was not applied."""
    ended: bool = False
    """Whether it ended before its last step, since the validation no longer improved."""

    @property
    def micro(self) -> int:
        """Sequences of one forward pass."""
        return self.config.batch.at_once(self.ranks.degrees.data)

    def rounded(self, step: int) -> AbstractContextManager[None]:
        """Inside, the weights after `step` steps are as they ship, where they are trained for that."""
        return nullcontext() if self.quant is None else self.quant.weights(step)

    @contextmanager
    def shipped(self) -> Iterator[None]:
        """Inside, the weights are those that a checkpoint of this step has: averaged, rounded."""
        with self.optimizer.averaged(), self.rounded(self.step):
            yield


@dataclass
class Stop:
    """Ctrl-C, SIGTERM, or the SIGUSR1 that Slurm is asked for: the step under way is finished and saved. Another one
    later ends the process at once; within a second it is the same one, from the terminal and from torchrun."""

    signal: int = 0
    at: float = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside the block."""
        chosen = [s for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (s := getattr(signal, name, None)) is not None]
        before = {s: signal.getsignal(s) for s in chosen}

        def note(number: int, frame: FrameType | None) -> None:
            if not self.signal:
                self.signal, self.at = number, time.monotonic()
            elif time.monotonic() > self.at + 1:
                for s, handler in before.items():
                    signal.signal(s, handler)
                signal.raise_signal(number)

        for s in chosen:
            signal.signal(s, note)
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def gradients(run: Run) -> tuple[float, Tensor, int]:
    """Forward and backward over the next global batch: its mean loss, the global norm, and its valid targets.

    Divided by the valid targets of the whole batch, counted beforehand, gradients depend neither on accumulation nor
    on the number of ranks nor on how masked targets fall.
    """
    ranks = run.ranks
    micro_batches, valid = run.batches.next(run.config.batch.sequences, run.micro, ranks.data, ranks.degrees.data)
    run.meter.waited += run.batches.waited
    factor = 1.0 if run.scaler is None else run.scaler.scale
    with run.rounded(run.step - 1):
        loss = run.engine.backward(micro_batches, factor / max(1, valid)) / factor
    if run.scaler is not None:
        run.scaler.unscale(run.decoder.parameters())
    detailed = run.step % run.config.log_every == 0
    loss_value, run.parts = run.losses.report(ranks, loss, valid, detailed)
    return loss_value, optim.gradient_norm(run.decoder.parameters(), ranks), valid


def train_step(run: Run) -> Metrics:
    """One optimizer step. Where `run.guard` finds the loss or the gradients wrong, the optimizer does not see them."""
    c = run.config
    run.meter.begin()
    run.step += 1
    loss, norm, valid = gradients(run)
    share = optim.factor(c, run.step, run.batches.state.tokens)  # of the peak learning rates
    overflowed = run.scaler is not None and run.scaler.overflowed(loss, float(norm))
    run.verdict = None if overflowed else judge(run, loss, float(norm))
    if overflowed:
        pass  # the loss of the next step is scaled by less
    elif run.verdict is None:
        run.losses.correct()
        run.optimizer.scale(share)
        optim.clip(run.decoder.parameters(), c.optimizer, norm)
        run.optimizer.step()
        run.guard.applied(c.watch, loss, float(norm))
        run.skipped_in_a_row = 0
    else:
        run.skipped += 1
        run.skipped_in_a_row += 1
    run.optimizer.zero_grad(set_to_none=True)
    counts = {"tokens": run.batches.state.tokens, "skipped": run.skipped, "rollbacks": run.guard.rollbacks}
    return Metrics(
        run.step, loss, c.optimizer.peak * share, float(norm), parts=run.parts, **counts, **run.meter.end(valid)
    )


def judge(run: Run, loss: float, norm: float) -> Verdict | None:
    """Whether a step is kept from the optimizer, and what then; on all ranks alike."""
    warm = run.step > optim.warmup_of(run.config, run.step, run.batches.state.tokens)
    found = run.guard.judge(run.config.watch, loss, norm, warm=warm)
    if not run.ranks.sum(float(found is not None))[0]:
        return None
    return next(v for v in run.ranks.gather(found) if v is not None)


def react(run: Run, saver: Saver, board: Board, metrics: Metrics) -> None:
    """Skip, roll back or stop, as the last step's verdict says. Raises `UserError` where the run ends."""
    verdict, c, step = run.verdict, run.config, run.step
    assert verdict is not None
    place = step, run.batches.state.batches
    if verdict.action == "stop":
        board.step(metrics)
        board.event("stop", *place, verdict.reason)
        saver.save(run)
        saver.wait()
        raise UserError(f"step {step}: {verdict.reason}; saved without this step (go on behind it with --resume)")
    if verdict.action == "rollback":
        rollback(run, saver)
        board.event("rollback", *place, verdict.reason, to=run.step, loss=metrics.loss)
        board.rewind(run.step)
        return
    board.event("skip", *place, verdict.reason)
    if run.skipped_in_a_row >= c.optimizer.max_skipped:
        found = checkpoint.newest(saver.folder.path)
        kept = f"the checkpoint of step {checkpoint.number(found)} is whole" if found else "nothing was saved yet"
        raise UserError(
            f"step {step}: {'spikes' if verdict.finite else 'loss or gradients were not finite'} for "
            f"{run.skipped_in_a_row} steps in a row (optimizer.max_skipped); lower optimizer.lr={c.optimizer.peak:g} "
            f"or raise schedule.warmup; {kept}"
        )


def rollback(run: Run, saver: Saver) -> None:
    """Go back to the newest checkpoint, and on with the data behind the batch that went wrong."""
    saver.wait()
    data, rollbacks = run.batches.state, run.guard.rollbacks + 1
    checkpoint.restore(run, run.ranks.agree(checkpoint.newest(saver.folder.path)))
    run.batches.state, run.guard.rollbacks = data, rollbacks


@torch.no_grad()
def validate(run: Run) -> Score | None:
    """Loss of the held-out documents, and of each source's own; none where nothing is held out."""
    if not run.held_out:
        return None
    run.decoder.eval()
    sums = torch.zeros(len(run.held_out), dtype=torch.float32, device=run.ranks.device)
    valid = [0] * len(run.held_out)
    share = run.ranks.data, run.ranks.degrees.data
    seen = min(1.0, run.config.validation.tokens / sum(s.inputs for s in run.held_out))
    with run.shipped():
        for n, s in enumerate(run.held_out):
            for rows in validation_rows([s], round(seen * s.inputs), run.micro, *share):
                sums[n] += run.engine.score(rows)
                valid[n] += rows.valid
    run.decoder.train()
    found = run.ranks.sum(*sums.tolist(), *valid)
    totals, counts = found[: len(valid)], [n / run.ranks.degrees.readers for n in found[len(valid) :]]
    mean = sum(totals) / max(1.0, sum(counts))
    splits = [s.split for s in run.held_out]
    bits = None  # of answers alone, nobody has counted the bytes
    if all(s.mask is None for s in splits):
        bits = mean / math.log(2) * sum(len(s.tokens) for s in splits) / max(1, sum(s.bytes for s in splits))
    each = [total / max(1.0, count) for total, count in zip(totals, counts, strict=True)]
    return Score(mean, bits, by_name([s.name for s in splits], each) if len(each) > 1 else {})


def fit(run: Run, saver: Saver, board: Board, last: int, stop: Stop, profile: Profile | None = None) -> Metrics | None:
    """Train up to step `last`, or until a signal comes; what was reached is saved. Returns the last step's metrics.

    Raises `UserError` where a checkpoint cannot be written, or where too much went wrong (`react`).
    """
    c = run.config
    run.decoder.train()
    metrics: Metrics | None = None
    if run.step == 0:
        begin(run, saver, board)
    while run.step < last:
        if profile is not None:
            profile.before(run.step + 1)
        metrics = train_step(run)
        if profile is not None:
            profile.after(run.step)
        if run.verdict is not None:
            react(run, saver, board, metrics)
            if run.verdict.action == "rollback":
                continue
        if run.step == run.config.rounds_from:
            quantize(run, saver, board)
        stopping, late, failed = (any_ > 0 for any_ in run.ranks.sum(stop.signal, saver.late, saver.failed))
        if failed:
            saver.wait()
        ending = run.step == last or stopping
        due = not stopping and (run.step % c.validate_every == 0 or run.step == c.steps)
        if due:
            metrics = scored(run, metrics)
        board.step(metrics)
        if run.sampler is not None and not stopping and (c.sampled(run.step) if c.samples.every else due):
            with run.shipped():
                texts = list(run.sampler.write())
            for prompt, text in texts:
                board.text(run.step, prompt, text)
        if c.validation.patience is not None and run.guard.stale >= c.validation.patience:
            best = f"{run.guard.best:.4f}, {run.guard.stale} validations ago (validation.patience)"
            board.event("end", run.step, run.batches.state.batches, f"the best validation loss was {best}")
            run.ended = ending = True
        if ending or late or saver.due(run.step) or saver.improves(metrics.val_loss):
            saver.save(run, metrics.val_loss)
            board.saved()
        if stopping or run.ended:
            break
    saver.close(interrupted=stop.signal > 0)
    return metrics


def begin(run: Run, saver: Saver, board: Board) -> None:
    """What comes before the first step."""
    w = run.config.watch
    if "rollback" in (w.nonfinite, w.spike):
        saver.save(run)
    if run.config.validation.at_start and (found := validate(run)) is not None:
        bits = "" if found.bits_per_byte is None else f" = {found.bits_per_byte:.3f} bits/byte"
        board.say(f"step 0  validation loss {found.loss:.4f}{bits}")
        board.event("start", 0, 0, "validation", val_loss=found.loss, val_bits_per_byte=found.bits_per_byte)


def quantize(run: Run, saver: Saver, board: Board) -> None:
    """From the next step on weights are rounded: losses in full precision are no measure of what comes."""
    run.guard.forget()
    saver.best = None
    board.event("quant", run.step, run.batches.state.batches, f"quant={run.config.quant.level} begins")


def scored(run: Run, metrics: Metrics) -> Metrics:
    """With the loss of the held-out documents, where there are any."""
    found = validate(run)
    if found is None:
        return metrics
    run.guard.scored(found.loss)
    return replace(metrics, val_loss=found.loss, val_bits_per_byte=found.bits_per_byte, val_parts=found.parts)


__all__ = ["Run", "Stop", "fit", "train_step", "validate"]
