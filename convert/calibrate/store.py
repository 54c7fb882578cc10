"""A calibrated rounding on disk: codes and scales of every tensor that has some, and what the calibration measured.

    key.json                  what it is of: source, recipe, settings, text, versions; written first
    embed.safetensors         NAME.codes int8 [rows, cols], NAME.scales float32 [rows, cols / group]; NAME.tokens: of
    layers.0.safetensors      how many tokens the statistics were that they were fitted to, int64 [1] or [experts].
    ...                       One file a unit: the embedding, each layer, the head
    importance.safetensors    NAME: mean squares of each input channel, float32 [cols], or [experts, cols] for the
                              stacked matrices of experts; NAME.count: tokens they are of, int64 [1] or [experts]
    rounding.json             levels, hashes, coverage; written last: a folder that has it is whole
    work/                     what an interrupted run goes on from; gone once it is whole

Every file is written aside, flushed and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats, Planned, QuantizedTensor
from convert.levels import LEVELS
from convert.sources.files import open_file, read_json
from convert.sources.safetensors import header
from convert.sources.store import RAW, Placed, pread
from spec.config import Spec
from spec.errors import UserError
from spec.params import params

FORMAT = 1
KEY, RESULT, IMPORTANCE, WORK = "key.json", "rounding.json", "importance.safetensors", "work"
LEVELS_FILE = "levels.json"


def unit_of(name: str) -> str:
    """The unit whose file holds a canonical tensor: `embed`, `layers.{i}` or `head`."""
    found = re.match(r"layers\.\d+", name)
    if found:
        return found[0]
    return "head" if name.startswith(("head.", "final_norm.")) else "embed"


class Rounding:
    """A whole rounding, open for reading; every member is cheap, and rows are read where they are asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises `UserError` where the folder holds none that is whole."""
        self.folder = folder
        if not (folder / RESULT).is_file():
            begun = (folder / KEY).is_file()
            raise UserError(f"{folder}: " + ("a calibration that did not end: the command that began it goes on"
                                             if begun else f"holds no rounding ({RESULT} is missing)"))  # fmt: skip
        data = read_json(folder / RESULT)
        if data.get("format") != FORMAT:
            raise UserError(f"{folder / RESULT}: format {data.get('format')}, this program reads {FORMAT}: "
                            "delete the folder and calibrate again")  # fmt: skip
        try:
            self.key: dict[str, Any] = dict(data["key"])
            self.levels: dict[str, str] = {str(n): str(level) for n, level in data["levels"].items()}
            """The level of every parameter, in canonical order."""
            self.wide = frozenset(str(n) for n in data["wide"])
            """Tensors whose codes stay the source's own, with scales of 11 significant bits."""
            self.hashes: dict[str, str] = {str(n): str(h) for n, h in data["hashes"].items()}
            """The `ContentHash` of every tensor that has codes here."""
            self.source_hashes: dict[str, str] = {str(n): str(h) for n, h in data["source_hashes"].items()}
            """The `ContentHash` of every parameter of the source as float32."""
            self.record: dict[str, Any] = dict(data["record"])
            """What a receipt says: effort, text and its hash, tokens, device, what was rounded how, coverage."""
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{folder / RESULT}: damaged: delete the folder and calibrate again") from None
        self._files: dict[str, _File] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a whole rounding. Raises `UserError`."""
        return cls(Path(folder))

    def check(self, spec: Spec) -> None:
        """Whether it is of this spec. Raises `UserError`."""
        if self.key.get("spec") != spec.hash:
            raise UserError(f"{self.folder}: is the rounding of another spec ({self.record.get('source')})")

    def planned(self, spec: Spec) -> list[Planned]:
        """Every parameter with its storage, in canonical order."""
        self.check(spec)
        return [Planned(p.name, p.shape, self.levels[p.name], p.name in self.wide) for p in params(spec)]

    def __contains__(self, name: object) -> bool:
        """Whether a tensor has codes here."""
        return name in self.hashes

    def rows(self, name: str, start: int, stop: int) -> QuantizedTensor:
        """Rows start..stop of a tensor that has codes here."""
        level, file = LEVELS[self.levels[name]], self._file(unit_of(name))
        assert level.group is not None, f"{name} has codes"
        codes, scales = (file.rows(f"{name}.{part}", start, stop) for part in ("codes", "scales"))
        return QuantizedTensor(codes, scales.astype(np.float32, copy=False), level.bits, level.group)

    def importance(self, name: str) -> Floats | None:
        """Mean squares of the inputs of a matrix over the text: [cols], or [experts, cols]; none where it was not
        measured (the embedding, which is no product, and what was not touched at all). An expert without tokens has
        zeros."""
        file = self._file("importance")
        return file.whole(name).astype(np.float32, copy=False) if name in file.entries else None

    def counts(self, name: str) -> NDArray[np.int64] | None:
        """Tokens that `importance(name)` is the mean of: [1], or [experts]."""
        file, key = self._file("importance"), f"{name}.count"
        return file.whole(key).astype(np.int64, copy=False) if key in file.entries else None

    def close(self) -> None:
        """Close the files; they open again when they are asked for."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, unit: str) -> _File:
        if unit not in self._files:
            self._files[unit] = _File(self.folder / f"{unit}.safetensors")
        return self._files[unit]


class _File:
    """One safetensors file, by positioned reads."""

    def __init__(self, path: Path) -> None:
        self.path, self._fd = path, open_file(path)
        try:
            self.entries: dict[str, Placed] = header(self._fd, path, 0)
        except BaseException:
            self.close()
            raise

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if name not in self.entries:
            raise UserError(f"{self.path}: {name} is missing: delete the folder and calibrate again")
        e = self.entries[name]
        dtype = np.dtype(RAW[e.dtype]).newbyteorder("<")
        out = np.empty((stop - start) * e.row, dtype)
        pread(self._fd, e.offset + start * e.row * dtype.itemsize, out, self.path)
        return out.reshape(stop - start, *e.shape[1:])

    def whole(self, name: str) -> NDArray[Any]:
        return self.rows(name, 0, self.entries[name].shape[0])

    def close(self) -> None:
        os.close(self._fd)


class Store:
    """The same folder while it is written: a run begins or goes on, adds units, and ends it. Raises `UserError` where
    the disk refuses."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Begin in a folder, or go on in one with the same key. Raises `UserError` where it holds anything else."""
        self.folder, self.key, self.work = folder, json.loads(json.dumps(dict(key))), folder / WORK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            self.close = weakref.finalize(self, os.close, lock)
            """Lets others write into the folder."""
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before the key: two runs may begin at once
                self._begin()
            except BaseException:
                self.close()
                raise
        except BlockingIOError:
            raise UserError(f"{folder}: another calibration is writing it") from None
        except OSError as e:
            raise UserError(f"{folder}: {e.strerror}") from None

    def _begin(self) -> None:
        folder = self.folder
        if (folder / KEY).exists():
            _same(folder, read_json(folder / KEY), self.key)
        elif any(not p.name.endswith(PARTIAL) for p in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and holds no calibration: name another folder")
        else:
            write_json(folder / KEY, self.key)
        if self.whole:
            shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed at its very end
        else:
            self.work.mkdir(exist_ok=True)

    @property
    def whole(self) -> bool:
        """Whether nothing is left to do."""
        return (self.folder / RESULT).is_file()

    def settle(self, levels: Mapping[str, str]) -> None:
        """The levels that every unit is rounded at. Raises `UserError` where an interrupted run had others."""
        file = self.work / LEVELS_FILE
        if not file.is_file():
            write_json(file, levels)
        elif read_json(file) != levels:
            raise UserError(f"{self.folder}: was begun at other levels (a size is that of the targets): delete it or "
                            "name another folder")  # fmt: skip

    def has(self, unit: str) -> bool:
        """Whether a unit's codes are whole."""
        return (self.folder / f"{unit}.safetensors").is_file()

    def add(
        self, unit: str, codes: Mapping[str, QuantizedTensor], tokens: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """The codes of a unit, by canonical name; tokens: how many each matrix (each expert) was fitted to."""
        tensors: dict[str, NDArray[Any]] = {}
        for name, q in codes.items():
            tensors[f"{name}.codes"], tensors[f"{name}.scales"] = q.codes, q.scales
        for name, counts in (tokens or {}).items():
            tensors[f"{name}.tokens"] = np.asarray(counts, np.int64)
        write_tensors(self.folder / f"{unit}.safetensors", tensors)

    def codes(self, unit: str, levels: Mapping[str, str]) -> tuple[dict[str, QuantizedTensor], dict[str, list[int]]]:
        """What `add` was given."""
        found = read_tensors(self.folder / f"{unit}.safetensors")
        codes, tokens = {}, {}
        for name, values in found.items():
            if name.endswith(".tokens"):
                tokens[name.removesuffix(".tokens")] = values.tolist()
            elif name.endswith(".codes"):
                name = name.removesuffix(".codes")
                level = LEVELS[levels[name]]
                assert level.group is not None, f"{name} has codes"
                codes[name] = QuantizedTensor(values, found[f"{name}.scales"], level.bits, level.group)
        return codes, tokens

    def finish(
        self,
        planned: Sequence[Planned],
        hashes: Mapping[str, str],
        source_hashes: Mapping[str, str],
        importance: Mapping[str, NDArray[Any]],
        record: Mapping[str, Any],
    ) -> Rounding:
        """Make it whole, and drop what only an interrupted run needs."""
        write_tensors(self.folder / IMPORTANCE, importance)
        result = {
            "format": FORMAT,
            "key": self.key,
            "levels": {p.name: p.level for p in planned},
            "wide": [p.name for p in planned if p.wide],
            "hashes": dict(hashes),
            "source_hashes": dict(source_hashes),
            "record": dict(record),
        }
        write_json(self.folder / RESULT, result)
        shutil.rmtree(self.work, ignore_errors=True)
        return Rounding(self.folder)


PARTIAL = ".partial"


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """A safetensors file, whole under its name or not at all. Raises `UserError`."""
    from safetensors.numpy import save

    _write(path, save({n: np.ascontiguousarray(t) for n, t in tensors.items()}))


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """All of a safetensors file. Raises `UserError`."""
    file = _File(path)
    try:
        return {name: file.whole(name) for name in file.entries}
    finally:
        file.close()


def write_json(path: Path, data: Any) -> None:
    """A JSON file, whole under its name or not at all. Raises `UserError`."""
    _write(path, (json.dumps(data, indent=1) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        publish(partial, path)
    except OSError as e:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: {e.strerror}") from None


def publish(partial: Path, path: Path) -> None:
    """Give a whole file its name, durably."""
    partial.replace(path)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Whether a folder's key is the wanted one; else a `UserError` that says what differs."""
    if found == wanted:
        return
    names = [n for n in (*wanted, *(n for n in found if n not in wanted)) if found.get(n) != wanted.get(n)]
    shown = ", ".join(f"{n} {_shown(found.get(n))}, not {_shown(wanted.get(n))}" for n in names)
    raise UserError(f"{folder}: holds another calibration ({shown}): delete it or name another folder")


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:16] + "..."
