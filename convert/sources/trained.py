"""Checkpoints that were trained through the grid of a level (`backends.trained`): their codes, read back exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends import trained
from backends.base import Floats, QuantizedTensor
from backends.trained import SCALES
from convert.levels import CODES, GROUPS
from convert.recipe import Held, Recipe
from convert.sources.safetensors import Tensors, metadata
from convert.sources.store import Entry, Store
from spec.errors import UserError


def on_grid(tensors: Tensors) -> Store:
    """The store of an ordinary checkpoint as it is; of a trained one, with what it holds as codes.

    Raises `UserError` where what its files say of themselves does not fit.
    """
    recipe, levels = trained.read((path, metadata(path)) for path in tensors.files)
    return tensors if recipe is None else OnGrid(tensors, recipe, levels)


class OnGrid:
    """A store whose matrices are codes times the scales that lie beside them."""

    def __init__(self, tensors: Tensors, recipe: Mapping[str, Any], levels: Mapping[str, str]) -> None:
        self._tensors = tensors
        self.entries: dict[str, Entry] = dict(tensors.entries)
        for name, level in levels.items():
            matrix, scales = self.entries.get(name), self.entries.pop(name + SCALES, None)
            if matrix is None or scales is None:
                raise UserError(f"{self._file}: {name} was trained at {level}, and it or its scales are missing")
            if matrix.row != scales.row * GROUPS[level] or matrix.rows != scales.rows:
                raise UserError(
                    f"{self._file}: {name + SCALES}: shape {list(scales.shape)} is none of {level} for "
                    f"{list(matrix.shape)}"
                )
        try:
            asked = Recipe(recipe["level"], tuple(recipe.get("overrides", {}).items()), recipe.get("bits"))
        except (KeyError, AttributeError):
            raise UserError(f"{self._file}: its metadata has no recipe") from None
        self.held = Held(dict(levels), recipe=asked)

    @property
    def nbytes(self) -> int:
        return self._tensors.nbytes

    def fetch(self, name: str, start: int, stop: int) -> Floats:
        return self._tensors.fetch(name, start, stop)

    def raw(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return self._tensors.raw(name, start, stop)

    def coded(self, name: str, start: int, stop: int) -> QuantizedTensor:
        """Rows of one of `held`. Raises `UserError` where a weight is no code times its scale."""
        level = self.held.levels[name]
        bits, group = CODES[level], GROUPS[level]
        weights, scales = self.fetch(name, start, stop), self.fetch(name + SCALES, start, stop)
        with np.errstate(all="ignore"):
            codes = np.rint(weights.reshape(-1, group) / scales.reshape(-1, 1))
            inside = (codes >= -(2 ** (bits - 1))) & (codes < 2 ** (bits - 1))
            found = QuantizedTensor(
                np.where(inside, codes, 0).astype(np.int8).reshape(weights.shape), scales, bits, group
            )
            same = found.dequantize() == weights
        if not same.all():
            row, column = (int(i) for i in np.argwhere(~same)[0])
            raise UserError(
                f"{self._file}: {name}: row {start + row}: {weights[row, column]:.6g} is no code of {level} times its "
                f"scale {scales[row, column // group]:.6g}: weights were changed after the training (write them "
                "without scales and metadata)"
            )
        return found

    def close(self) -> None:
        self._tensors.close()

    @property
    def _file(self) -> object:
        return next(iter(self._tensors.files))
