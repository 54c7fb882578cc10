"""The safetensors files of a folder: one, or several with an index beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from backends.folder import write_json
from backends.safetensors import INDEX, WEIGHTS, FileReader, FileWriter, Tensor, index_table, placed
from spec.errors import UserError

SHARD = 5 * 10**9
"""Bytes of a file, as mlx-lm splits them."""
METADATA = {"format": "mlx"}


def sharded(tensors: Sequence[Tensor], limit: int = SHARD) -> dict[str, list[Tensor]]:
    """File names and their tensors, in the given order."""
    return placed(([t] for t in tensors), limit)


class Output:
    """Files under construction in a folder. Raises `UserError` where the disk does not take them."""

    def __init__(self, folder: Path, files: Mapping[str, Sequence[Tensor]]) -> None:
        self.folder = folder
        self._files: list[FileWriter] = []
        self._of: dict[str, FileWriter] = {}
        try:
            for name, tensors in files.items():
                self._files.append(FileWriter(folder / name, tensors, METADATA))
                self._of |= dict.fromkeys(self._files[-1].tensors, self._files[-1])
        except BaseException:
            self.abort()
            raise

    def put(self, name: str, row: int, data: NDArray[Any]) -> None:
        """Rows of a tensor, from `row` on, in its own dtype."""
        self._of[name].rows(name, row, data)

    def close(self) -> None:
        """Flush to disk, and the index of several files beside them."""
        for f in self._files:
            f.close()
        if len(self._files) > 1:
            write_json(self.folder / INDEX, index_table({f.path.name: f.tensors.values() for f in self._files}))

    def abort(self) -> None:
        """Close and delete."""
        for f in self._files:
            f.abort()


class Input:
    """The tensors of a folder. Raises `UserError` for files that are missing or not whole."""

    def __init__(self, folder: Path) -> None:
        self.paths = _files(folder)
        self._of = {name: f for f in map(FileReader, self.paths) for name in f.tensors}
        self.tensors = {name: f.tensors[name] for name, f in self._of.items()}

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop as they are stored."""
        return self._of[name].rows(name, start, stop)

    def elements(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Elements start..stop as they are stored."""
        return self._of[name].elements(name, start, stop)


def _files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS, folder / INDEX
    if not index.is_file():
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / Path(str(n)).name for n in names]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{index}: damaged") from None
