"""A file's metadata being read so that nothing is overlooked: every key is read, known not to matter, or an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from spec.errors import Problem, SpecError

BOOKKEEPING = re.compile(
    r"general\.(?!tensor_extra\.).*|split\..*|tokenizer\..*|quantize\..*|imatrix\..*|allotrope\..*"
)
"""Keys outside the architecture that change nothing about the function (the tokenizer's are read with it)."""

READ_ELSEWHERE = re.compile(r"adapter\..*|xielu\..*|general\.tensor_extra\..*|clip\..*|diffusion\..*")
"""Keys by which llama.cpp computes something else."""

IGNORED = frozenset(
    """vocab_size tensor_data_layout rope.scaling.finetuned attention.layer_norm_epsilon
    attention.layer_norm_rms_epsilon""".split()  # noqa: SIM905
)
"""Keys of an architecture that its graph does not use: another kind of norm's epsilon, the number of rows that the
embedding's shape gives too, a switch that only some architectures read; where one reads it, its row says so."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "pooling_type": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0,),
    "expert_weights_norm": (False,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (True, False),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
}
"""Keys that would change it, where nothing reads them: fine at these values, refused by name at others."""

REQUIRED = object()
"""As a default: the key has to be there."""


class Keys:
    """Metadata of one architecture. Everything wrong is collected; `done` raises it together with what nobody read."""

    def __init__(self, data: Mapping[str, Any], arch: str, source: str, fixed: Mapping[str, Any] | None = None) -> None:
        """fixed: keys that the architecture's loader insists on, with values that change nothing."""
        self.data, self.arch, self.source, self.fixed = data, arch, source, fixed or {}
        self.taken: set[str] = set()
        self.problems: list[Problem] = []

    def __contains__(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.data

    def bad(self, key: str, rule: str, fix: str = "") -> None:
        """Note a problem with a key."""
        name = f"{self.arch}.{key}"
        self.problems.append(Problem(name, self.data.get(name), rule, fix))

    def _take(self, key: str, default: Any) -> Any:
        self.taken.add(key)
        value = self.data.get(f"{self.arch}.{key}", REQUIRED)
        if value is REQUIRED and default is REQUIRED:
            self.bad(key, "is missing")
            return None
        return default if value is REQUIRED else value

    def whole(self, key: str, default: Any = REQUIRED) -> Any:
        """A number of things."""
        value = self._take(key, default)
        if value is None or value is default:
            return value
        if type(value) is not int or not 0 <= value < 1 << 31:
            self.bad(key, "is no number of things")
            return None
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite number, as the shortest decimal that is this float32: what its writer meant."""
        value = self._take(key, default)
        if value is None or value is default:
            return value
        if type(value) not in (int, float) or not np.isfinite(value):
            self.bad(key, "is no finite number")
            return None
        return decimal(value)

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        value = self._take(key, default)
        if value is not None and not isinstance(value, str):
            self.bad(key, "is no text")
            return None
        return value

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        value = self._take(key, default)
        if value is not None and not isinstance(value, bool):
            self.bad(key, "is neither true nor false")
            return None
        return value

    def layers(self, key: str, depth: int, kind: type, default: Any = REQUIRED) -> list[Any] | None:
        """A value for each layer, from one for all or a list."""
        value = self._take(key, default)
        values = value if isinstance(value, list) else [value] * depth
        if value is None:
            return None
        if len(values) < depth or not all(type(v) is kind or (kind is bool and v in (0, 1)) for v in values):
            self.bad(key, f"is no {kind.__name__} for each of {depth} layers")
            return None
        return [kind(v) for v in values[:depth]]

    def raw(self, key: str, default: Any = None) -> Any:
        """Whatever is there."""
        return self._take(key, default)

    def done(self) -> None:
        """Raises `SpecError` with everything that was wrong, keys that nobody read included."""
        for name, value in self.data.items():
            key = name.removeprefix(f"{self.arch}.")
            if key == name:
                if READ_ELSEWHERE.fullmatch(name):
                    self.problems.append(Problem(name, _short(value), "changes the function and is not read"))
                continue  # llama.cpp reads nothing else outside the architecture's keys
            if key in self.taken or (key in IGNORED and key not in self.fixed):
                continue
            values = value if isinstance(value, list) else [value]
            if (key in NEUTRAL and all(v in NEUTRAL[key] for v in values)) or (
                key in self.fixed and all(v == self.fixed[key] for v in values)
            ):
                continue
            known = key in NEUTRAL or key in self.fixed
            rule = "changes the function and is not supported" if known else "is an unknown key"
            self.problems.append(Problem(name, _short(value), rule, "unknown keys may change the function"))
        self.check()

    def check(self) -> None:
        """Raises `SpecError` with everything that was wrong so far."""
        if self.problems:
            raise SpecError(self.problems, self.source)


def decimal(value: float) -> float:
    """The shortest decimal that rounds to this float32; a number that is no float32 stays as it is."""
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else float(value)


def _short(value: Any) -> Any:
    return f"{len(value)} values" if isinstance(value, list) and len(value) > 8 else value
