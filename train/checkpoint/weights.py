"""The weights of a checkpoint as safetensors files, out of its DCP folder, one tensor at a time.

Weights that were trained through the grid of a level are written on it, each matrix with its scales: whoever reads the
file has the weights that the run was validated with, and whoever wants codes divides. What the optimizer changes is in
the DCP folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from backends.safetensors import INDEX, FileWriter, index_table, placed
from backends.safetensors import Tensor as Placed
from backends.trained import SCALES, described
from convert.levels import CODES, GROUPS
from convert.quantize import TooLarge, quantize, round_floats
from convert.recipe import Recipe
from spec.config import Spec
from spec.errors import UserError
from spec.params import Param, params
from train.checkpoint.files import write
from train.checkpoint.tensors import Reader

BLOCK = 1 << 21
"""Weights that are rounded at a time."""

STORED = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}


def shards(spec: Spec, dtype: str, limit: int, levels: Mapping[str, str]) -> dict[str, list[Placed]]:
    """Files and their tensors, in canonical order: as many in a file as `limit` bytes hold, at least one. `levels` are
    those of the parameters that are rounded; scales lie beside their matrices."""
    return placed((_stored(p, dtype, levels.get(p.name, "")) for p in params(spec)), limit)


def _stored(p: Param, dtype: str, level: str) -> list[Placed]:
    found = [Placed(p.name, STORED[dtype][0], p.shape)]
    if level in GROUPS:
        found.append(Placed(p.name + SCALES, "F32", (p.shape[0], p.shape[1] // GROUPS[level])))
    return found


def write_weights(
    reader: Reader,
    folder: Path,
    files: Mapping[str, list[Placed]],
    mine: Sequence[str],
    levels: Mapping[str, str],
    recipe: Recipe | None,
) -> None:
    """Write the files named in `mine`: of each weight its average over the steps, where there is one, rounded to its
    level where it has one; `recipe` is what gave the levels.

    One tensor is in memory at a time (twice: as stored, and whole). Raises `UserError` where the disk refuses, and for
    weights that a level does not hold.
    """
    stored = reader.tensors
    for name in mine:
        own = {t.name: levels[t.name] for t in files[name] if levels.get(t.name) in GROUPS}
        out = FileWriter(folder / name, files[name], {"format": "pt", **described(recipe and recipe.to_dict(), own)})
        try:
            for t in files[name]:
                if t.name.removesuffix(SCALES) in own and t.name not in own:
                    continue  # with its matrix
                average = f"optimizer/{t.name}/ema"
                values = _tensor(reader, average if average in stored else f"model/{t.name}", t)
                if t.name in levels:
                    _round(out, t, values, levels[t.name])
                else:
                    out.rows(t.name, 0, values)
            out.close()
        except BaseException:
            out.abort()
            raise


def _tensor(reader: Reader, name: str, t: Placed) -> NDArray[Any]:
    """A whole tensor in the dtype of its file, as NumPy sees it."""
    whole = torch.empty(t.shape, dtype=reader.dtype(name))
    reader.load({name: whole})
    chosen = whole.to(next(dtype for code, dtype in STORED.values() if code == t.dtype))
    return (chosen.view(torch.uint16) if chosen.dtype == torch.bfloat16 else chosen).numpy()


def _round(out: FileWriter, t: Placed, values: NDArray[Any], level: str) -> None:
    """Rows on the grid, and their scales."""
    rows = max(1, BLOCK // t.shape[1])
    for start in range(0, t.shape[0], rows):
        block = values[start : start + rows]
        try:
            if level not in GROUPS:
                out.rows(t.name, start, round_floats(block, level))
                continue
            q = quantize(block, CODES[level], GROUPS[level])
        except TooLarge as e:
            raise UserError(f"quant: {e.at(t.name, start)}") from None
        out.rows(t.name, start, q.dequantize())
        out.rows(t.name + SCALES, start, q.scales)


def write_index(folder: Path, files: Mapping[str, list[Placed]]) -> None:
    """model.safetensors.index.json, where there are several files."""
    if len(files) > 1:
        write(folder / INDEX, (json.dumps(index_table(files), indent=2) + "\n").encode())
