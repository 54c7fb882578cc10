"""Fine-tuning: a run that begins with the weights of a checkpoint, a Hugging Face folder or a GGUF file.

The one door from the trainer to `convert.sources`, which read them all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from backends.torch.model import assign
from spec.config import Spec
from spec.errors import UserError
from spec.load import load
from spec.params import params
from train.config import TrainConfig
from train.data import tokenizer
from train.data.tokens import cache_folder

if TYPE_CHECKING:
    from convert.sources import Source

log = logging.getLogger(__name__)

FREE = ("version", "name", "context", "init", "pattern", "overrides", "block", "dropout", "scaling")
"""What a spec may change of the one that its weights were trained with: how long sequences are, what is dropped out.
(`layers` holds the blocks in full.)"""


def spec_of(c: TrainConfig) -> Spec:
    """The spec of a run to begin: the one that was given, or that of `init`.

    Raises `UserError` where both are there and the weights would not compute what they were trained for.
    """
    if c.init is None:
        return load(c.spec)
    with opened(c.init) as source:
        if "spec" not in c.model_fields_set:
            return source.spec
        given = load(c.spec)
        _agree(c, given, source.spec)
        return given


def opened(path: str, field: str = "init") -> Source:
    """A source of weights, which `field` names. Nothing but its description is read yet. Raises `UserError`."""
    from convert.sources import open_source

    try:
        return open_source(path if path.startswith("hf:") else Path(path).expanduser())
    except UserError as e:
        raise UserError(f"{field}: {e}") from None


def fill(decoder: nn.Module, path: str) -> None:
    """Fill a decoder, a pipeline's stage or a rank's shards of one, from a source: one tensor is in memory at a time.

    Every rank reads what it has a part of. Raises `UserError` for weights that are not finite.
    """
    with opened(path) as source:
        for name, p in decoder.named_parameters():
            assign(p, torch.from_numpy(source.tensor(name)))


def tokenizer_of(c: TrainConfig) -> Path | None:
    """The tokenizer of `init`, where the run names none: its own folder, or one made in the cache of what a Hugging
    Face folder or a GGUF file has. Raises `UserError` where there is none, or the run's has other ids."""
    if c.init is None:
        return None
    cache = cache_folder(c.data.cache)
    with opened(c.init) as source:
        found = source.tokenizer
        if c.tokenizer is not None:
            _same_tokens(source, c.tokenizer)
            return None
        if found is None:
            raise UserError(f"init: {c.init} has no tokenizer (give the one of its weights: --tokenizer FOLDER)")
        if (source.path / "spec.yaml").is_file():
            return source.path
        from backends.folder import write_tokenizer

        partial = Path(tempfile.mkdtemp(prefix=".tokenizer-", dir=cache))
        try:
            write_tokenizer(partial, found, source.spec.context)
            content = b"\n".join(p.read_bytes() for p in sorted(partial.rglob("*")) if p.is_file())
            folder = cache / f"tokenizer-{hashlib.sha256(content).hexdigest()[:32]}"
            try:
                os.rename(partial, folder)  # noqa: PTH104
            except OSError:
                if not folder.is_dir():  # otherwise it is there already
                    raise
        except OSError as e:
            raise UserError(f"{cache}: {e.strerror} (choose another folder with --data.cache)") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder


def _same_tokens(source: Source, given: str) -> None:
    """Raise `UserError` where a tokenizer is not that of the weights; it may have tokens beside theirs."""
    own = tokenizer.load(given)
    if source.tokenizer is None:
        log.warning("tokenizer: %s has none to compare %s with; it must be that of its weights", source.path, given)
    elif found := tokenizer.difference(source.tokenizer.json, own, more=True):
        raise UserError(f"tokenizer: {given}: {source.path} {found} (leave --tokenizer out, and it is that of init)")


def _agree(c: TrainConfig, given: Spec, own: Spec) -> None:
    a, b = ({p.name: list(p.shape) for p in params(s)} for s in (given, own))
    found = [_differs(name, a.get(name), b.get(name)) for name in {**b, **a}]
    if not any(found):
        x, y = (_flat({**s.model_dump(mode="json"), "layers": [q.model_dump(mode="json") for q in s.layers]})
                for s in (given, own))  # fmt: skip
        found = [_differs(name, x.get(name), y.get(name)) for name in {**y, **x}]
    wrong = [f for f in found if f]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"spec: {c.spec} is not what the weights of {c.init} were trained with: {'; '.join(wrong[:3])}{more} "
            "(leave --spec out, and it is theirs)"
        )


def _differs(name: str, given: Any, own: Any) -> str:
    return "" if given == own else f"{name} {json.dumps(given)}, and there {json.dumps(own)}"


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by path, without those that are `FREE`."""
    if isinstance(data, Mapping):
        items = [(f"{prefix}.{k}".lstrip("."), v) for k, v in data.items() if k not in FREE]
    elif isinstance(data, list):
        items = [(f"{prefix}[{i}]", v) for i, v in enumerate(data)]
    else:
        return {prefix: data}
    return {k: v for name, value in items for k, v in _flat(value, name).items()}
