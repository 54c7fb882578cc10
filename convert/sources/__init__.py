"""Where weights come from: our checkpoint folders and Hugging Face folders, behind one lazy `Source`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convert.hub import located
from convert.sources.base import Source
from convert.sources.files import present
from spec.errors import UserError

__all__ = ["Source", "open_source"]

KINDS = "a source is a checkpoint folder of ours, a Hugging Face folder, a .gguf file, or hf:owner/name"


def open_source(
    path: str | Path,
    adapters: Sequence[str | Path] = (),
    rounding: str | Path | None = None,
    imatrix: str | Path | None = None,
) -> Source:
    """Open a checkpoint: everything about it is checked, and no weight is read.

    path: a folder, a GGUF file, or hf:owner/name[@revision]. adapters: LoRA adapters to merge into its weights,
    likewise. rounding: the folder of a calibrated rounding of it. imatrix: llama.cpp's file of what its inputs count.
    Raises `UserError` (or `SpecError`, with every problem at once) where it is missing, damaged or of no known kind.
    """
    source = _opened(path, adapters)
    try:
        if rounding is not None:
            from convert.calibrate.store import Rounding

            source.attach(Rounding.open(rounding))
        if imatrix is not None:
            from convert.calibrate.imatrix import open_imatrix

            source.importance = open_imatrix(imatrix, source.spec)
    except BaseException:
        source.close()
        raise
    return source


def _opened(path: str | Path, adapters: Sequence[str | Path]) -> Source:
    path, folders = located(path), [located(a) for a in adapters]
    if not path.exists():
        raise UserError(f"{path}: no such folder or file ({KINDS})")
    if path.suffix == ".gguf" and not path.is_dir():
        from convert.sources.gguf import open_gguf

        if folders:
            raise UserError(f"--adapter {adapters[0]}: into a GGUF file nothing is merged (convert it to hf first)")
        return open_gguf(path)
    if not path.is_dir():
        hint = "give the folder that holds it" if path.suffix in (".safetensors", ".bin", ".yaml", ".json") else ""
        raise UserError(f"{path}: is no source ({hint or KINDS})")
    if present(path / "spec.yaml"):
        from convert.sources.checkpoint import open_checkpoint

        return open_checkpoint(path, folders)
    if present(path / "config.json"):
        from convert.sources.huggingface import open_huggingface

        return open_huggingface(path, folders)
    if present(path / "adapter_config.json"):
        raise UserError(f"{path}: an adapter is no model: convert its base model with --adapter {path}")
    raise UserError(f"{path}: neither spec.yaml (our checkpoint) nor config.json (Hugging Face) is in it")
