"""A calibration from beginning to end: sample the text, measure, plan, round; each step goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from backends.base import Planned, content_hash
from convert.calibrate import Choose, Progress
from convert.calibrate.estimate import disk
from convert.calibrate.fisher import Fisher
from convert.calibrate.measure import Measured
from convert.calibrate.rounder import Rounder, to_round, untouched
from convert.calibrate.runner import Runner, computing, device_of
from convert.calibrate.sample import Sample, sample
from convert.calibrate.settings import TOKENS, Settings
from convert.calibrate.store import Rounding, Store
from convert.levels import CODES, fits
from convert.recipe import Recipe, plan
from convert.sources import Source
from convert.sources.base import weights_hash
from spec.errors import UserError

T = TypeVar("T")

SWEEPS = {"good": 3, "best": 10}
"""Rounds of polishing codes and scales, by effort."""
TOGETHER = {"good": 64, "best": 16}
"""Rows that are rounded together."""
VERSION = 3
"""Of the arithmetic: a folder that another version left is not gone on with."""


def run(
    source: Source, recipe: Recipe | str, settings: Settings, folder: Path, progress: Progress, planned: Choose | None
) -> Rounding:
    """`convert.calibrate.calibrate`."""
    asked = Recipe(recipe) if isinstance(recipe, str) else recipe
    choose: Choose = planned or (lambda gains: plan(source.spec, asked, source.held, gains))
    first = choose(None)  # what it refuses, before any work
    tokens = settings.tokens or TOKENS[settings.effort]
    made = sample(source.spec, source.tokenizer, settings.text, tokens, settings.seed)
    with computing(settings.threads) as threads:
        device = device_of(settings.device)
        hashes = {n: content_hash(b for _, b in source.blocks(n)) for n in source.names()}
        key = _key(source, asked, first, settings, made, hashes, device, threads)
        store = Store(folder, key)
        try:
            if store.whole:
                return Rounding(folder)
            wanted = to_round(first, source.held)
            _check_space(source, made, store, bool(wanted))
            runner = Runner(source, made.ids.shape[1], device)
            measured = Measured(store, runner, made.ids, len(made.ids) if wanted else 0)
            _each("measure", range(source.spec.depth + 1), measured.step, progress)
            chosen, units = first, []
            if wanted:
                fisher = Fisher(store, measured, settings.seed, _priced(source, asked.level, wanted))
                _each("sensitivity", range(fisher.steps), fisher.step, progress)
                chosen = choose(fisher.gains() or None)
                store.settle({p.name: p.level for p in chosen})
                rounder = Rounder(
                    store, runner, measured, fisher, chosen, SWEEPS[settings.effort], TOGETHER[settings.effort]
                )
                units = rounder.units()
                _each("calibrate", units, rounder.step, progress)
            return _finished(source, settings, made, store, measured, chosen, units, hashes, key)
        finally:
            store.close()


def _priced(source: Source, level: str, wanted: Iterable[str]) -> dict[str, str]:
    """Matrices for which int8 may be bought instead of a level of 4 bits."""
    return {n: level for n in wanted if CODES.get(level) == 4 and fits(level, source.shape(n)[-1])}


def _each(stage: str, items: Sequence[T], step: Callable[[T], None], progress: Progress) -> None:
    for n, item in enumerate(items):
        progress(stage, n, len(items))
        step(item)
    progress(stage, len(items), len(items))


def _key(
    source: Source,
    recipe: Recipe,
    planned: Sequence[Planned],
    settings: Settings,
    made: Sample,
    hashes: dict[str, str],
    device: torch.device,
    threads: int,
) -> dict[str, Any]:
    """What a rounding depends on, bit for bit."""
    return {
        "version": VERSION,
        "spec": source.spec.hash,
        "source": weights_hash(hashes.items().__iter__()),
        "recipe": recipe.to_dict(),
        "levels": {p.name: p.level for p in planned if len(p.shape) > 1},
        "effort": settings.effort,
        "text": made.hash,
        "seed": settings.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": threads,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _check_space(source: Source, made: Sample, store: Store, rounds: bool) -> None:
    """Whether the disk holds what the run writes and has not written yet. Raises `UserError`."""
    written = sum(f.stat().st_size for f in store.folder.rglob("*") if f.is_file())
    need, free = disk(source.spec, made, rounds) - written, shutil.disk_usage(store.folder).free
    if need > free:
        raise UserError(f"{store.folder}: calibrating needs {need / 1e6:,.1f} MB there, and {free / 1e6:,.1f} MB are "
                        "free (--work names another folder)")  # fmt: skip


def _finished(
    source: Source,
    settings: Settings,
    made: Sample,
    store: Store,
    measured: Measured,
    planned: Sequence[Planned],
    units: Sequence[str],
    hashes: dict[str, str],
    key: dict[str, Any],
) -> Rounding:
    levels = {p.name: p.level for p in planned}
    contents: dict[str, str] = {}
    absent: list[str] = []
    for unit in units:
        codes, tokens = store.codes(unit, levels)
        contents |= {name: content_hash([q]) for name, q in codes.items()}
        absent += untouched(tokens)
    importance = measured.importance()
    counts = {n.removesuffix(".count"): v.tolist() for n, v in importance.items() if n.endswith(".count")}
    unmeasured = list(untouched(counts))
    contents = {n: contents[n] for n in source.names() if n in contents}
    record = {
        "source": source.name,
        "effort": settings.effort,
        "text": made.name,
        "text_hash": made.hash,
        "tokens": made.tokens,
        "windows": list(made.ids.shape),
        "seed": settings.seed,
        "device": key["device"],
        "threads": key["threads"],
        "torch": key["torch"],
        "rounded": len(contents),
        "untouched": absent,
        "unmeasured": unmeasured,
        "hash": weights_hash(contents.items().__iter__()),
    }
    return store.finish(planned, contents, hashes, importance, record)
