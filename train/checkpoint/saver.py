"""Saving: one checkpoint at a time, beside the training where that pays, whole on all ranks or not there."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch.distributed as dist
from torch import Tensor

from spec.errors import UserError
from train import config, quant
from train.checkpoint import state
from train.checkpoint.export import Exporter
from train.checkpoint.folder import CONFIG, STATE, TENSORS, RunFolder
from train.checkpoint.tensors import CheckpointException, Reader, Stager, quiet, reason, save
from train.checkpoint.weights import shards, write_index, write_weights
from train.config import TrainConfig
from train.parallel import Ranks

if TYPE_CHECKING:
    from train.loop import Run

PATIENCE = timedelta(hours=4)
"""How long a rank may write while others wait for it. One that died is noticed at once."""


class Best(NamedTuple):
    """The saved step whose validation loss is the lowest."""

    step: int
    loss: float


class Saver:
    """Saves a run. Every rank makes one and calls it alike.

    In the background, weights and state are copied into the CPU's memory first; only then does training go on. A
    failure is raised by the next `save` or `wait`, on every rank, and earlier checkpoints are then as they were.
    """

    def __init__(
        self, folder: RunFolder, ranks: Ranks, c: TrainConfig, say: Callable[[str], None], best: Best | None = None
    ) -> None:
        quiet()
        self.folder, self.ranks, self.config, self.best = folder, ranks, c.checkpoint, best
        self.asynchronous = c.checkpoint.in_background(ranks.device.type)
        self.exporter = Exporter(folder, c.checkpoint.export, say) if ranks.first and c.checkpoint.export else None
        self._text, self._last = config.dump(c).encode(), c.steps
        self._rounds, self._recipe, self._levels = c.rounds, quant.recipe(c.quant), quant.levels(c.quant, folder.spec)
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.world > 1 else None
        self._stage = Stager(ranks.device)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: int | None = None
        self._began = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether this step is one to save."""
        return step % self.config.every == 0 or self._exported(step)

    @property
    def late(self) -> bool:
        """Whether the clock says so. Asked of the first rank; the others follow it."""
        limit = self.config.minutes
        return self.ranks.first and limit is not None and time.monotonic() - self._began >= limit * 60

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed on this rank; `wait` says why, on every rank."""
        return self._error is not None

    def improves(self, loss: float | None) -> bool:
        """Whether a validation loss is the lowest so far, and to be kept."""
        if not self.config.best or loss is None or not math.isfinite(loss):
            return False
        return self.best is None or loss < self.best.loss

    def save(self, run: Run, loss: float | None = None) -> None:
        """Save this step, of validation loss `loss`. Raises `UserError` where this or the last save failed."""
        self.wait()
        if run.step == self._saved:
            return
        if self.improves(loss):
            assert loss is not None
            self.best = Best(run.step, loss)
        self._saved, self._began = run.step, time.monotonic()
        tensors, about = state.tensors(run), {**state.state(run), "best": self.best and list(self.best)}
        if not self.asynchronous:
            self._write(run.step, tensors, about)
            return
        self._thread = threading.Thread(
            target=self._in_background, args=(run.step, self._stage(tensors), about), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises `UserError` where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self, interrupted: bool = False) -> None:
        """Wait for what is being saved and exported; an interrupted run gives its export up."""
        self.wait()
        if self.exporter is not None:
            self.exporter.close(wait=not interrupted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """What the user can fix came to all ranks alike, and the last save ends as it would. Of other errors nobody
        knows whether the others still answer."""
        if error is not None and self.exporter is not None:
            self.exporter.close(wait=False)
        if isinstance(error, UserError) and self._thread is not None:
            self._thread.join()

    def _in_background(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        try:
            self._write(step, tensors, about)
        except BaseException as e:
            self._error = e

    def _write(self, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """One checkpoint, all ranks in step. Nothing has its name before everything is on the disk."""
        folder, partial = self.folder, self.folder.partial(step)
        levels, recipe = (self._levels, self._recipe) if self._rounds(step) else ({}, None)
        files = shards(folder.spec, self.config.dtype, round(self.config.shard_size * 1e9), levels)
        small = {STATE: (json.dumps(about, indent=2) + "\n").encode(), CONFIG: self._text}
        mine = list(files)[self.ranks.rank :: self.ranks.world]
        try:
            self._first(lambda: folder.begin(step))
            self._each(lambda: save(tensors, partial / TENSORS, self._group))
            tensors.clear()
            self._each(lambda: write_weights(Reader(partial / TENSORS), partial, files, mine, levels, recipe))
            self._first(lambda: write_index(partial, files), lambda: folder.commit(step, small))
            self._first(lambda: self._publish(step))
        except UserError as e:
            if self.ranks.first:
                folder.abandon(step)
            raise folder.refused(step, str(e)) from None

    def _publish(self, step: int) -> None:
        done = self.folder.step(step)
        self.folder.publish(done)
        if self.best is not None:
            self.folder.mark_best(self.best.step)
        if self.exporter is not None and self._exported(step):
            self.exporter.offer(done)
        held = set() if self.exporter is None else self.exporter.held
        self.folder.prune(self.config.keep, held | ({self.best.step} if self.best is not None else set()))

    def _exported(self, step: int) -> bool:
        c = self.config
        return bool(c.export) and (step == self._last or (c.export_every is not None and step % c.export_every == 0))

    def _first(self, *actions: Callable[[], Any]) -> None:
        """Do it on the first rank."""
        self._each(*(actions if self.ranks.first else ()))

    def _each(self, *actions: Callable[[], Any]) -> None:
        """Do it on this rank, while the others do theirs; what fails on one fails on all."""
        problem: str | None = None
        try:
            for act in actions:
                act()
        except (Exception, CheckpointException) as e:
            problem = reason(e)
        problems: list[str | None] = [problem]
        if self._group is not None:
            problems *= self.ranks.world
            dist.all_gather_object(problems, problem, group=self._group)
        if any(problems):
            raise UserError(next(p for p in problems if p))


def best_of(saved: dict[str, Any], folder: Path) -> Best | None:
    """The best step that a resumed run knows of, if its checkpoint is still there."""
    found = saved.get("best")
    if not found or not (folder.parent / f"step-{found[0]:06d}").is_dir():
        return None
    return Best(int(found[0]), float(found[1]))
