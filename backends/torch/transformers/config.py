"""The spec as a transformers configuration.

`config.json` holds the spec under one key. The names that Trainer, PEFT, TRL and `generate` read (`hidden_size`, ...)
follow from it; they stand in the file for other readers, and one that says otherwise is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from backends.text import Text
from spec.config import Block, Spec
from spec.errors import UserError
from spec.load import dump, load, parse

SPEC, CONFIG = "spec.yaml", "config.json"


def plain(spec: Spec) -> dict[str, Any]:
    """A spec as data: what its YAML holds."""
    return {"version": spec.version, **spec.model_dump(mode="json", exclude_unset=True)}


@lru_cache(maxsize=64)
def _parsed(text: str) -> Spec:
    return parse(json.loads(text), CONFIG)


def _of(get: Callable[[Spec], Any]) -> Any:
    """A property that follows from the spec."""

    def read(self: AllotropeConfig) -> Any:
        return get(self.parsed)

    return property(read)


def _uniform(get: Callable[[Block], Any]) -> Any:
    """A property of every layer, where all agree; an AttributeError where they do not, so that nobody counts on it."""

    def read(self: AllotropeConfig) -> Any:
        values = {get(b) for b in self.parsed.layers}
        if len(values) > 1:
            raise AttributeError(f"the layers differ in it: {sorted(values)}")
        return values.pop()

    return property(read)


class AllotropeConfig(PreTrainedConfig):
    """`spec`: the spec as data, a `Spec`, the path of a YAML file, or a preset's name. Raises `SpecError` with every
    problem of the spec, and `UserError` for a name that contradicts it."""

    model_type = "allotrope"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers adds lists to it)

    auto_map: ClassVar[dict[str, str]] = {}
    """Code in the folder: there is none, and TRL asks."""

    spec: Any = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    vocab_size = _of(lambda s: s.vocab_size)
    hidden_size = _of(lambda s: s.width)
    num_hidden_layers = _of(lambda s: s.depth)
    max_position_embeddings = _of(lambda s: s.context)
    tie_word_embeddings = _of(lambda s: s.head.tied)
    initializer_range = _of(lambda s: s.init.std)
    logit_scale = _of(lambda s: s.head.scale)
    """TRL's fused losses read this and the next: what the head does between its linear and the logits."""
    final_logit_softcapping = _of(lambda s: s.head.softcap)
    num_attention_heads = _uniform(lambda b: b.attention.heads)
    num_key_value_heads = _uniform(lambda b: b.attention.kv_heads)
    head_dim = _uniform(lambda b: b.attention.head_dim)

    @property
    def parsed(self) -> Spec:
        """The spec. Raises `UserError` where the configuration has none."""
        if self.spec is None:
            raise UserError("spec: missing (AllotropeConfig(spec=...) takes a Spec, its data, a YAML file or a preset)")
        return _parsed(json.dumps(self.spec))

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "spec" and value is not None:
            if isinstance(value, str | Path):
                value = load(value)
            value = plain(value if isinstance(value, Spec) else parse(dict(value), CONFIG))
        if key in DERIVED:
            follows = getattr(self, key)
            if value != follows:
                raise UserError(f"{key}: {value!r} is not what the spec says, {follows!r} (change the spec)")
            return
        super().__setattr__(key, value)

    def to_dict(self) -> dict[str, Any]:
        """Everything that config.json holds, the names that follow from the spec included."""
        return super().to_dict() | ({} if self.spec is None else self.derived())

    def derived(self) -> dict[str, Any]:
        """The names that follow from the spec."""
        return {name: getattr(self, name) for name in DERIVED if hasattr(self, name)}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """config.json, and spec.yaml beside it: the folder is then one of our checkpoints too."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / SPEC).write_text(dump(self.parsed), encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json; where a folder has none (a training run's), its spec.yaml and the ids of its tokenizer."""
        folder = Path(pretrained_model_name_or_path)
        if (folder / SPEC).is_file() and not (folder / CONFIG).is_file():
            text = Text.read(folder)
            data = {"model_type": cls.model_type, "spec": plain(load(folder)), **({} if text is None else _ends(text))}
            return data, {k: v for k, v in kwargs.items() if k not in _PLACES}
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)


DERIVED = tuple(
    name for name, value in vars(AllotropeConfig).items() if isinstance(value, property) and name != "parsed"
)

_PLACES = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies", "subfolder", "_from_auto",
           "_from_pipeline", "gguf_file")  # fmt: skip
"""Arguments that say where to find a file, which a local folder needs none of."""


def _ends(text: Text) -> Mapping[str, Any]:
    ids = sorted(text.eos_ids)
    return {"bos_token_id": text.bos_id, "eos_token_id": ids[0] if len(ids) == 1 else ids or None}
