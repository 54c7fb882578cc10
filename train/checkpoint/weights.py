"""The weights of a checkpoint as safetensors files, out of its DCP folder, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from backends.safetensors import INDEX, FileWriter, index_table, placed
from backends.safetensors import Tensor as Placed
from spec.config import Spec
from spec.params import params
from train.checkpoint.files import write
from train.checkpoint.tensors import Reader

STORED = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}


def shards(spec: Spec, dtype: str, limit: int) -> dict[str, list[Placed]]:
    """Files and their tensors, in canonical order: as many in a file as `limit` bytes hold, at least one."""
    return placed(([Placed(p.name, STORED[dtype][0], p.shape)] for p in params(spec)), limit)


def write_weights(reader: Reader, folder: Path, files: Mapping[str, list[Placed]], mine: Sequence[str]) -> None:
    """Write the files named in `mine`: of each weight its average over the steps, where there is one.

    One tensor is in memory at a time (twice: as stored, and whole). Raises `UserError` where the disk refuses.
    """
    stored = reader.tensors
    for name in mine:
        out = FileWriter(folder / name, files[name], {"format": "pt"})
        try:
            for t in files[name]:
                average = f"optimizer/{t.name}/ema"
                out.rows(t.name, 0, _tensor(reader, average if average in stored else f"model/{t.name}", t))
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


def write_index(folder: Path, files: Mapping[str, list[Placed]]) -> None:
    """model.safetensors.index.json, where there are several files."""
    if len(files) > 1:
        write(folder / INDEX, (json.dumps(index_table(files), indent=2) + "\n").encode())
