"""Reading a config.json so that nothing is overlooked: every key is read, known not to matter, or an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from backends.hf.carriers import Carrier
from spec.errors import Problem, SpecError, nearest

IGNORED = frozenset(
    """
    _name_or_path architectures dtype torch_dtype transformers_version transformers.js_config model_type
    use_cache return_dict output_attentions output_hidden_states return_dict_in_generate torchscript use_bfloat16
    tf_legacy_loss bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id tokenizer_class prefix suppress_tokens begin_suppress_tokens
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences exponential_decay_length_penalty remove_invalid_values task_specific_params problem_type
    id2label label2id num_labels finetuning_task chunk_size_feed_forward is_llama_config unsloth_fixed unsloth_version
    pretraining_tp _attn_implementation attn_implementation experts_implementation _attn_implementation_autoset
    _flash_attn_2_enabled gradient_checkpointing cache_implementation auto_map
    """.split()  # noqa: SIM905
)
"""Keys that change nothing about the function: bookkeeping, sampling defaults, kernel choices, token ids (the
tokenizer's files have them), and `pretraining_tp`, which slices the same products. `done` looks at
`auto_map`."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
}
"""Keys that would change it: fine at these values, refused by name at others."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one model_type is read: by the rows that it is written by, and what cannot be derived from them."""

    carriers: tuple[Carrier, ...]
    """Its rows; of several, config.json's keys choose one."""
    covers: str = ""
    """Models by their own names, for the documentation."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that the family's own code has where config.json is silent."""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """As `NEUTRAL`, for this family's own keys."""
    ignored: frozenset[str] = frozenset()
    """As `IGNORED`, for this family's own keys."""
    classes: tuple[str, ...] = ()
    """Names beside the row's own that config.json may give the same class."""
    tidy: Callable[[Config], None] = lambda c: None
    """Brings older layouts into the present one, before anything is read."""
    layer_types: Callable[[Config, int], list[str]] | None = None
    """The kinds of layers of a depth, where config.json does not list them."""
    hidden_times: int = 0
    """MLP width in multiples of the model's, where config.json is silent."""
    theta: str = "rope_theta"
    fraction: str = "partial_rotary_factor"
    """Where transformers 4's layout has the base and the share of a head that rotates."""
    scalings: Mapping[str, str] = field(default_factory=dict)
    """What this family calls scalings otherwise."""
    recomputed: str = r"(?!)"
    """Pattern of tensors that hold nothing but what the config says (masks), rotary frequencies apart."""

    @property
    def name(self) -> str:
        """config.json's model_type."""
        return self.carriers[0].arch

    @property
    def architecture(self) -> str:
        """The class that config.json may name: other heads (classification, reward) are other functions."""
        return self.carriers[0].model


class Config:
    """A config.json being read. `take` checks types; `done` reports every problem and every key nobody took."""

    def __init__(self, data: Mapping[str, Any], source: str, family: Family) -> None:
        self.data, self.source, self.family = dict(data), source, family
        self.defaults = dict(family.defaults)
        self.taken: set[str] = set()
        self.problems: list[Problem] = []

    def take(self, key: str, kind: type | tuple[type, ...], *, optional: bool = False, what: str = "") -> Any:
        """The value of a key, or the family's published default; `optional` allows null. A wrong type is a problem.
        what: the key's meaning, for one that is missing."""
        self.taken.add(key)
        if key not in self.data and key not in self.defaults:
            if not optional:
                self.bad(key, None, "is missing", "config.json has to say it" + (f": {what}" if what else ""))
            return None
        value = self.data.get(key, self.defaults.get(key))
        if value is None and (optional or self.defaults.get(key, 0) is None):
            return None
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            self.bad(key, value, f"is no {names}", "correct config.json")
            return None
        return value

    def number(self, key: str, *, optional: bool = False) -> Any:
        """An integer or float."""
        return self.take(key, (int, float), optional=optional)

    def peek(self, key: str) -> Any:
        """The value of a key, or its default, whatever it is."""
        return self.data.get(key, self.defaults.get(key))

    def rename(self, old: str, new: str) -> None:
        """An older name of a key. Where both are there, they must agree."""
        if old in self.data and self.data.get(new, self.data[old]) == self.data[old]:
            self.data[new] = self.data.pop(old)

    def flatten(self, key: str) -> None:
        """A nested object's keys as `outer.inner`."""
        inner = self.data.pop(key, None)
        if isinstance(inner, dict):
            self.data |= {f"{key}.{name}": value for name, value in inner.items()}
        elif inner is not None:
            self.bad(key, inner, "is no mapping", "correct config.json")

    def bad(self, key: str, value: object, rule: str, fix: str = "") -> None:
        """Note a problem."""
        self.problems.append(Problem(key, value, rule, fix))

    def unplaced(self) -> list[str]:
        """Keys that nobody took and that are not known to change nothing."""
        known = self.taken | IGNORED | self.family.ignored | set(NEUTRAL) | set(self.family.neutral)
        return [k for k in self.data if k not in known and k.split(".")[-1] not in IGNORED | set(NEUTRAL)]

    def done(self) -> None:
        """Raises `SpecError` with everything that was wrong, unknown keys included."""
        neutral, unplaced = {**NEUTRAL, **self.family.neutral}, self.unplaced()
        for key, value in self.data.items():
            fine = neutral.get(key, neutral.get(key.split(".")[-1]))
            if key in unplaced:
                hint = nearest(key, self.taken)
                fix = "" if hint.startswith("known") else hint
                self.bad(key, value, "is an unknown key, and unknown keys may change the function", fix)
            elif key in self.taken:
                continue
            elif fine is not None and value not in fine:
                shown = " or ".join(map(str, fine))
                self.bad(key, value, "changes the function and is not supported", f"supported: {shown}")
        self._own_code()
        if self.problems:
            raise SpecError(self.problems, self.source)

    def _own_code(self) -> None:
        """Remote code is never run. Where its classes have the names of transformers' own for the family, it is what
        they were made of, and config.json is read as theirs; any other name may be another function."""
        named, f = self.data.get("auto_map") or {}, self.family
        if not isinstance(named, dict):
            self.bad("auto_map", named, "is no mapping", "correct config.json")
            return
        for auto, name in named.items():
            if not isinstance(name, str) or name.split(".")[-1] not in own_classes(f, auto):
                rule = "names code of the folder's own, which is never run and may do otherwise than transformers'"
                fix = f"remove auto_map if the weights are those of transformers' own {f.architecture}"
                self.bad(f"auto_map.{auto}", name, rule, fix)
                return


def own_classes(family: Family, auto: str) -> set[str]:
    """Names of transformers' classes of a family behind one of its Auto classes."""
    heads = {family.architecture, *family.classes}
    if auto == "AutoModelForCausalLM":
        return heads
    stems = {h.removesuffix("ForCausalLM").removesuffix("LMHeadModel") for h in heads}
    if family.name.endswith("_text"):
        stems |= {s + "Text" for s in stems}
    ends = {"AutoConfig": "Config", "AutoModel": "Model"}
    end = ends.get(auto, auto.removeprefix("AutoModel") if auto.startswith("AutoModelFor") else "")
    return {s + end for s in stems} if end else set()
