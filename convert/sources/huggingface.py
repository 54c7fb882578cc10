"""A Hugging Face folder: config.json read by its family, safetensors by the family's table of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convert.families import family
from convert.families.config import Config, Family
from convert.sources.base import Source
from convert.sources.files import read_json
from convert.sources.safetensors import Tensors
from convert.tokenizers import read_tokenizer
from spec.config import Spec
from spec.errors import UserError
from spec.layout import Layout
from spec.load import parse


def open_huggingface(folder: Path) -> Source:
    """Open a folder with a config.json. Raises `UserError`, `SpecError` with every problem of the config."""
    config = folder / "config.json"
    data = read_json(config)
    f = family(data.get("model_type"), str(config))
    spec = spec_from(data, f, str(config), folder.resolve().name)
    tied = {"lm_head.weight": "embed.weight"} if spec.head.tied else {}
    tokenizer = read_tokenizer(folder, data)
    return Source(folder, spec, Layout(f.rules, spec), Tensors(folder), tokenizer, aliases=tied, ignored=f.recomputed)


def spec_from(data: dict[str, Any], f: Family, source: str, name: str) -> Spec:
    """The spec that a config.json describes."""
    named = data.get("architectures") or [f.architecture]
    if named != [f.architecture]:
        raise UserError(f"{source}: architectures: {named} is another function than {f.architecture}")
    c = Config(data, source, f.defaults)
    fields = f.to_spec(c)
    c.done()
    return parse({"name": name or f.name, **fields}, source)
