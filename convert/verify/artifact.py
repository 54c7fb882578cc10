"""How to open the artifact of any backend that reads its own files back (`backends.base.Artifact`) for verification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from backends.base import (
    Artifact,
    Backend,
    ContentHash,
    Planned,
    QuantizedTensor,
    RowBlocks,
    Runtime,
    Values,
    content_hash,
)
from convert.levels import GROUPS, LEVELS
from convert.recipe import Held, kept, plan
from convert.sources.base import weights_hash
from convert.stream import rounded
from convert.verify import numeric
from convert.verify.emulate import Typed
from convert.verify.packing import compare_values
from convert.verify.run import Twin
from spec.config import Spec
from spec.errors import UserError
from spec.params import params

Array = NDArray[Any]

SLICE = 1 << 20
"""Weights that are compared at a time."""


class Door:
    """What `convert.verify.run.door` returns for a backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def versions(self) -> dict[str, str]:
        """Of the libraries that the verdict depends on."""
        return {**backends.versions(self.backend), "numpy": np.__version__}

    def level_of(self, path: Path) -> str:
        """The level that the artifact declares. Raises `UserError`."""
        return backends.part(self.backend, "read").open_artifact(path).level

    def open_artifact(
        self, path: Path, spec: Spec, level: str, threads: int | None, held: Held | None = None
    ) -> Shipped:
        """Open an artifact that should carry `spec`; `held` are the source's own codes. Raises `UserError` where it
        is not whole or another model's."""
        artifact: Artifact = backends.part(self.backend, "read").open_artifact(path)
        if artifact.source.hash != spec.hash:
            raise UserError(f"{path}: carries another spec than the source's")
        return Shipped(self.backend, path, artifact, spec, level, threads, held)


class Shipped:
    """An artifact; see `convert.verify.run.Shipped`."""

    def __init__(
        self, backend: Backend, path: Path, artifact: Artifact, source: Spec, level: str, threads: int | None,
        held: Held | None = None,
    ) -> None:  # fmt: skip
        self.backend, self.path, self.artifact, self.threads = backend, path, artifact, threads
        self.spec: Spec = artifact.spec
        self._planned = planned(backend, source, level, held, artifact.receipt)
        self._shapes = {p.name: p.shape for p in params(self.spec)}

    @property
    def folder(self) -> Path | None:
        """Where transformers' AutoTokenizer finds the tokenizer; none for formats that it does not read."""
        return self.path if self.backend.hub else None

    @property
    def genai(self) -> Path | None:
        """Where onnxruntime-genai finds the tokenizer; none for formats that it does not read."""
        return self.path if self.backend.name == "onnx" else None

    @property
    def emulated(self) -> bool:
        """Whether an interpreter stands in for the hardware."""
        return self.artifact.arithmetic.emulated

    @property
    def precision(self) -> str:
        """The coarsest rounding on the path, a key of `gates.UNIT`."""
        a = self.artifact.arithmetic
        return numeric.coarsest([p for p in (a.compute, a.cache, a.activations) if p])

    @property
    def session(self) -> int | None:
        """Length of the sessions whose rotary tables are fixed in the artifact."""
        return self.artifact.session

    def weights(self, name: str) -> Any:
        """Dequantized weights, a few rows at a time."""
        rows = ArtifactRows(self.artifact, name, self._shapes[name])
        a = self.artifact.arithmetic
        kind = None if name in a.unrounded else a.activations
        if len(rows.shape) == 1:
            return rows[:]
        if kind is None or rows.group is None:
            return rows
        return Typed(rows, kind if rows.group == 32 else f"{kind}-g{rows.group}")  # blocks as long as the groups

    def stored(self) -> Packed:
        """The artifact's weights in canonical names."""
        return Packed(self.artifact, self._planned)

    def load(self, context: int) -> Runtime:
        """The stock runtime at its stock settings."""
        return self._load(context)

    def _load(self, context: int, **options: Any) -> Runtime:
        load = backends.part(self.backend, "runtime").load
        return load(self.path, threads=self.threads, context=context, **options)

    def emulate(self, ids: Array, length: int) -> numeric.Emulation:
        """The same weights and ids, exactly and with the runtime's roundings."""
        return numeric.emulate_dtype(self.spec, self.weights, ids, length, self.artifact.arithmetic)

    def twin(self, folder: Path) -> Twin:
        """The artifact itself, without any rounding but float32's."""
        runtime = self._load(self.spec.context, exact=True)

        def exact(name: str) -> Any:
            found = self.weights(name)
            return found.weight if isinstance(found, Typed) else found

        what = f"the same graph in float32 ({self.spec.depth} layers) against float64"
        emulated = bool(runtime.info().get("emulated"))
        return Twin(self.spec, exact, runtime, what, self.session or runtime.context, emulated=emulated)


def planned(
    backend: Backend, spec: Spec, level: str, held: Held | None = None, receipt: Mapping[str, Any] | None = None
) -> list[Planned]:
    """Every tensor with the level that a conversion gives it. Those of a recipe that is more than a level, or of a
    calibrated one, are in the receipt. Raises `UserError` where that names none."""
    if receipt and receipt.keys() & {"recipe", "rounding", "imatrix"}:
        return _as_said(backend, spec, receipt.get("tensors"), held or Held())
    if level in LEVELS:
        return plan(spec, level, held)
    chosen: Mapping[str, str] = backends.part(backend, "build").recipe(spec, level)
    return [Planned(p.name, p.shape, chosen[p.name]) for p in params(spec)]


def _as_said(backend: Backend, spec: Spec, tensors: Any, held: Held) -> list[Planned]:
    """The plan that a receipt names."""
    known, out = {*LEVELS, *backends.part(backend, "support").levels()}, []
    for p in params(spec):
        match tensors.get(p.name) if isinstance(tensors, dict) else None:
            case [str(level), *_] if level in known:
                out.append(Planned(p.name, p.shape, level, held.wide and kept(held.levels.get(p.name), level)))
            case entry:
                raise UserError(f"the receipt gives {p.name} no level that there is: {str(entry)[:40]}")
    return out


class ArtifactRows:
    """One canonical tensor as an array-like: `shape`, and dequantized rows by slice or index array."""

    def __init__(self, artifact: Artifact, name: str, shape: tuple[int, ...]) -> None:
        self._artifact, self._name, self.shape = artifact, name, shape

    @property
    def group(self) -> int | None:
        """Weights that share a scale, where the file holds codes and scales."""
        row = self._artifact.rows(self._name, 0, 1)
        return row.group if isinstance(row, QuantizedTensor) else None

    def __getitem__(self, rows: Any) -> Array:
        if isinstance(rows, slice):
            start, stop, stride = rows.indices(self.shape[0])
            assert stride == 1, "forward rows only"
            return _dense(self._artifact.rows(self._name, start, stop))
        index = np.asarray(rows)
        first, last = (int(index.min()), int(index.max()) + 1) if index.size else (0, 0)
        if last - first <= 4 * len(index):
            return _dense(self._artifact.rows(self._name, first, last))[index - first]
        return np.concatenate([_dense(self._artifact.rows(self._name, int(i), int(i) + 1)) for i in index])


def _dense(values: Values) -> Array:
    return values.dequantize() if isinstance(values, QuantizedTensor) else values


class Packed:
    """What lies in the artifact; see `packing.Stored`."""

    def __init__(self, artifact: Artifact, plan: list[Planned]) -> None:
        self._artifact, self._plan = artifact, {p.name: p for p in plan}

    def problems(self) -> dict[str, str]:
        """What is wrong before any weight is compared."""
        return self._artifact.problems(list(self._plan.values()))

    def rows_together(self, name: str) -> int:
        """Rows that the format rounds together at the planned level."""
        together = getattr(self._artifact, "rows_together", None)
        return 1 if together is None else together(name, self._plan[name].level)

    def compare(self, name: str, start: int, block: Values) -> str:
        """An empty string where the artifact holds the canonical rounding of these rows, else what differs."""
        level = self._plan[name].level
        chosen = LEVELS.get(level)
        if chosen is not None and chosen.group is not None:
            want: RowBlocks = rounded(name, level, start, block)
        else:
            want = self._artifact.expected(name, level, start, _dense(block))
        count, step = block.shape[0], block.shape[0]
        if len(block.shape) > 1:
            step = max(1, SLICE // block.shape[1])
        for a in range(0, count, step):  # a format's group of rows may be a whole matrix
            b = min(count, a + step)
            how = compare_values(self._artifact.rows(name, start + a, start + b), want[a:b], start + a)
            if how:
                return how
        return ""

    def calibrated(self, name: str) -> str:
        """What tells how it was rounded besides its source, where a text had a part in that: the source's `rounding`,
        for a target's own type its `importance`."""
        level, receipt = self._plan[name].level, self._artifact.receipt
        if level not in LEVELS:
            said = self._said(name) is not None and receipt.keys() & {"rounding", "imatrix"}
            return "importance" if said else ""
        return "rounding" if level in GROUPS and "rounding" in receipt else ""

    def made_from(self, source: Any) -> bool:
        """Whether the receipt names the weights of this source: what was rounded anew as it is stored, the others as
        they were read, codes times scales."""
        receipt, held = self._artifact.receipt, source.held.levels

        def blocks(name: str) -> Iterator[Array]:
            level = self._plan[name].level
            if "rounding" in receipt and level in GROUPS and not kept(held.get(name), level):
                return (b for _, b in source.blocks(name))
            return (_dense(b) for _, b in source.values(name))

        digest = weights_hash((n, content_hash(blocks(n))) for n in source.names())
        return digest == receipt.get("source", {}).get("hash")

    def hashed(self, name: str) -> bool | None:
        """Whether the tensor has the receipt's content hash, a few rows at a time in canonical order; of a backend's
        own type, that of its bytes."""
        said = self._said(name)
        if said is None:
            return None
        shape, level = self._plan[name].shape, self._plan[name].level
        if level not in LEVELS:
            return getattr(self._artifact, "bytes_hash")(name) == said  # noqa: B009 (of backends whose writer hashes)
        group = GROUPS.get(level)
        digest, step = ContentHash(), max(1, (1 << 22) // shape[-1])
        for start in range(0, shape[0], step):
            rows = self._artifact.rows(name, start, min(shape[0], start + step))
            digest.update(rows.grouped(group) if group and isinstance(rows, QuantizedTensor) else rows)
        return digest.hexdigest() == said

    def _said(self, name: str) -> str | None:
        """The hash in the receipt."""
        entry = self._artifact.receipt.get("tensors", {}).get(name)
        return str(entry[1]) if isinstance(entry, list) and len(entry) > 1 else None
