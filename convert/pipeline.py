"""One conversion from beginning to end: check, read, round, write, verify, and only then the name."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backends
from backends import folder
from backends.base import ContentHash, Support, Writer
from backends.threads import share_cores
from convert import calibrated, card, importance, output, recipe, stream
from convert import receipt as receipts
from convert.levels import LEVELS
from convert.prepare import Job, Target, check_here, prepare, takes_importance
from convert.provenance import Provenance, provenance
from convert.push import Push
from convert.recipe import Recipe
from spec.config import Spec
from spec.errors import UserError

if TYPE_CHECKING:
    from convert.verify import Check, Report

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage and how much of it is done and in all: bytes of the source for `convert`, layers for those of a
calibration."""


class VerificationFailed(Exception):
    """The artifact did not pass and was deleted; `report` says what differed."""

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(report.summary)


@dataclass
class Result:
    """What a conversion made, or would make."""

    out: Path
    backend: str
    level: str
    spec: Spec
    support: Support
    weights: int
    bits: float
    """Bits per weight over all matrices, scales counted, as the level plans them."""
    levels: dict[str, int]
    """Tensors at each level."""
    size: int
    """Bytes of the artifact (a dry run: expected)."""
    memory: int
    """Bytes that row blocks take at most."""
    seconds: float = 0.0
    """Reading, rounding and writing (a dry run: expected, from one block), which all targets share."""
    file_bits: float | None = None
    """Bits on disk for each weight: containers that store a bias or a float32 scale with every group take more."""
    options: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    """What was asked for beside the level."""
    calibration: dict[str, Any] | None = None
    """What a text had a part in (a dry run: what it would have, and what that takes)."""
    calibrating: float = 0.0
    """Seconds that a calibration took."""
    notes: list[str] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)
    report: Report | None = None
    pushed: str | None = None
    """Where it was uploaded (a dry run: what would be)."""

    @property
    def failed(self) -> bool:
        """Whether it was kept back, because a check failed."""
        return self.report is not None and not self.report.ok

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "ok": not self.failed,
            "out": str(self.out),
            "backend": self.backend,
            "carrier": self.support.carrier,
            "folds": list(self.support.folds),
            "level": self.level,
            "options": self.options,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "calibration_seconds": round(self.calibrating, 3),
            "weights": self.weights,
            "bits_per_weight": round(self.bits, 4),
            "bits_per_weight_on_disk": None if self.file_bits is None else round(self.file_bits, 4),
            "levels": self.levels,
            "bytes": self.size,
            "block_memory_bytes": self.memory,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
            "pushed": self.pushed,
            "receipt": self.receipt or None,
            "report": self.report.to_dict() if self.report else None,
        }


def convert(
    source: str | Path, target: str, level: Recipe | str | None, out: str | Path | None = None, **settings: Any
) -> Result:
    """`convert_all` for one target. Raises `VerificationFailed` where the artifact is kept back."""
    (result,) = convert_all(source, [target], level, out, **settings)
    if result.failed:
        assert result.report is not None
        raise VerificationFailed(result.report)
    return result


def convert_all(
    source: str | Path,
    targets: Sequence[str],
    level: Recipe | str | None,
    out: str | Path | None = None,
    *,
    effort: str | None = None,
    calibrate: str | Path | None = None,
    work: str | Path | None = None,
    device: str | None = None,
    imatrix: str | Path | None = None,
    imatrix_out: str | Path | None = None,
    options: Mapping[str, str] | None = None,
    adapters: Sequence[str | Path] = (),
    push: Push | None = None,
    verify: bool = True,
    force: bool = False,
    check: bool = False,
    threads: int | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
    on_check: Callable[[str, Check], None] | None = None,
) -> list[Result]:
    """Convert a checkpoint to one or several targets in one pass over the weights, each tensor rounded once.

    source: our checkpoint folder, a Hugging Face folder, a GGUF file, or hf:owner/name[@revision]. targets: backends.
    level: a portable level, or one that is the target's own, where there is one target, or a whole `Recipe`; none: what
    the checkpoint was trained for, else q4. out: the artifact, or with several targets the folder they go into; by
    default named after source, level and backend in the working directory. effort: `fast`, or `good` or `best`, which
    run the model on the text that `calibrate` names (a file, a folder, `stdlib`), on a `device`. work: the folder of
    what they measure, which is kept then. imatrix: llama.cpp's file of what the inputs of matrices count, for its own
    types; imatrix_out: where to write one. options: the backends' own (`support.OPTIONS`), each for those targets that
    have it. adapters: LoRA adapters to merge into the weights. push: where to upload everything once it passed. check:
    refuse what a real run would refuse, estimate, write nothing. text: what the quality check reads. on_check: called
    with the backend and each check as it ends.

    An existing artifact is replaced only with `force`, and only by a whole, verified one. One that fails its
    verification is kept back (`Result.failed`), and the others appear. Raises `UserError` for what the user can fix,
    and then nothing is written; either way, and on Ctrl-C, nothing partial is left behind but what a calibration has
    whole, and a note of the exception says where.
    """
    share_cores()
    asked = calibrated.wanted(effort, calibrate, work, device, threads)
    if push is not None:
        push.check()
        if not verify:
            raise UserError(f"--push {push.repo}: only what was verified is uploaded (leave --no-verify out)")
        if not check:
            push.ready()
    importance.check_files(asked, imatrix, imatrix_out, force)
    job = prepare(source, targets, level, out, options or {}, threads, adapters, asked is not None, imatrix)
    with job.source, ExitStack() as stack:
        known = provenance(job.source)
        if not check:
            check_here(job.targets, verify)
        for t in job.targets:
            output.check(t.path, t.backend, force)
        results = [_expected(job, t) for t in job.targets]
        for t, result in zip(job.targets, results, strict=True):
            output.check_space(t.path, sum(r.size for r in results if r.out.parent == result.out.parent))
        if text is not None:
            _check_text(text)
        if asked is not None:
            calibrated.check(job, asked)
        importance.check_importance(job, imatrix, imatrix_out)
        if check:
            seconds = _estimate(job)
            planned = None if asked is None else calibrated.expected(job, asked)
            for result in results:
                result.seconds, result.calibration = seconds, planned
                if push is not None:
                    result.pushed = push.expected(results, [t.backend for t in job.targets], known)
            return results
        partials = [stack.enter_context(output.reserved(t.path, *_beside(t))) for t in job.targets]
        report = progress or (lambda *_: None)
        where = None
        if asked is not None:
            where = calibrated.folder(job, asked)
            stack.enter_context(calibrated.resumable(where))
            started = time.perf_counter()
            job = calibrated.run(job, asked, where, report)
            results = [_expected(job, t) for t in job.targets]
            for result in results:
                result.calibrating = time.perf_counter() - started
        started = time.perf_counter()
        receipts_ = _write(job, partials, report)
        seconds = time.perf_counter() - started
        for t, partial, result, receipt in zip(job.targets, partials, results, receipts_, strict=True):
            result.receipt, result.seconds, result.size = receipt, seconds, output.size_of(partial)
            result.file_bits = output.weight_bits(partial, t.backend.name, result.weights)
            if verify:
                result.report = _verify(job, t, partial, text, on_check, where)
        for t, partial, result in zip(job.targets, partials, results, strict=True):
            if not result.failed:
                _finish(t, partial, result, known)
        whole = not any(r.failed for r in results)
        if push is not None and whole:
            address = push(results, [t.backend for t in job.targets], known)
            for result in results:
                result.pushed = address
        if asked is not None and where is not None:
            if whole and imatrix_out is not None:
                results[0].notes.append(importance.written(job, imatrix_out))
            if whole:
                calibrated.drop(where, asked)
            else:
                results[0].notes.append(f"what was calibrated is kept in {where}")
    return results


def _check_text(text: str | Path) -> None:
    """What `--text` names can be read: now, not after the conversion."""
    from convert.verify.sample import read_text

    if not Path(text).is_file():
        raise UserError(f"--text {text}: no such file")
    try:
        read_text(text)
    except UserError as e:
        raise UserError(f"--text {e}") from None


def _finish(t: Target, partial: Path, result: Result, known: Provenance) -> None:
    """The receipt with what was measured, the card, the licence, and the name."""
    result.receipt["parity"] = receipts.parity(result.report)
    report = result.report.to_dict() if result.report else None
    described = card.card(result, t.backend, result.receipt, result.report, known)
    beside = _beside(t)
    try:
        t.build.stamp(partial, result.receipt)
        if not beside:
            folder.stamp(partial, result.receipt, report)
            (partial / card.INSIDE).write_text(described, encoding="utf-8")
            for licence in known.licences:
                (partial / licence.name).write_bytes(licence.read_bytes())
    except OSError as e:
        raise UserError(f"{e.filename or t.path}: {e.strerror or e}") from None
    if not beside:
        output.publish(partial, t.path)
        return
    sidecar = json.dumps({**result.receipt, "report": report}, indent=1, sort_keys=True) + "\n"
    staged = [output.staged(name, text) for name, text in zip(beside, (sidecar, described), strict=True)]
    output.publish(partial, t.path)
    for whole, name in zip(staged, beside, strict=True):
        output.publish(whole, name)


def _beside(t: Target) -> tuple[Path, ...]:
    """Where receipt, report and card go: beside an artifact that has a suffix, else into the folder itself."""
    return (output.receipt_beside(t.path), card.beside(t.path)) if t.backend.suffix else ()


def _expected(job: Job, t: Target) -> Result:
    source, spec, rounding = job.source, job.source.spec, job.source.rounding
    bits = backends.part(t.backend, "support").bits
    largest = max(source.rows(p.name) * (p.shape[-1] if len(p.shape) > 1 else 1) for p in job.planned)
    notes = [*source.notes, *t.support.notes, *recipe.notes(spec, job.planned, job.recipe, bits, source.held)]
    notes += [] if rounding is None else calibrated.notes(rounding)
    notes += importance.unmeasured(job)
    return Result(
        out=t.path,
        backend=t.backend.name,
        level=job.level,
        spec=spec,
        support=t.support,
        weights=source.weights,
        bits=recipe.bits_per_weight(job.planned, bits),
        levels=dict(sorted(Counter(p.level for p in job.planned).items())),
        size=t.size,
        # float32 blocks read ahead and in work (with their codes), and the one being packed
        memory=largest * (4 * (stream.READ_AHEAD + 2) + 8 * (job.threads + 1)),
        options={k: v for k, v in t.options.items() if v},
        recipe={k: v for k, v in job.recipe.to_dict().items() if k != "level"},
        calibration=None if rounding is None else calibrated.told(rounding),
        notes=list(dict.fromkeys(notes)),
    )


def _estimate(job: Job) -> float:
    """Seconds for the whole, from the first rows of the largest matrix: read, hashed and rounded once."""
    largest = max(job.planned, key=lambda p: p.shape[-1] * p.shape[0] if len(p.shape) > 1 else 0)
    rows = max(1, min(largest.shape[0], (1 << 19) // largest.shape[-1]))
    started = time.perf_counter()
    start, block = next(job.source.blocks(largest.name, rows))
    ContentHash().update(block)
    read = time.perf_counter()
    stream.rounded(largest.name, largest.level, start, block)
    if largest.level not in LEVELS:
        (t,) = job.targets
        even = {"importance": t.build.even(block.shape[-1])} if takes_importance(t.backend) else {}
        t.build.pack(block, largest.level, **even)
    ended = time.perf_counter()
    return (read - started + (ended - read) / job.threads) * job.source.weights / block.size


def _write(job: Job, partials: Sequence[Path], progress: Progress) -> list[dict[str, Any]]:
    """The one pass over the weights, which every target's writer sees. Returns the receipts."""
    metadata = {"quantized_by": "allotrope", "source.weights": job.source.weights}
    writers: list[Writer] = []
    try:
        for t, partial in zip(job.targets, partials, strict=True):
            make = t.build.writer
            also: dict[str, Any] = {}
            if job.source.importance is not None and takes_importance(t.backend):
                make = bound(make, importance=job.source.importance.means)
                also = importance.metadata(job)
            writers.append(make(job.source.spec, job.planned, job.source.tokenizer, partial, level=job.level,
                                metadata=metadata | also, threads=job.threads, **t.options))  # fmt: skip
        blocks = stream.Stream(job.source, job.planned, job.threads)
        hashes: dict[str, str] = {}
        done, total = 0, job.source.weights
        for name, group in itertools.groupby(blocks, key=lambda b: b.name):
            digest = ContentHash()
            for block in group:
                digest.update(block.values)
                for w in writers:
                    w.write(name, block.start, block.values)
                done += block.weights
                progress("convert", job.source.nbytes * done // total, job.source.nbytes)
            if blocks.levels[name] in LEVELS:  # what a native level stores only its backend knows
                hashes[name] = digest.hexdigest()
        out = []
        for t, w in zip(job.targets, writers, strict=True):
            made = receipts.receipt(job.source, t.backend, t.support, job.recipe, t.options, job.planned,
                                    blocks.hashes, hashes, getattr(w, "hashes", {}))  # fmt: skip
            w.close(made)
            out.append(made)
    except BaseException as e:
        for w in writers:
            w.abort()
        if isinstance(e, OSError):
            raise UserError(f"{e.filename or partials[0]}: {e.strerror or e}") from None
        raise
    return out


def _verify(
    job: Job,
    t: Target,
    partial: Path,
    text: str | Path | None,
    on_check: Callable[[str, Check], None] | None,
    rounding: Path | None,
) -> Report:
    from convert.verify import verify

    name = t.backend.name
    told = None if on_check is None else bound(on_check, name)
    report = verify(
        partial, name, job.source.path, job.level, text, adapters=job.adapters, rounding=rounding,
        imatrix=importance.file_of(job.source), threads=job.threads, on_check=told,
    )  # fmt: skip
    report.artifact = str(t.path)
    return report
