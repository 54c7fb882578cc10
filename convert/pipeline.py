"""One conversion from beginning to end: check, read, round, write, verify, and only then the name."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial as bound
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backends
from backends import folder
from backends.base import Backend, ContentHash, Option, Planned, Support, Writer
from backends.threads import share_cores
from convert import card, levels, output, recipe, stream
from convert import receipt as receipts
from convert.hub import located
from convert.levels import LEVELS
from convert.provenance import Provenance, provenance
from convert.push import Push
from convert.sources import Source, open_source
from spec.config import Spec
from spec.errors import MissingDependency, UserError, nearest

if TYPE_CHECKING:
    from convert.verify import Check, Report

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage (`convert`, or a check's name) and bytes of the source done and in all."""


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


@dataclass(frozen=True)
class Target:
    """One artifact of a conversion."""

    backend: Backend
    build: Any
    support: Support
    options: dict[str, str]
    path: Path
    size: int
    """Bytes, as expected."""


@dataclass(frozen=True)
class Job:
    """A conversion that passed every check that needs no weights."""

    source: Source
    adapters: tuple[Path, ...]
    targets: tuple[Target, ...]
    level: str
    planned: tuple[Planned, ...]
    threads: int


def convert(source: str | Path, target: str, level: str, out: str | Path | None = None, **settings: Any) -> Result:
    """`convert_all` for one target. Raises `VerificationFailed` where the artifact is kept back."""
    (result,) = convert_all(source, [target], level, out, **settings)
    if result.failed:
        assert result.report is not None
        raise VerificationFailed(result.report)
    return result


def convert_all(
    source: str | Path,
    targets: Sequence[str],
    level: str,
    out: str | Path | None = None,
    *,
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
    level: a portable level, or one that is the target's own, where there is one target. out: the artifact, or with
    several targets the folder they go into; by default named after source, level and backend in the working directory.
    options: the backends' own (`support.OPTIONS`), each for those targets that have it. adapters: LoRA adapters to
    merge into the weights. push: where to upload everything once it passed. check: refuse what a real run would refuse,
    estimate, write nothing. text: what the quality check reads. on_check: called with the backend and each check as it
    ends.

    An existing artifact is replaced only with `force`, and only by a whole, verified one. One that fails its
    verification is kept back (`Result.failed`), and the others appear. Raises `UserError` for what the user can fix,
    and then nothing is written; either way, and on Ctrl-C, nothing partial is left behind.
    """
    share_cores()
    if push is not None:
        push.check()
        if not verify:
            raise UserError(f"--push {push.repo}: only what was verified is uploaded (leave --no-verify out)")
        if not check:
            push.ready()
    job = _prepare(source, targets, level, out, options or {}, threads, adapters)
    with job.source:
        known = provenance(job.source)
        if not check:
            _check_here(job.targets, verify)
        for t in job.targets:
            output.check(t.path, t.backend, force)
        results = [_expected(job, t) for t in job.targets]
        for t, result in zip(job.targets, results, strict=True):
            output.check_space(t.path, sum(r.size for r in results if r.out.parent == result.out.parent))
        if text is not None:
            _check_text(text)
        if check:
            seconds = _estimate(job)
            for result in results:
                result.seconds = seconds
                if push is not None:
                    result.pushed = push.expected(results, [t.backend for t in job.targets], known)
            return results
        with ExitStack() as stack:
            partials = [stack.enter_context(output.reserved(t.path, *_beside(t))) for t in job.targets]
            started = time.perf_counter()
            receipts_ = _write(job, partials, progress or (lambda *_: None))
            seconds = time.perf_counter() - started
            for t, partial, result, receipt in zip(job.targets, partials, results, receipts_, strict=True):
                result.receipt, result.seconds, result.size = receipt, seconds, output.size_of(partial)
                result.file_bits = output.weight_bits(partial, t.backend.name, result.weights)
                if verify:
                    result.report = _verify(job, t, partial, text, on_check)
            for t, partial, result in zip(job.targets, partials, results, strict=True):
                if not result.failed:
                    _finish(t, partial, result, known)
        if push is not None and not any(r.failed for r in results):
            address = push(results, [t.backend for t in job.targets], known)
            for result in results:
                result.pushed = address
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


def _backends(names: Sequence[str]) -> list[Backend]:
    known = [b.name for b in backends.REGISTRY if backends.has(b, "build")]
    for name in names:
        if name not in known:
            raise UserError(f"--to {name}: nothing is converted to it ({nearest(name, known)})")
    out = [backends.get(name) for name in dict.fromkeys(names)]
    if not out:
        raise UserError(f"--to: names no target (targets: {', '.join(known)})")
    return out


def _options(chosen: Sequence[Backend], options: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Every target's options, defaults filled in. Raises `UserError`."""
    known = {b.name: {o.name: o for o in _declared(b)} for b in chosen}
    for name, value in options.items():
        having = [b for b in known if name in known[b]]
        if not having:
            others = [b.name for b in backends.REGISTRY if any(o.name == name for o in _declared(b))]
            raise UserError(f"--{name} {value}: no option of {', '.join(known)} (it is one of {', '.join(others)})")
        for b in having:
            choices = known[b][name].choices
            if value not in choices:
                raise UserError(f"--{name} {value}: {b} has no such choice ({nearest(value, choices)})")
    return {b: {name: options.get(name, o.default) for name, o in known[b].items()} for b in known}


def _declared(backend: Backend) -> tuple[Option, ...]:
    return getattr(backends.part(backend, "support"), "OPTIONS", ()) if backends.has(backend, "support") else ()


def _check_here(targets: Sequence[Target], verify: bool) -> None:
    """What building needs, and verification, which runs the artifact, is here before any work. Raises `UserError`."""
    for t in targets:
        b, ready = t.backend, getattr(t.build, "ready", None)
        if ready is not None:
            ready()
        absent = backends.missing(b) if verify else []
        if absent:
            raise MissingDependency(
                f"--to {b.name}: verification runs the artifact, which needs {', '.join(absent)}: "
                f"pip install 'allotrope[{b.extra}]' (or --no-verify)"
            )


def _prepare(
    source: str | Path,
    names: Sequence[str],
    level: str,
    out: str | Path | None,
    options: Mapping[str, str],
    threads: int | None,
    adapters: Sequence[str | Path],
) -> Job:
    """Everything that can be refused before a weight is read."""
    chosen = _backends(names)
    given = _options(chosen, options)
    supports = {b.name: backends.part(b, "support") for b in chosen}
    if len(chosen) > 1 and level.lower() not in LEVELS:
        own = [b.name for b in chosen if level.lower() in supports[b.name].levels()]
        if own:
            raise UserError(f"--quant {level}: a type of {' and '.join(own)} alone, converted to one target at a time "
                            f"(for several targets: {', '.join(LEVELS)})")  # fmt: skip
    for b in chosen:
        level = levels.check(level, supports[b.name].levels(), b.name if len(chosen) > 1 else "")
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: must be at least 1")
    folders = tuple(located(a) for a in adapters)
    opened = open_source(source, folders)
    try:
        builds = {b.name: backends.part(b, "build") for b in chosen}
        refused: dict[str, str] = {}
        verdicts: dict[str, Support] = {}
        for b in chosen:
            try:
                given[b.name], verdicts[b.name] = _settled(b, builds[b.name], opened, level, given[b.name], options)
            except UserError as e:
                refused[b.name] = str(e)
        if len(refused) == len(chosen):
            raise UserError("\n".join(refused.values()))
        if level in LEVELS:
            planned = recipe.plan(opened.spec, level, opened.held)
        else:
            native = builds[chosen[0].name].recipe(opened.spec, level)
            planned = [Planned(n, opened.shape(n), native[n]) for n in opened.names()]
        stem, targets = f"{opened.name}.{level}", []
        for b in chosen:
            try:
                if b.name not in refused:
                    _check_scales(b, given[b.name], planned)
                    size = _size(b, builds[b.name], opened, planned, given[b.name])
                    path = _path(b, stem, out, len(chosen) > 1)
                    targets.append(Target(b, builds[b.name], verdicts[b.name], given[b.name], path, size))
            except UserError as e:
                refused[b.name] = str(e)
        if refused:
            hint = f"leave {', '.join(refused)} out: --to {','.join(t.backend.name for t in targets)}"
            raise UserError("\n".join([*(refused[b.name] for b in chosen if b.name in refused),
                                       *([hint] if targets else [])]))  # fmt: skip
    except BaseException:
        opened.close()
        raise
    return Job(opened, folders, tuple(targets), level, tuple(planned), threads or _cores())


def _settled(
    b: Backend, build: Any, source: Source, level: str, given: dict[str, str], asked: Mapping[str, str]
) -> tuple[dict[str, str], Support]:
    """A target's options, and how it carries the source with them: back to where it came from, where that works and
    nothing else was asked for. Raises `UserError`, a line for each refusal."""
    support = backends.part(b, "support").support
    settle = getattr(build, "settled", lambda spec, tokenizer, **options: (options, []))
    own = given | {n: v for n, v in source.choices.get(b.name, {}).items() if n not in asked}
    if own != given and support(source.spec, level, **own).ok:
        given = own
    with _named(b):
        settled, notes = settle(source.spec, source.tokenizer, **given)
    verdict: Support = support(source.spec, level, **settled)
    if verdict.refusals:
        raise UserError("\n".join(f"{b.name}: {r}" for r in verdict.refusals))
    return settled, replace(verdict, notes=(*notes, *verdict.notes))


def _size(b: Backend, build: Any, source: Source, planned: Sequence[Planned], options: Mapping[str, str]) -> int:
    """Bytes of an artifact. Raises `UserError` for a tokenizer that the target has no form for."""
    with _named(b):
        return build.size(source.spec, planned, source.tokenizer, **options)


@contextmanager
def _named(b: Backend) -> Iterator[None]:
    """What a backend refuses, with its name before every line."""
    try:
        yield
    except MissingDependency:
        raise
    except UserError as e:
        raise UserError("\n".join(f"{b.name}: {line}" for line in str(e).splitlines())) from None


def _check_scales(b: Backend, given: Mapping[str, str], planned: Sequence[Planned]) -> None:
    """Scales that a source brings with it go into every target that holds any float16."""
    wide = [p for p in planned if p.wide]
    if not wide:
        return
    signed = next((p.name for p in wide if p.level == "q4"), None)
    if given.get("compute") == "bf16":
        raise UserError(f"--compute bf16: {wide[0].name} keeps the scales of the source ({len(wide)} tensors do), "
                        f"which are float16 and which {b.name} would round (use f16, or --quant bf16)")  # fmt: skip
    if b.name == "tensorrt" and signed is not None:
        raise UserError(f"--to tensorrt: {signed} keeps the scales of the source, half of which are negative, and "
                        "TensorRT takes positive ones (use --quant f16)")  # fmt: skip


def _path(backend: Backend, stem: str, out: str | Path | None, several: bool) -> Path:
    """The artifact's path: tiny.q4.gguf, tiny.q4.mlpackage, tiny.q4-mlx."""
    if out is not None and not several:
        return Path(out)
    where = Path(out) if out is not None else Path()
    return where / (f"{stem}{backend.suffix}" if backend.suffix else f"{stem}-{backend.name}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _expected(job: Job, t: Target) -> Result:
    source, spec = job.source, job.source.spec
    support = backends.part(t.backend, "support")
    largest = max(source.rows(p.name) * (p.shape[-1] if len(p.shape) > 1 else 1) for p in job.planned)
    notes = [*source.notes, *t.support.notes, *recipe.notes(spec, job.planned, job.level)]
    return Result(
        out=t.path,
        backend=t.backend.name,
        level=job.level,
        spec=spec,
        support=t.support,
        weights=source.weights,
        bits=recipe.bits_per_weight(job.planned, support.bits),
        levels=dict(sorted(Counter(p.level for p in job.planned).items())),
        size=t.size,
        # float32 blocks read ahead and in work (with their codes), and the one being packed
        memory=largest * (4 * (stream.READ_AHEAD + 2) + 8 * (job.threads + 1)),
        options={k: v for k, v in t.options.items() if v},
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
        job.targets[0].build.pack(block, largest.level)
    ended = time.perf_counter()
    return (read - started + (ended - read) / job.threads) * job.source.weights / block.size


def _write(job: Job, partials: Sequence[Path], progress: Progress) -> list[dict[str, Any]]:
    """The one pass over the weights, which every target's writer sees. Returns the receipts."""
    metadata = {"quantized_by": "allotrope", "source.weights": job.source.weights}
    writers: list[Writer] = []
    try:
        for t, partial in zip(job.targets, partials, strict=True):
            make = t.build.writer
            writers.append(make(job.source.spec, job.planned, job.source.tokenizer, partial, level=job.level,
                                metadata=metadata, threads=job.threads, **t.options))  # fmt: skip
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
            made = receipts.receipt(job.source, t.backend, t.support, job.level, t.options, job.planned,
                                    blocks.hashes, hashes)  # fmt: skip
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
    job: Job, t: Target, partial: Path, text: str | Path | None, on_check: Callable[[str, Check], None] | None
) -> Report:
    from convert.verify import verify

    name = t.backend.name
    told = None if on_check is None else bound(on_check, name)
    report = verify(
        partial, name, job.source.path, job.level, text, adapters=job.adapters, threads=job.threads, on_check=told
    )
    report.artifact = str(t.path)
    return report
