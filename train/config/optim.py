"""The optimizer, what happens to gradients before it, the average of the weights after it, and the learning rate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from cyclopts import Parameter
from pydantic import AfterValidator, BeforeValidator, model_validator

from spec.config import Model, Positive, Probability
from spec.errors import Problem, nearest
from train.config.fields import Count, Fraction, NonNegative, Size, absolute, file_of

if TYPE_CHECKING:
    from train.config.top import TrainConfig

_ADAM: Mapping[str, Any] = {"lr": 1.5e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}

KINDS: Mapping[str, Mapping[str, Any]] = {
    "adamw": _ADAM,
    "adamw8bit": {**_ADAM, "options": {}},
    "muon": {
        **_ADAM,
        "rest_lr": None,
        "momentum": 0.95,
        "nesterov": True,
        "options": {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 5},
    },
    "lion": {"lr": 1.5e-4, "betas": (0.9, 0.99), "weight_decay": 1.0},
    "soap": {
        **_ADAM,
        "lr": 3e-3,
        "betas": (0.95, 0.95),
        "rest_lr": None,
        "options": {"precondition_frequency": 10, "max_precondition_dim": 10000},
    },
    "adafactor": {"lr": 1e-2, "weight_decay": 0.0, "options": {"beta2_decay": -0.8, "d": 1.0}},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4},
}
"""Of each optimizer the fields that it has, with their defaults. Those of `options` bear the library's own names."""

CHOICES: Mapping[str, tuple[str, ...]] = {"adjust_lr_fn": ("original", "match_rms_adamw")}
"""What an option that is a word may be."""

OWN = ("lr", "rest_lr", "betas", "eps", "momentum", "nesterov", "weight_decay", "options")
"""Fields that not every optimizer has."""


def _fill(model: Model, values: Mapping[str, Any]) -> None:
    """Give fields that are none these values, which do not count as chosen by the user."""
    vars(model).update({name: value for name, value in values.items() if getattr(model, name) is None})


def _kind(kind: str) -> str:
    file = file_of(kind)
    if kind not in KINDS and not file:
        raise ValueError(f"is no optimizer ({nearest(kind, KINDS)} or path/to/file.py:name, one of yours)")
    return absolute(file) + kind[len(file) :]


def _typed(options: Any) -> Any:
    """Numbers and truth values of a command line, which are text there."""
    if not isinstance(options, Mapping):
        return options
    out = dict(options)
    for name, value in out.items():
        with suppress(ValueError):
            out[name] = json.loads(value) if isinstance(value, str) else value
    return out


class Optimizer(Model):
    """The optimizer. docs/training-optimizers.md says which one has which of the fields, and their defaults."""

    kind: Annotated[str, AfterValidator(_kind)] = "adamw"
    """`adamw`, `adamw8bit`, `muon`, `lion`, `soap`, `adafactor`, `sgd`, or `path/to/file.py:name` of yours."""
    lr: Positive | None = None
    """Peak learning rate; none = the optimizer's own, 1.5e-3 for AdamW."""
    embedding_lr: Positive | None = None
    """Peak learning rate of the embeddings (a tied head is one); none = that of their optimizer."""
    rest_lr: Positive | None = None
    """Muon and SOAP, which take the hidden matrices: peak learning rate of AdamW for all others; none = lr."""
    betas: Annotated[tuple[Probability, Probability] | None, Parameter(negative="")] = None
    """Decay of the first and second moment; none = the optimizer's own, 0.9 and 0.99 for AdamW."""
    eps: Positive | None = None
    """Added to the root of the second moment; none = 1e-8."""
    momentum: Probability | None = None
    """Muon and SGD: decay of the momentum; none = 0.95 and 0.9."""
    nesterov: bool | None = None
    """Muon and SGD: whether the step looks ahead; none = true for Muon, false for SGD."""
    weight_decay: NonNegative | None = None
    """Weight decay of the matrices, decoupled (Loshchilov & Hutter 2019) but for SGD; none = the optimizer's own, 0.1
    for AdamW."""
    options: Annotated[dict[str, bool | int | float | str] | None, BeforeValidator(_typed)] = None
    """What else the optimizer can be told, by the names of its library."""
    decay_embeddings: bool = False
    """Whether embeddings decay too (a tied head is an embedding)."""
    decay_norms: bool = False
    """Whether norm gains, biases and attention sinks decay too."""
    clip: Annotated[Positive | None, BeforeValidator(lambda v: None if v == "none" else v)] = 1.0
    """Largest global norm of the gradients, or, with clip_by value, of any single one; none = no clipping."""
    clip_by: Literal["norm", "value"] = "norm"
    """What clip limits: `norm` scales all gradients alike, `value` cuts each element on its own."""
    ema: Probability | None = None
    """Decay of an average of the weights, 0.999 for instance. Validation and the published model then use the average;
    training goes on from the weights. none = no average."""
    max_skipped: Size = 10
    """The run ends after this many steps in a row whose loss or gradients are not finite."""

    @model_validator(mode="after")
    def _own_defaults(self) -> Self:
        own = KINDS.get(self.kind, {"lr": _ADAM["lr"], "weight_decay": 0.0, "options": {}})
        _fill(self, own)
        if "options" in own:
            vars(self)["options"] = {**own["options"], **(self.options or {})}
        return self

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        assert self.lr is not None, "every kind has one"
        return self.lr


Shape = Literal["linear", "sqrt", "cosine"]

_FINAL: Mapping[str, float] = {"cosine": 0.05, "linear": 0.05, "wsd": 0.0}
"""Schedules that end at a share of the peak, and its default."""


class Schedule(Model):
    """The learning rate over the steps: linear warm-up, then what `kind` says."""

    kind: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """`cosine` (half a period; Loshchilov & Hutter 2017), `linear`, `wsd` (warm-up, stable, decay; Hu et al. 2024),
    `inverse_sqrt` (Vaswani et al. 2017) or `constant`."""
    warmup: Count | None = None
    """Steps of warm-up; none = a twentieth of all steps."""
    warmup_tokens: Size | None = None
    """Tokens of warm-up, in place of steps."""
    final: Fraction | None = None
    """Learning rate of the last step, as a share of the peak; none = 0.05, and 0 for wsd."""
    decay: Fraction | None = None
    """wsd: the share of all steps that decay, at the end; none = 0.2."""
    decay_shape: Shape | None = None
    """wsd: `linear`, `sqrt` (1 - sqrt of the share of the decay that is done; Hägele et al. 2024) or `cosine`;
    none = sqrt."""

    @model_validator(mode="after")
    def _own_defaults(self) -> Self:
        own: dict[str, Any] = {"final": _FINAL[self.kind]} if self.kind in _FINAL else {}
        if self.kind == "wsd":
            own |= {"decay": 0.2, "decay_shape": "sqrt"}
        _fill(self, own)
        return self


def problems(c: TrainConfig) -> list[Problem]:
    """Fields of `optimizer` and `schedule` that contradict each other."""
    return [*_optimizer(c.optimizer), *_schedule(c)]


def _optimizer(o: Optimizer) -> list[Problem]:
    out: list[Problem] = []
    if o.kind not in KINDS:
        for name in OWN:
            if name not in ("lr", "weight_decay", "options") and getattr(o, name) is not None:
                rule = "is not passed to an optimizer of yours"
                out.append(
                    Problem(f"optimizer.{name}", getattr(o, name), rule, f"put it into optimizer.options.{name}")
                )
        return out
    own = KINDS[o.kind]
    for name in OWN:
        if name not in own and name != "options" and getattr(o, name) is not None:
            has = ", ".join(n for n in own if n != "options")
            out.append(Problem(f"optimizer.{name}", getattr(o, name), f"{o.kind} has none", f"it has {has}"))
    known: Mapping[str, Any] = own.get("options", {})
    for name, value in (o.options or {}).items():
        path = f"optimizer.options.{name}"
        if name not in known:
            fix = nearest(name, known) if known else f"{o.kind} has no options"
            out.append(Problem(path, value, f"is no option of {o.kind}", fix))
        elif not isinstance(value, (int, float) if isinstance(known[name], float) else type(known[name])):
            rule = f"is no {type(known[name]).__name__}"
            out.append(Problem(path, value, rule, f"{known[name]} is the default"))
        elif name in CHOICES and value not in CHOICES[name]:
            out.append(Problem(path, value, f"is no {name} of {o.kind}", nearest(str(value), CHOICES[name])))
    if o.nesterov and o.momentum == 0:
        out.append(Problem("optimizer.nesterov", True, "needs a momentum", "momentum: 0.9, or nesterov: false"))
    return out


def _schedule(c: TrainConfig) -> list[Problem]:
    s, out = c.schedule, list[Problem]()
    for name, kinds in {"final": tuple(_FINAL), "decay": ("wsd",), "decay_shape": ("wsd",)}.items():
        value = getattr(s, name)
        if value is not None and s.kind not in kinds:
            rule = f"is for {' and '.join(kinds)}, and schedule.kind is {s.kind}"
            out.append(Problem(f"schedule.{name}", value, rule, "leave it out"))
    if s.warmup is not None and s.warmup_tokens is not None:
        rule = f"contradicts schedule.warmup={s.warmup}"
        out.append(Problem("schedule.warmup_tokens", s.warmup_tokens, rule, "leave one of them out"))
    if s.warmup is not None and s.warmup >= c.steps:
        rule = f"leaves no step of steps={c.steps} after the warm-up"
        out.append(Problem("schedule.warmup", s.warmup, rule, "lower it, or raise steps"))
    if s.decay is not None and s.warmup_tokens is None and c.warmup + s.decay * c.steps > c.steps:
        rule = f"of steps={c.steps} begins before the warm-up's {c.warmup} steps have ended"
        out.append(Problem("schedule.decay", s.decay, rule, "lower one of them"))
    return out
