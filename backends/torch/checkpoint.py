"""Weights in safetensors files under the canonical names, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backends.safetensors import INDEX, WEIGHTS
from backends.torch.model import Decoder
from backends.trained import SCALES
from spec.config import Spec
from spec.errors import UserError
from spec.load import load as load_spec
from spec.params import params


def save_weights(weights: nn.Module | Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a decoder's parameters, or a state by canonical name, to one safetensors file.

    The file appears only when it is whole and on the disk: an interruption leaves the previous one. Distributed
    tensors are gathered, which every rank must take part in. `dtype` casts. Raises `UserError` where the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    whole = {name: _whole(t, dtype) for name, t in state.items()}
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(whole, partial, metadata={"format": "pt"})
        partial.chmod(mode)  # safetensors lets nobody but the owner read
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot write the weights: {e}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _whole(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    t = t.detach()
    full = getattr(t, "full_tensor", None)
    t = full() if full is not None else t
    return t.to("cpu", dtype or t.dtype).contiguous()


def flush(path: Path) -> None:
    """A file or folder to the disk."""
    if path.is_dir() and os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def files_of(folder: Path) -> dict[str, Path]:
    """Canonical name -> safetensors file of a checkpoint folder. Raises `UserError` for missing or broken files."""
    index, file = folder / INDEX, folder / WEIGHTS
    if file.is_file() or not index.is_file():  # the single file wins, as it does in transformers and in `convert`
        return dict.fromkeys(_open(file).keys(), file)
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): folder / str(file) for name, file in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not an index of safetensors files (weight_map is missing or broken)") from None
    for file in sorted(set(files.values())):
        held = set(_open(file).keys())
        for name in (n for n, f in files.items() if f == file):
            if name not in held:
                raise UserError(f"{file}: {name} is not in it, though {index.name} says so")
    return files


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: not a whole safetensors file: {e}") from None


def load_weights(decoder: Decoder, folder: str | Path) -> None:
    """Fill a decoder from a checkpoint folder, tensor by tensor, in the decoder's dtype and on its device.

    Raises `UserError` that lists every missing, unexpected and wrongly shaped tensor, before any is read.
    """
    folder = Path(folder)
    files = files_of(folder)
    own = dict(decoder.named_parameters())
    handles = {file: _open(file) for file in sorted(set(files.values()))}
    problems = [f"{p.name}: missing (shape {list(p.shape)})" for p in params(decoder.spec) if p.name not in files]
    for name, file in list(files.items()):
        if name.removesuffix(SCALES) in own and name not in own:
            del files[name]  # the weights are on their grid
        elif name not in own:
            problems.append(f"{name}: the spec has no such tensor")
        else:
            shape = list(handles[file].get_slice(name).get_shape())
            if shape != list(own[name].shape):
                problems.append(f"{name}: shape {shape}, and the spec says {list(own[name].shape)}")
    if problems:
        raise UserError("\n".join(f"{folder}: {p}" for p in problems))
    with torch.no_grad():
        for name, file in files.items():
            own[name].copy_(handles[file].get_tensor(name))


def stored_dtype(folder: Path) -> torch.dtype:
    """The widest floating dtype among the stored tensors."""
    names = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    files = files_of(folder)
    handles = {file: _open(file) for file in set(files.values())}
    kinds = {handles[file].get_slice(name).get_dtype() for name, file in files.items()}
    found = [dtype for name, dtype in names.items() if name in kinds]
    return found[0] if found else torch.float32


def load_decoder(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    length: int | None = None,
    attention: str = "auto",
) -> Decoder:
    """The decoder of a checkpoint folder (spec.yaml and model.safetensors, or shards with an index).

    `dtype` defaults to the stored one. Raises `UserError` for anything missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / "spec.yaml").is_file():
        raise UserError(f"{folder}: not a checkpoint (it has no spec.yaml)")
    decoder = empty(load_spec(folder), dtype or stored_dtype(folder), device, length=length, attention=attention)
    load_weights(decoder, folder)
    return decoder


def empty(
    spec: Spec, dtype: torch.dtype, device: str | torch.device, *, length: int | None = None, attention: str = "auto"
) -> Decoder:
    """A decoder whose parameters are allocated once, in `dtype` on `device`, and not filled."""
    with torch.device("meta"):
        decoder = Decoder(spec, length=length, attention=attention)
    return decoder.to(dtype).to_empty(device=device)
