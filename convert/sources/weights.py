"""The weights of a Hugging Face folder: which of its files count."""

from __future__ import annotations

from pathlib import Path

from convert.sources import torchbin
from convert.sources.files import present
from convert.sources.safetensors import WEIGHTS, Tensors
from convert.sources.store import Store
from spec.errors import UserError

COPIES = ("consolidated*", "original", "*.gguf", "*.onnx", "tf_model.h5", "flax_model.msgpack", "rust_model.ot")
"""Other forms of the same weights that folders carry beside those that transformers reads."""


def open_weights(folder: Path) -> tuple[Store, list[str]]:
    """The tensors of model.safetensors or pytorch_model.bin, one file or several, and what a user should know.

    Raises `UserError` where there are none, or where a file is not whole.
    """
    found = [name for name in (WEIGHTS, torchbin.WEIGHTS) if any(present(folder / f) for f in (name, _index(name)))]
    others = sorted(p.name for pattern in COPIES for p in folder.glob(pattern))
    if not found:
        shown = ", ".join(others[:5])
        hint = f"; {shown}: not read here (give a folder that save_pretrained wrote)" if others else ""
        raise UserError(f"{folder}: no {WEIGHTS} and no {torchbin.WEIGHTS}, nor an index of either{hint}")
    read = None if found[0] == WEIGHTS else torchbin.read
    notes = []
    if len(found) > 1 or others:
        left = ", ".join([*found[1:], *others][:6])
        notes.append(f"weights are read from {found[0]}; {left} beside it: not looked at")
    return Tensors(folder, found[0], read), notes


def _index(name: str) -> str:
    return f"{name}.index.json"
