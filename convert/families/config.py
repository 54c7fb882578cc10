"""Reading a config.json so that nothing is overlooked: every key is read, known not to matter, or an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spec.errors import Problem, SpecError, nearest
from spec.layout import Rule

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
    pretraining_tp _attn_implementation attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    gradient_checkpointing
    """.split()  # noqa: SIM905
)
"""Keys that change nothing about the function: bookkeeping, sampling defaults, kernel choices, token ids (the
tokenizer's files have them), and `pretraining_tp`, which slices the same products."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None, {}),
    "rope_interleaved": (False,),
}
"""Keys that would change it: fine at these values, refused by name at others."""


class Config:
    """A config.json being read. `take` checks types; `done` reports every problem and every key nobody took."""

    def __init__(self, data: Mapping[str, Any], source: str, defaults: Mapping[str, Any]) -> None:
        self.data, self.source, self.defaults = dict(data), source, dict(defaults)
        self.taken: set[str] = set()
        self.problems: list[Problem] = []

    def take(self, key: str, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
        """The value of a key, or the family's published default; `optional` allows null. A wrong type is a problem."""
        self.taken.add(key)
        if key not in self.data and key not in self.defaults:
            if not optional:
                self.problems.append(Problem(key, None, "is missing", "config.json has to say it"))
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

    def bad(self, key: str, value: object, rule: str, fix: str = "") -> None:
        """Note a problem."""
        self.problems.append(Problem(key, value, rule, fix))

    def done(self) -> None:
        """Raises `SpecError` with everything that was wrong, unknown keys included."""
        known = self.taken | IGNORED | set(NEUTRAL)
        for key, value in self.data.items():
            if key in NEUTRAL and value not in NEUTRAL[key]:
                self.bad(key, value, "changes the function and is not supported", f"supported: {NEUTRAL[key][0]}")
            elif key not in known:
                hint = nearest(key, self.taken)
                fix = "" if hint.startswith("known") else hint
                self.bad(key, value, "is an unknown key, and unknown keys may change the function", fix)
        if self.problems:
            raise SpecError(self.problems, self.source)


@dataclass(frozen=True)
class Family:
    """How one model_type is read."""

    name: str
    architecture: str
    """The class that config.json may name: other heads (classification, reward) are other functions."""
    to_spec: Callable[[Config], dict[str, Any]]
    """The spec as plain data; values may be missing where the config has problems, which `Config.done` then raises."""
    rules: tuple[Rule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that the family's own code has where config.json is silent."""
    recomputed: str = r"(?!)"
    """Pattern of tensors that hold nothing but what the config says (rotary frequencies)."""
