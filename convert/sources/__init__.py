"""Where weights come from: our checkpoint folders and Hugging Face folders, behind one lazy `Source`."""

from __future__ import annotations

from pathlib import Path

from convert.sources.base import Source
from spec.errors import UserError

__all__ = ["Source", "open_source"]


def open_source(path: str | Path) -> Source:
    """Open a checkpoint: everything about it is checked, and no weight is read.

    Raises `UserError` (or `SpecError`, with every problem at once) where it is missing, damaged or of no known kind.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such folder")
    if not path.is_dir():
        hint = "give the folder that holds it" if path.suffix in (".safetensors", ".yaml", ".json") else ""
        raise UserError(f"{path}: a source is a checkpoint folder" + (f" ({hint})" if hint else ""))
    if (path / "spec.yaml").is_file():
        from convert.sources.checkpoint import open_checkpoint

        return open_checkpoint(path)
    if (path / "config.json").is_file():
        from convert.sources.huggingface import open_huggingface

        return open_huggingface(path)
    raise UserError(f"{path}: neither spec.yaml (our checkpoint) nor config.json (Hugging Face) is in it")
