"""The training loop: read it from `fit` upwards.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from backends.torch.model import Decoder
from spec.errors import UserError
from train import checkpoint, config, optim, parallel
from train.checkpoint import RunFolder, Snapshot
from train.data.batches import Batches, DataState, Sequences, validation_rows
from train.engine import Engine
from train.parallel import Ranks
from train.watch import Journal, Metrics, Watch


@dataclass
class Run:
    """Everything that a step reads and changes."""

    config: config.TrainConfig
    ranks: Ranks
    decoder: Decoder
    engine: Engine
    optimizer: torch.optim.Optimizer
    batches: Batches
    held_out: Sequences | None
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def micro(self) -> int:
        """Sequences of one forward pass."""
        return self.config.batch.micro or self.config.batch.sequences // self.ranks.degrees.data


@dataclass
class Stop:
    """Ctrl-C or SIGTERM: the step under way is finished and saved. A second one ends the process at once."""

    signal: int = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside the block."""
        chosen = (signal.SIGINT, signal.SIGTERM)
        before = {s: signal.getsignal(s) for s in chosen}

        def note(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for s, handler in before.items():
                signal.signal(s, handler)

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
    loss = run.engine.backward(micro_batches, 1 / max(1, valid))
    [loss_value] = ranks.sum(float(loss))
    return loss_value, optim.gradient_norm(run.decoder.parameters()), valid


def train_step(run: Run) -> Metrics:
    """One optimizer step. A loss or gradient that is not finite skips it, before the optimizer has seen it."""
    c, began = run.config, time.perf_counter()
    run.step += 1
    lr = optim.learning_rate(run.step, c.steps, c.warmup, c.optimizer.lr, c.schedule.final)
    loss, norm, valid = gradients(run)
    if math.isfinite(loss) and math.isfinite(float(norm)):
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        if c.optimizer.clip is not None:
            optim.clip(run.decoder.parameters(), c.optimizer.clip, norm)
        run.optimizer.step()
        run.skipped_in_a_row = 0
    else:
        run.skipped += 1
        run.skipped_in_a_row += 1
    run.optimizer.zero_grad(set_to_none=True)
    speed = valid / (time.perf_counter() - began)
    return Metrics(run.step, loss, lr, float(norm), speed, run.batches.state.tokens, run.skipped)


@torch.no_grad()
def validate(run: Run) -> tuple[float, float] | None:
    """Loss of the held-out documents in nats a token and bits a byte; none where nothing is held out."""
    if run.held_out is None:
        return None
    run.decoder.eval()
    loss = torch.zeros((), dtype=torch.float32, device=run.ranks.device)
    valid = 0
    share = run.ranks.data, run.ranks.degrees.data
    for rows in validation_rows(run.held_out, run.config.validation.tokens, run.micro, *share):
        loss += run.engine.score(rows)
        valid += rows.valid
    run.decoder.train()
    total, count = run.ranks.sum(float(loss), valid)
    mean = total / max(1.0, count)
    split = run.held_out.split
    return mean, mean / math.log(2) * len(split.tokens) / max(1, split.bytes)


def snapshot(run: Run) -> Snapshot:
    """All that resuming needs, gathered on every rank."""
    tensors: dict[str, Tensor] = {}
    for name, p in run.decoder.named_parameters():
        for key, value in run.optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{name}/{key}"] = parallel.whole(value)
    for rank, states in enumerate(run.ranks.gather(checkpoint.random_state(run.ranks.device))):
        tensors |= {f"random/{rank}/{kind}": t for kind, t in states.items()}
    model = {name: parallel.whole(p) for name, p in run.decoder.named_parameters()}
    counters = {"skipped": run.skipped, "skipped_in_a_row": run.skipped_in_a_row}
    state = {**counters, "world": run.ranks.world, "data": run.batches.state.as_dict()}
    return Snapshot(run.step, model, tensors, state)


def restore(run: Run, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Continue from a checkpoint; the decoder has its weights already. Raises `UserError` where the data changed."""
    saved = DataState(**state["data"])
    ours = run.batches.state.fingerprint
    if saved.fingerprint != ours:
        raise UserError(
            f"--resume: the data, the tokenizer or data.length changed since step {state['step']} "
            f"(fingerprint {ours[:12]}, and the run began with {saved.fingerprint[:12]}); "
            "restore them, or start anew with --force or another --out"
        )
    for name, p in run.decoder.named_parameters():
        own = {k.rpartition("/")[2]: t for k, t in tensors.items() if k.startswith(f"optimizer/{name}/")}
        if own:  # a count of steps is a scalar and never sharded
            run.optimizer.state[p] = {
                k: parallel.like(t, p) if t.dim() else t.to(p.device, copy=True) for k, t in own.items()
            }
    rank = run.ranks.rank if state["world"] == run.ranks.world else 0
    states = {k.rpartition("/")[2]: t for k, t in tensors.items() if k.startswith(f"random/{rank}/")}
    checkpoint.restore_random_state(states, run.ranks.device)
    run.batches.state = saved
    run.step, run.skipped, run.skipped_in_a_row = state["step"], state["skipped"], state["skipped_in_a_row"]


def save(run: Run, folder: RunFolder) -> None:
    """Write a checkpoint; every rank takes part, and every rank learns if it failed."""
    snap = snapshot(run)
    problem: str | None = None
    if run.ranks.first:
        try:
            folder.save(snap, config.dump(run.config), run.config.checkpoint.keep)
        except UserError as e:
            problem = str(e)
    problem = run.ranks.gather(problem)[0]
    if problem is not None:
        raise UserError(problem)


def fit(run: Run, folder: RunFolder, journal: Journal | None, watch: Watch, last: int, stop: Stop) -> Metrics | None:
    """Train up to step `last`, or until a signal comes; what was reached is saved. Returns the last step's metrics.

    Raises `UserError` where a checkpoint cannot be written, or too many steps in a row were skipped.
    """
    c = run.config
    run.decoder.train()
    metrics: Metrics | None = None
    while run.step < last:
        metrics = train_step(run)
        if run.skipped_in_a_row >= c.optimizer.max_skipped:
            found = checkpoint.newest(folder.path)
            kept = f"the checkpoint of step {checkpoint.number(found)} is whole" if found else "nothing was saved yet"
            raise UserError(
                f"step {run.step}: loss or gradients were not finite for {run.skipped_in_a_row} steps in a row "
                f"(optimizer.max_skipped); lower optimizer.lr={c.optimizer.lr:g} or raise schedule.warmup; {kept}"
            )
        stopping = run.ranks.sum(float(stop.signal))[0] > 0
        ending = run.step == last or stopping
        if not stopping and (run.step % c.validate_every == 0 or run.step == c.steps):
            scored = validate(run)
            if scored is not None:
                metrics = replace(metrics, val_loss=scored[0], val_bits_per_byte=scored[1])
        if journal is not None:
            journal.write(metrics)
        watch.step(metrics)
        if ending or run.step % c.checkpoint.every == 0:
            save(run, folder)
        if stopping:
            break
    return metrics


__all__ = ["Run", "Stop", "fit", "restore", "save", "snapshot", "train_step", "validate"]
