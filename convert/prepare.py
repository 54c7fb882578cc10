"""Everything about a conversion that can be refused before a weight is read: targets, options, levels, sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import backends
from backends.base import Backend, Option, Planned, Support
from convert import levels, recipe
from convert.hub import located
from convert.levels import GROUPS, LEVELS
from convert.recipe import Gains, Native, Recipe
from convert.sources import Source, open_source
from spec.errors import MissingDependency, UserError, nearest

DEFAULT = "q4"
"""The level where neither the user nor the checkpoint names one."""


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
    recipe: Recipe
    native: Native | None
    """The own types of the one target, where it has some."""
    planned: tuple[Planned, ...]
    threads: int

    @property
    def level(self) -> str:
        """What the artifacts are called after."""
        return self.recipe.level

    def plan(self, gains: Gains | None = None) -> list[Planned]:
        """Every tensor's level; `gains` where sensitivity was measured. Raises `UserError`."""
        chosen = [(t.backend, t.build, t.options) for t in self.targets]
        return _planned(self.source, self.recipe, chosen, self.native, gains)

    def with_plan(self, planned: Sequence[Planned]) -> Job:
        """The same with other levels."""
        sizes = (_size(t.backend, t.build, self.source, planned, t.options) for t in self.targets)
        targets = (replace(t, size=size) for t, size in zip(self.targets, sizes, strict=True))
        return replace(self, planned=tuple(planned), targets=tuple(targets))


def prepare(
    source: str | Path,
    names: Sequence[str],
    asked: Recipe | str | None,
    out: str | Path | None,
    options: Mapping[str, str],
    threads: int | None,
    adapters: Sequence[str | Path],
    calibrated: bool = False,
    imatrix: str | Path | None = None,
) -> Job:
    """asked: none, or one without a level, is completed by what the checkpoint was trained for, else by q4. calibrated:
    a text will say what each input counts; imatrix: llama.cpp's file does. Raises `UserError` with everything that
    stands in the way."""
    chosen = _backends(names)
    given = _options(chosen, options)
    asked = Recipe("") if asked is None else Recipe(asked) if isinstance(asked, str) else asked
    if asked.level:
        asked = _known(asked, chosen)
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: must be at least 1")
    folders = tuple(located(a) for a in adapters)
    opened = open_source(source, folders, imatrix=imatrix)
    try:
        calibrated = calibrated or imatrix is not None
        if not asked.level:
            asked = _known(_joined(opened.held.recipe or Recipe(DEFAULT), asked), chosen)
        return _job(opened, folders, chosen, asked, given, options, out, threads or _cores(), calibrated)
    except BaseException:
        opened.close()
        raise


def _job(
    opened: Source,
    folders: tuple[Path, ...],
    chosen: Sequence[Backend],
    asked: Recipe,
    given: dict[str, dict[str, str]],
    options: Mapping[str, str],
    out: str | Path | None,
    threads: int,
    calibrated: bool,
) -> Job:
    builds = {b.name: backends.part(b, "build") for b in chosen}
    refused: dict[str, str] = {}
    verdicts: dict[str, Support] = {}
    for b in chosen:
        try:
            given[b.name], verdicts[b.name] = _settled(
                b, builds[b.name], opened, asked, given[b.name], options, calibrated
            )
        except UserError as e:
            refused[b.name] = str(e)
    if len(refused) == len(chosen):
        raise UserError("\n".join(refused.values()))
    native = _native(chosen[0], builds[chosen[0].name], opened, calibrated) if len(chosen) == 1 else None
    carried = [(b, builds[b.name], given[b.name]) for b in chosen if b.name not in refused]
    planned = _planned(opened, asked, carried, native, None)
    stem, targets = f"{opened.name}.{asked.level}", []
    for b, build, settled in carried:
        try:
            _check_scales(b, settled, planned)
            _check_joined(b, build, opened, asked.level, planned, settled)
            size = _size(b, build, opened, planned, settled)
            path = _path(b, stem, out, len(chosen) > 1)
            targets.append(Target(b, build, verdicts[b.name], settled, path, size))
        except UserError as e:
            refused[b.name] = str(e)
    if refused:
        hint = f"leave {', '.join(refused)} out: --to {','.join(t.backend.name for t in targets)}"
        raise UserError("\n".join([*(refused[b.name] for b in chosen if b.name in refused),
                                   *([hint] if targets else [])]))  # fmt: skip
    return Job(opened, folders, tuple(targets), asked, native, tuple(planned), threads)


def _joined(own: Recipe, asked: Recipe) -> Recipe:
    """What a checkpoint declares, with what is asked for besides."""
    budget = (asked.bits, asked.size) if asked.bits or asked.size else (own.bits, own.size)
    return Recipe(own.level, (*own.overrides, *asked.overrides), *budget)


def _known(asked: Recipe, chosen: Sequence[Backend]) -> Recipe:
    """The recipe with levels that every target has, in lower case. Raises `UserError`."""
    level = _level(asked.level, chosen, f"--quant {asked.level}")
    overrides = [(glob, _level(name, chosen, f"--override {glob}={name}")) for glob, name in asked.overrides]
    return replace(asked, level=level, overrides=tuple(overrides))


def _level(level: str, chosen: Sequence[Backend], where: str) -> str:
    supports = {b.name: backends.part(b, "support") for b in chosen}
    if len(chosen) > 1 and level.lower() not in LEVELS:
        own = [b for b, support in supports.items() if level.lower() in support.levels()]
        if own:
            raise UserError(f"{where}: a type of {' and '.join(own)} alone, converted to one target at a time "
                            f"(for several targets: {', '.join(LEVELS)})")  # fmt: skip
    for b, support in supports.items():
        if (why := getattr(support, "REFUSED", {}).get(level.lower())) is not None:
            raise UserError(f"{where}: {why}")
        level = levels.check(level, support.levels(), b if len(chosen) > 1 else "", where)
    return level


def _native(b: Backend, build: Any, source: Source, calibrated: bool) -> Native | None:
    """A target's own types, and what its levels make of every tensor."""
    support = backends.part(b, "support")
    own = [name for name in support.levels() if name not in LEVELS]
    if not own:
        return None
    weighed = {"importance": calibrated} if takes_importance(b) else {}
    return Native(b.name, own, partial(build.recipe, source.spec, **weighed), support.bits)


def takes_importance(b: Backend) -> bool:
    """Whether a backend's own types are rounded by what each input counts."""
    return getattr(backends.part(b, "support"), "IMPORTANCE", False)


def _planned(
    source: Source,
    asked: Recipe,
    chosen: Sequence[tuple[Backend, Any, dict[str, str]]],
    native: Native | None,
    gains: Gains | None,
) -> list[Planned]:
    def sized(planned: Sequence[Planned]) -> int:
        return max(_size(b, build, source, planned, settled) for b, build, settled in chosen)

    return recipe.plan(source.spec, asked, source.held, gains, native, sized)


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


def check_here(targets: Sequence[Target], verify: bool) -> None:
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


def _settled(
    b: Backend,
    build: Any,
    source: Source,
    asked: Recipe,
    given: dict[str, str],
    options: Mapping[str, str],
    calibrated: bool,
) -> tuple[dict[str, str], Support]:
    """A target's options, and how it carries the source with them: back to where it came from, where that works and
    nothing else was asked for. Raises `UserError`, a line for each refusal."""
    support = backends.part(b, "support").support
    if takes_importance(b):
        support = partial(support, importance=calibrated)
    settle = getattr(build, "settled", lambda spec, tokenizer, **options: (options, []))
    own = given | {n: v for n, v in source.choices.get(b.name, {}).items() if n not in options}
    if own != given and support(source.spec, asked.level, **own).ok:
        given = own
    with _named(b):
        settled, notes = settle(source.spec, source.tokenizer, **given)
    verdict: Support = support(source.spec, asked.level, **settled)
    refusals = [f"{b.name}: {r}" for r in verdict.refusals]
    computed_in = getattr(backends.part(b, "support"), "computed_in", None)
    together = settled if computed_in is None else settled | {"compute": computed_in(asked.level, settled["compute"])}
    for glob, level in asked.overrides:
        other: Support = support(source.spec, level, **together)
        refusals += [f"{b.name}: --override {glob}={level}: {r}" for r in other.refusals if r not in verdict.refusals]
    if refusals:
        raise UserError("\n".join(refusals))
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


def _check_joined(
    b: Backend, build: Any, source: Source, level: str, planned: Sequence[Planned], options: Mapping[str, str]
) -> None:
    """Parts that a format stores as one tensor are codes all of them, which the widest of them holds exactly, or have
    one level. Raises `UserError`."""
    joined = getattr(build, "joined_matrices", None)
    if joined is None:
        return
    found = {p.name: p.level for p in planned}
    for parts in joined(source.spec, level, source.tokenizer, **options):
        kinds = {found[n]: n for n in parts}
        if len(kinds) > 1 and not kinds.keys() <= GROUPS.keys():
            shown = ", ".join(f"{n} {level}" for level, n in kinds.items())
            raise UserError(f"{b.name}: {shown}: {', '.join(parts)} are stored (or served) as one, which has one type: "
                            "give them the same level")  # fmt: skip


def _path(backend: Backend, stem: str, out: str | Path | None, several: bool) -> Path:
    """The artifact's path: tiny.q4.gguf, tiny.q4.mlpackage, tiny.q4-mlx."""
    if out is not None and not several:
        return Path(out)
    where = Path(out) if out is not None else Path()
    return where / (f"{stem}{backend.suffix}" if backend.suffix else f"{stem}-{backend.name}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
