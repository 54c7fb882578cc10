"""Our own checkpoint folder: spec.yaml, model.safetensors with canonical names, tokenizer files."""

from __future__ import annotations

from pathlib import Path

from convert.sources.base import Source
from convert.sources.safetensors import Tensors
from convert.tokenizers import read_tokenizer
from spec.layout import Layout, Rule
from spec.load import load
from spec.params import params


def open_checkpoint(folder: Path) -> Source:
    """Open a folder with a spec.yaml. Raises `UserError`, `SpecError`."""
    spec = load(folder)
    rules = [Rule(p.name, p.name) for p in params(spec)]
    return Source(folder, spec, Layout(rules, spec), Tensors(folder), read_tokenizer(folder))
