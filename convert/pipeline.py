"""One conversion from beginning to end: check, read, round, write, verify, and only then the name."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backends
from backends.base import Backend, ContentHash, Planned, Support
from backends.threads import share_cores
from convert import card, output, recipe, stream
from convert import receipt as receipts
from convert.levels import LEVELS, check
from convert.sources import Source, open_source
from spec.config import Spec
from spec.errors import UserError

if TYPE_CHECKING:
    from convert.verify import Check, Report

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage (`convert`, or a check's name) and bytes of the source done and in all."""


class VerificationFailed(Exception):
    """The artifact did not pass and was deleted; `report` says what differed."""

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__("; ".join(f"{c.name}: {c.reason}" for c in report.failures) or "nothing could be checked")


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
    """Bits per weight over all matrices, scales counted."""
    levels: dict[str, int]
    """Tensors at each level."""
    size: int
    """Bytes of the artifact (a dry run: expected)."""
    memory: int
    """Bytes that row blocks take at most."""
    seconds: float = 0.0
    """Reading, rounding and writing (a dry run: expected, from one block)."""
    notes: list[str] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)
    report: Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "out": str(self.out),
            "backend": self.backend,
            "carrier": self.support.carrier,
            "folds": list(self.support.folds),
            "level": self.level,
            "weights": self.weights,
            "bits_per_weight": round(self.bits, 4),
            "levels": self.levels,
            "bytes": self.size,
            "block_memory_bytes": self.memory,
            "seconds": round(self.seconds, 3),
            "notes": self.notes,
            "receipt": self.receipt or None,
            "report": self.report.to_dict() if self.report else None,
        }


@dataclass(frozen=True)
class Job:
    """A conversion that passed every check that needs no weights."""

    source: Source
    backend: Backend
    build: Any
    support: Support
    level: str
    planned: tuple[Planned, ...]
    threads: int


def convert(
    source: str | Path,
    target: str,
    level: str,
    out: str | Path | None = None,
    *,
    verify: bool = True,
    force: bool = False,
    check: bool = False,
    threads: int | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
    on_check: Callable[[Check], None] | None = None,
) -> Result:
    """Convert a checkpoint.

    source: our checkpoint folder or a Hugging Face folder. target: a backend. level: a portable level or one of the
    backend's own. out: by default the source's name, level and the backend's suffix in the working directory.
    check: refuse what a real run would refuse, estimate, write nothing. text: what the quality check reads.

    An existing `out` is replaced only with `force`, and only by a whole, verified artifact. Raises `UserError` for
    what the user can fix and `VerificationFailed`; either way, and on Ctrl-C, nothing partial is left behind.
    """
    share_cores()
    job = _prepare(source, target, level, threads)
    with job.source:
        path = Path(out) if out is not None else _default_out(job)
        output.check(path, job.backend.suffix, force)
        result = _expected(job, path)
        output.check_space(path, result.size)
        if text is not None and not Path(text).is_file():
            raise UserError(f"--text {text}: no such file")
        if check:
            result.seconds = _estimate(job)
            return result
        beside = (receipts.beside(path), card.beside(path))
        with output.reserved(path, *beside) as partial:
            started = time.perf_counter()
            result.receipt = _write(job, partial, progress or (lambda *_: None))
            result.seconds, result.size = time.perf_counter() - started, partial.stat().st_size
            if verify:
                result.report = _verify(job, partial, path, text, on_check)
            result.receipt["parity"] = receipts.parity(result.report)
            job.build.stamp(partial, result.receipt)
            texts = _described(result)
            staged = [output.staged(name, text) for name, text in zip(beside, texts, strict=True)]
            output.publish(partial, path)
            for whole, name in zip(staged, beside, strict=True):
                output.publish(whole, name)
    return result


def _target(name: str) -> Backend:
    backend = backends.get(name)
    if importlib.util.find_spec(f"{backend.module}.build") is None:
        targets = [b.name for b in backends.REGISTRY if importlib.util.find_spec(f"{b.module}.build") is not None]
        raise UserError(f"--to {name}: nothing is converted to it (targets: {', '.join(targets)})")
    return backend


def _prepare(source: str | Path, target: str, level: str, threads: int | None) -> Job:
    """Everything that can be refused before a weight is read."""
    backend = _target(target)
    support = backends.part(backend, "support")
    level = check(level, support.levels())
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: must be at least 1")
    opened = open_source(source)
    try:
        verdict: Support = support.support(opened.spec, level)
        if not verdict.ok:
            raise UserError("\n".join(f"{target}: {r}" for r in verdict.refusals))
        build = backends.part(backend, "build")
        if level in LEVELS:
            planned = recipe.plan(opened.spec, level)
        else:
            native = build.recipe(opened.spec, level)
            planned = [Planned(n, opened.shape(n), native[n]) for n in opened.names()]
    except BaseException:
        opened.close()
        raise
    return Job(opened, backend, build, verdict, level, tuple(planned), threads or _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_out(job: Job) -> Path:
    return Path(f"{job.source.path.resolve().name}.{job.level}{job.backend.suffix}")


def _expected(job: Job, path: Path) -> Result:
    source, spec = job.source, job.source.spec
    size = job.build.size(spec, job.planned, source.tokenizer)
    stored = {p.level: backends.part(job.backend, "support").bits(p.level) for p in job.planned}
    largest = max(source.rows(p.name) * (p.shape[-1] if len(p.shape) > 1 else 1) for p in job.planned)
    notes = [*source.notes, *job.support.notes, *recipe.notes(spec, job.planned, job.level)]
    return Result(
        out=path,
        backend=job.backend.name,
        level=job.level,
        spec=spec,
        support=job.support,
        weights=source.weights,
        bits=recipe.bits_per_weight(job.planned, stored),
        levels=dict(sorted(Counter(p.level for p in job.planned).items())),
        size=size,
        # float32 blocks read ahead and in work (with their codes), and the one being packed
        memory=largest * (4 * (stream.READ_AHEAD + 2) + 8 * (job.threads + 1)),
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
        job.build.pack(block, largest.level)
    ended = time.perf_counter()
    return (read - started + (ended - read) / job.threads) * job.source.weights / block.size


def _write(job: Job, partial: Path, progress: Progress) -> dict[str, Any]:
    """The one pass over the weights. Returns the receipt."""
    metadata = {"quantized_by": "allotrope", "source.weights": job.source.weights}
    writer = job.build.writer(
        job.source.spec, job.planned, job.source.tokenizer, partial, metadata=metadata, threads=job.threads
    )
    try:
        blocks = stream.Stream(job.source, job.planned, job.threads)
        hashes: dict[str, str] = {}
        done, total = 0, job.source.weights
        for name, group in itertools.groupby(blocks, key=lambda b: b.name):
            digest = ContentHash()
            for block in group:
                digest.update(block.values)
                writer.write(name, block.start, block.values)
                done += block.weights
                progress("convert", job.source.nbytes * done // total, job.source.nbytes)
            if blocks.levels[name] in LEVELS:  # what a native level stores only its backend knows
                hashes[name] = digest.hexdigest()
        receipt = receipts.receipt(job.source, job.support, job.level, job.planned, blocks.hashes, hashes)
        writer.close(receipt)
    except BaseException as e:
        writer.abort()
        if isinstance(e, OSError):
            raise UserError(f"{partial}: {e.strerror or e}") from None
        raise
    return receipt


def _verify(
    job: Job, partial: Path, out: Path, text: str | Path | None, on_check: Callable[[Check], None] | None
) -> Report:
    from convert.verify import verify

    report = verify(partial, job.backend.name, job.source.path, job.level, text, threads=job.threads, on_check=on_check)
    report.artifact = str(out)
    if not report.ok:
        raise VerificationFailed(report)
    return report


def _described(result: Result) -> tuple[str, str]:
    """The sidecar, which is the receipt with the whole report, and the model card."""
    report = result.report.to_dict() if result.report else None
    text = json.dumps({**result.receipt, "report": report}, indent=1, sort_keys=True) + "\n"
    return text, card.card(result, result.receipt, result.report)
