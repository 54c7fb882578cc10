"""A Hugging Face folder: config.json read by its family, safetensors by the family's table of names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from backends.tokens import misread
from convert.families import read
from convert.sources.adapter import merge
from convert.sources.base import Source
from convert.sources.files import read_json
from convert.sources.quantized import decoded
from convert.sources.weights import open_weights
from convert.tokenizers import read_tokenizer
from spec.config import Spec
from spec.layout import Layout, Rule

RECOMPUTED = r"(.*\.)?rotary_emb\.inv_freq"
"""Tensors that older versions stored though config.json says as much."""


def open_huggingface(folder: Path, adapters: Sequence[Path] = ()) -> Source:
    """Open a folder with a config.json, with LoRA adapters merged into its weights.

    Raises `UserError`, `SpecError` with every problem of the config.
    """
    config = folder / "config.json"
    data = read_json(config)
    quantization = data.pop("quantization_config", None)
    found = read(data, str(config), folder.resolve().name)
    own = [f"the folder's own code (auto_map) is not run: read as {found.row.model}"] if data.get("auto_map") else []
    tokenizer, (stored, notes) = read_tokenizer(folder, data), open_weights(folder)
    tensors, more = decoded(stored, quantization, str(config))
    rules = as_stored((found.row.rules, *found.row.also), found.spec, tensors.entries)
    tensors, spec, named, merged = merge(adapters, tensors, found.spec, rules)
    tied = {outside(rules, "head.weight"): "embed.weight"} if spec.head.tied else {}
    source = Source(
        folder, spec, Layout(rules, spec), tensors, tokenizer, aliases=tied,
        ignored=f"{RECOMPUTED}|{found.family.recomputed}", notes=[*own, *notes, *more, *merged], adapters=named,
    )  # fmt: skip
    if found.row.arch not in misread(tokenizer):
        source.choices["hf"] = {"architecture": found.row.arch}
    return source


def outside(rules: Sequence[Rule], canonical: str) -> str:
    """The external name of a tensor that is stored alone."""
    return next(r.external[0] for r in rules if r.canonical == (canonical,))


def as_stored(tables: Sequence[Sequence[Rule]], spec: Spec, names: Collection[str]) -> Sequence[Rule]:
    """Of a family's layouts the one that a folder is written in: that which names the most of its tensors."""
    written = [_without_prefix(rules, names) for rules in tables]
    if len(written) == 1:
        return written[0]
    return max(written, key=lambda rules: sum(n in names for n in Layout(rules, spec).external))


def _without_prefix(rules: Sequence[Rule], names: Collection[str]) -> Sequence[Rule]:
    """Rules without the prefix of the family's base model, where a folder was written without it."""
    embed = outside(rules, "embed.weight")
    prefix = embed.split(".")[0] + "."
    if embed in names or embed.removeprefix(prefix) not in names:
        return rules
    return [Rule(r.canonical, [n.removeprefix(prefix) for n in r.external], *r.ops) for r in rules]
