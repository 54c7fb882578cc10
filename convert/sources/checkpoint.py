"""Our own checkpoint folder: spec.yaml, model.safetensors with canonical names, tokenizer files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convert.sources.adapter import merge
from convert.sources.base import Source
from convert.sources.safetensors import Tensors
from convert.sources.trained import on_grid
from convert.tokenizers import read_tokenizer
from spec.layout import Layout, Rule
from spec.load import load
from spec.params import params


def open_checkpoint(folder: Path, adapters: Sequence[Path] = ()) -> Source:
    """Open a folder with a spec.yaml, with LoRA adapters merged into its weights. Raises `UserError`, `SpecError`."""
    spec = load(folder)
    rules = [Rule(p.name, p.name) for p in params(spec)]
    rules += [Rule("head.weight", "head.weight")] if spec.head.tied else []
    tensors, spec, named, notes = merge(adapters, on_grid(Tensors(folder)), spec, rules)
    return Source(folder, spec, Layout(rules, spec), tensors, read_tokenizer(folder), notes=notes, adapters=named)
