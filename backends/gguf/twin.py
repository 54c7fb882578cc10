"""A small float32 copy of a GGUF file: the shipped metadata over one layer of each kind, to check the graph alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import NotComparable, Planned
from backends.gguf.carriers import CARRIERS
from backends.gguf.container import Header, Info, read_header, read_rows
from backends.gguf.fit import Fit, examine
from backends.gguf.pack import dense, unpack
from spec.config import Spec
from spec.errors import UserError
from spec.load import parse, read_yaml
from spec.params import params

VOCABULARY = 2048
"""Rows of embedding and head that a twin keeps."""

_ROWS = 1 << 20
"""Weights decoded at a time."""


def kept_layers(spec: Spec) -> list[int]:
    """The first layer of each kind, in order."""
    seen: dict[int, int] = {}
    for i, b in enumerate(spec.layers):
        seen.setdefault(id(b), i)
    return list(seen.values())


def twin_spec(spec: Spec) -> Spec:
    """The spec that a twin computes: `kept_layers`, and at most `VOCABULARY` rows of embedding and head."""
    blocks = [spec.layers[i].model_dump(mode="json") for i in kept_layers(spec)]
    data = spec.model_dump(mode="json", exclude_unset=True, exclude={"pattern", "overrides", "block"})
    rows = min(spec.vocab_size, VOCABULARY)
    return parse(data | {"depth": len(blocks), "block": blocks[0], "pattern": blocks, "vocab_size": rows})


def shipped_fit(arch: str, spec: Spec) -> Fit:
    """How the architecture of a file carries `spec`: the file's own, since another may be preferred at another depth.

    Raises `UserError` where it does not.
    """
    found = [examine(spec, c) for c in CARRIERS if c.arch == arch]
    if not found:
        raise UserError(f"{arch}: no architecture that this program writes")
    if found[0].refusals:
        raise UserError(f"{arch} does not carry the spec: {found[0].refusals[0]}")
    return found[0]


def shipped_spec(header: Header, path: Path) -> Spec:
    """The spec in a file's metadata. Raises `UserError` where there is none."""
    from backends.gguf.build import SPEC_KEY

    text = header.keys.get(SPEC_KEY)
    if not isinstance(text, str):
        raise UserError(f"{path}: has no {SPEC_KEY} in its metadata: not converted by this program")
    return parse(read_yaml(text, str(path)), str(path))


def twin(artifact: Path, out: Path) -> Path:
    """Write the twin of `artifact` to `out`. Raises `UserError` where the artifact is not one of ours.

    Everything comes from the artifact: its metadata (arrays with an entry a layer are cut to the layers kept, and
    the tokenizer is left out), and its tensors as the file has them, dequantized.
    """
    from backends.gguf.build import SPEC_KEY, layout, write_plain

    header = read_header(artifact)
    whole = shipped_spec(header, artifact)
    small, kept = twin_spec(whole), kept_layers(whole)
    if whole.depth == shipped_fit(header.arch, whole).carrier.wide_scale_depth:
        raise NotComparable(
            f"llama.cpp's {header.arch} computes another attention scale at any depth but {whole.depth}"
        )
    fit = shipped_fit(header.arch, small)
    keys = _keys(header, whole, small, kept) | {SPEC_KEY: header.keys[SPEC_KEY]}
    tensors = layout(small, fit, [Planned(p.name, p.shape, "f32") for p in params(small)])
    with artifact.open("rb") as f:

        def rows(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray[Any, Any]]:
            info = _source(header, name, kept, artifact)
            count = shape[0] if len(shape) > 1 else 1
            step = max(1, _ROWS // info.shape[-1])
            for start in range(0, count, step):
                yield dense(unpack(read_rows(f, info, start, min(count, start + step)), info.type))

        write_plain(out, header.arch, keys, tensors, rows)
    return out


def _keys(header: Header, whole: Spec, small: Spec, kept: list[int]) -> dict[str, Any]:
    arch = header.arch
    out: dict[str, Any] = {}
    for key, value in header.keys.items():
        if key.startswith("tokenizer.") or key in ("general.architecture", "allotrope.receipt"):
            continue
        if key.startswith(f"{arch}.") and isinstance(value, list) and len(value) == whole.depth:
            value = [value[i] for i in kept]
        out[key] = value
    out[f"{arch}.block_count"] = small.depth
    lead = f"{arch}.leading_dense_block_count"
    if lead in out:
        out[lead] = sum(i < out[lead] for i in kept)
    out[f"{arch}.vocab_size"] = small.vocab_size
    out["general.file_type"] = 0
    return out | {"tokenizer.ggml.model": "none"}


def _source(header: Header, name: str, kept: list[int], path: Path) -> Info:
    """The artifact's tensor that becomes the twin's tensor `name`."""
    if name.startswith("blk."):
        _, layer, rest = name.split(".", 2)
        name = f"blk.{kept[int(layer)]}.{rest}"
    if name not in header.tensors:
        raise UserError(f"{path}: tensor {name} is missing")
    return header.tensors[name]
