"""What is minimised: losses by name, and what keeps experts in balance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spec.config import Spec
from spec.show import short
from train.config import TrainConfig
from train.data.tokenizer import TextTokenizer
from train.losses import teacher, user
from train.losses.objective import Distilled, Objective, Smoothed, Written
from train.losses.routers import Routers, check, routers_of, routing
from train.parallel import Ranks

__all__ = ["KINDS", "Losses", "Objective", "Routers", "Setting", "build", "check", "describe", "routers_of"]


@dataclass(frozen=True)
class Setting:
    """What a loss may depend on."""

    config: TrainConfig
    spec: Spec
    tokenizer: TextTokenizer
    length: int
    """Tokens of a sequence."""
    dtype: torch.dtype
    """In which the run computes, and a teacher's weights are held (but float16)."""
    ranks: Ranks


def _text(s: Setting) -> Objective:
    loss, device = s.config.loss, s.ranks.device
    return Smoothed(device, loss.label_smoothing, loss.z) if loss.label_smoothing or loss.z else Objective(device)


def _distilled(s: Setting) -> Objective:
    loss, d = s.config.loss, s.ranks.degrees
    assert loss.teacher is not None, "checked"
    ends = s.ranks.place("pp") == d.pp - 1  # the only stage that has a loss
    dtype = torch.float32 if s.dtype == torch.float16 else s.dtype  # a teacher may reach beyond what float16 holds
    taught = teacher.load(loss.teacher, s.spec, s.tokenizer, s.length, dtype, s.ranks) if ends else None
    return Distilled(s.ranks.device, _text(s), taught, loss)


KINDS: Mapping[str, Callable[[Setting], Objective]] = {"cross_entropy": _text, "distillation": _distilled}
"""By `loss.kind`; any other kind is a function in a file of the user's."""


def build(s: Setting) -> Objective:
    """The objective that the configuration names. Raises `UserError`."""
    kind, device = s.config.loss.kind, s.ranks.device
    if kind in KINDS:
        return KINDS[kind](s)
    return Written(device, user.load(kind, s.spec.vocab_size, device))


def describe(c: TrainConfig, spec: Spec, length: int) -> str:
    """What will be minimised, in a line. Raises `UserError` for what can be known of it before a run: a function that
    is no loss, a teacher that does not fit."""
    loss = c.loss
    check(spec, c.experts)
    text = "cross-entropy" if loss.kind in KINDS else loss.kind
    text += f", label smoothing {loss.label_smoothing:g}" if loss.label_smoothing else ""
    text += f", {loss.z:g} log(Z)^2" if loss.z else ""
    if loss.kind not in KINDS:
        user.load(loss.kind, spec.vocab_size, torch.device("cpu"))
    elif loss.teacher is not None:
        with teacher.opened(loss.teacher) as source:
            teacher.fits(source, spec, length)
            weights = short(source.weights).strip()
        of, to = ("teacher", "student") if loss.divergence == "forward" else ("student", "teacher")
        kl = f"KL({of} || {to}) at temperature {loss.temperature:g} from {loss.teacher} ({weights} parameters)"
        text = f"{kl} + {loss.text_weight:g} x {text}" if loss.text_weight else kl
    return text + routing(spec, c.experts)


@dataclass
class Losses:
    """All that is minimised in a run, and what it reports of itself."""

    objective: Objective = field(default_factory=Objective)
    routers: Routers | None = None

    def report(self, ranks: Ranks, loss: Tensor, valid: int, detailed: bool) -> tuple[float, dict[str, float]]:
        """What a step's batch of `valid` targets has cost, a target and over all ranks, and what it is made of: the
        plain cross-entropy where that is another number. `loss` is this rank's share; `detailed` adds each layer."""
        summed, *sums = ranks.sum(float(loss), *self.objective.take().tolist())
        parts = {name: value / max(1, valid) for name, value in zip(self.objective.parts, sums, strict=True)}
        if self.routers is None:
            return summed, parts
        added, figures = self.routers.collect(valid, detailed)
        return summed + added, {"cross_entropy": summed} | parts | figures

    def correct(self) -> None:
        """Beside an optimizer step: what changes weights without a gradient."""
        if self.routers is not None:
            self.routers.correct()
