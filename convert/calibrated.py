"""The calibrated part of a conversion: what is asked for, whether it can be, and where its work lies how long."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import calibrate
from convert.calibrate import EFFORTS, Rounding, Settings
from convert.calibrate.store import KEY
from convert.levels import GROUPS, LEVELS
from convert.prepare import Job, takes_importance
from convert.recipe import kept
from convert.sources.base import collapse
from spec.errors import UserError, nearest

if TYPE_CHECKING:
    from convert.pipeline import Progress

STDLIB = "stdlib"
REACHED = ("untouched", "unmeasured")
"""Keys of a rounding's record that list tensors: rounded by the plain search, and without importance."""
LONGEST = 8000
"""Characters of such a list in a receipt, for which containers keep room."""


@dataclass(frozen=True)
class Calibration:
    """How codes are found with a text."""

    settings: Settings
    work: Path | None
    """The folder that its work stays in; none: one beside the output, until the conversion has succeeded."""


def wanted(
    effort: str | None = None,
    text: str | Path | None = None,
    work: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Calibration | None:
    """What the options ask for; none where no text is read. Raises `UserError`."""
    chosen = (effort or ("fast" if text is None else "good")).lower()
    if chosen not in EFFORTS:
        raise UserError(f"--effort {effort}: no such effort ({nearest(chosen, EFFORTS)})")
    if chosen != EFFORTS[0]:
        settings = Settings(str(text or STDLIB), chosen, device=device or "auto", threads=threads)
        return Calibration(settings, None if work is None else Path(work))
    for option, value in (("calibrate", text), ("work", work), ("device", device)):
        if value is not None:
            raise UserError(f"--{option} {value}: --effort fast runs no model (give --effort good)")
    return None


def check(job: Job, asked: Calibration) -> None:
    """Whether a text has anything to say to this conversion. Raises `UserError`."""
    calibrate.check()
    named = f"--effort {asked.settings.effort}"
    held = job.source.held
    codes = [p for p in job.planned if p.level in GROUPS and not kept(held.levels.get(p.name), p.level)]
    own = [p for p in job.planned if p.level not in LEVELS]
    if codes or (own and all(takes_importance(t.backend) for t in job.targets)):
        return
    if own:
        raise UserError(f"{named}: {job.targets[0].backend.name} rounds {own[0].level} itself and takes no importance "
                        "(use --quant q4, or --effort fast)")  # fmt: skip
    if held.recipe is not None:
        raise UserError(f"{named}: the checkpoint was trained for {held.recipe.level}, and its codes are those that it "
                        "was trained with (leave --effort and --calibrate out)")  # fmt: skip
    why = "the source's own codes go on as they are" if held.levels else f"{job.level} has no codes to choose"
    raise UserError(f"{named}: {why} (leave --effort and --calibrate out)")


def expected(job: Job, asked: Calibration) -> dict[str, Any]:
    """What a run would do and take, as `Result.calibration` has it: seconds, and bytes of memory and disk. Raises
    `UserError` for a text that is none."""
    found = calibrate.expected(job.source, asked.settings, job.planned)
    held = job.source.held.levels
    codes = [p.name for p in job.planned if p.level in GROUPS and not kept(held.get(p.name), p.level)]
    return {
        "effort": asked.settings.effort, "text": found.text, "tokens": found.tokens, "rounded": len(codes),
        "seconds": round(found.seconds, 1), "memory_bytes": found.memory, "disk_bytes": found.disk,
        "folder": str(folder(job, asked)),
    }  # fmt: skip


def folder(job: Job, asked: Calibration) -> Path:
    """Where the work lies: the same for the same command."""
    if asked.work is not None:
        return asked.work
    s = asked.settings
    text = s.text if s.text == STDLIB else str(Path(s.text).resolve())
    told = [
        str(job.source.path.resolve()), [str(a.resolve()) for a in job.adapters], job.recipe.to_dict(),
        s.effort, text, sorted(t.backend.name for t in job.targets),
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    return job.targets[0].path.parent / f".{job.source.name}.{name}.calibration"


@contextmanager
def resumable(where: Path) -> Iterator[None]:
    """Whatever ends it early says what is kept, and how to go on."""
    try:
        yield
    except BaseException as e:
        if (where / KEY).is_file():
            e.add_note(f"what is calibrated already is kept in {where}: the same command goes on from there")
        raise


def run(job: Job, asked: Calibration, where: Path, progress: Progress) -> Job:
    """The job with the levels that the measured gains allocate, its source with the rounding. Raises `UserError`."""
    rounding = calibrate.calibrate(job.source, job.recipe, asked.settings, where, progress, job.plan)
    job.source.attach(rounding)
    return job.with_plan(rounding.planned(job.source.spec))


def drop(where: Path, asked: Calibration) -> None:
    """Delete the work, unless it was to stay."""
    if asked.work is None:
        shutil.rmtree(where, ignore_errors=True)


def told(rounding: Rounding) -> dict[str, Any]:
    """The receipt's word on it; names are folded together, as there may be many thousands."""
    folded = {key: _folded(names) for key in REACHED if (names := rounding.record.get(key))}
    return {k: v for k, v in rounding.record.items() if k not in REACHED} | folded


def _folded(names: list[str]) -> str:
    text = collapse(names)
    return text if len(text) <= LONGEST else f"{text[:LONGEST].rsplit(', ', 1)[0]} and others ({len(names)} in all)"


def notes(rounding: Rounding) -> list[str]:
    """What a user should know: what the text never reached. (Native types have a note of their own.)"""
    names = told(rounding).get("untouched")
    return [f"not reached by the calibration text, rounded by the plain search: {names}"] if names else []
