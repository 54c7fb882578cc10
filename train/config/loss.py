"""What is minimised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from spec.config import Model, Positive, Probability
from spec.errors import Problem, nearest
from train.config.fields import NonNegative, absolute, file_of, unused

if TYPE_CHECKING:
    from train.config.top import TrainConfig

KINDS = ("cross_entropy", "distillation")
"""Losses by name; any other is a function in a file of the user's."""


def _kind(kind: str) -> str:
    file = file_of(kind)
    if kind not in KINDS and not file:
        raise ValueError(f"is no loss ({nearest(kind, KINDS)} or path/to/file.py:function, one of yours)")
    return absolute(file) + kind[len(file) :]


class Loss(Model):
    """The loss of a token: summed over the targets that count, divided by how many there are in the whole step."""

    kind: Annotated[str, AfterValidator(_kind)] = "cross_entropy"
    """`cross_entropy`, `distillation`, or `path/to/file.py:function` of yours: (logits [N, V], targets [N]) -> sum."""
    label_smoothing: Probability = 0.0
    """Share of the target's probability that is spread over the vocabulary (Szegedy et al. 2016)."""
    z: NonNegative = 0.0
    """Weight of log(Z)^2, Z the softmax's denominator: keeps logits near 0 (PaLM, Chowdhery et al. 2022: 1e-4)."""
    teacher: Annotated[str | None, Field(min_length=1), AfterValidator(lambda p: p and absolute(p))] = None
    """Distillation: a checkpoint folder of ours, a Hugging Face folder, a GGUF file, or hf:owner/name, with the run's
    own tokenizer."""
    temperature: Positive = 1.0
    """Distillation: both distributions are those of logits divided by it, and the divergence is multiplied by its
    square (Hinton et al. 2015)."""
    divergence: Literal["forward", "reverse"] = "forward"
    """Distillation: `forward` is KL(teacher || student), `reverse` KL(student || teacher) (Gu et al. 2024)."""
    text_weight: NonNegative = 1.0
    """Distillation: weight of the cross-entropy with the text, beside the divergence from the teacher."""


class Experts(Model):
    """What keeps a mixture's router in balance; for specs with experts alone."""

    balance: NonNegative | None = None
    """Weight of the load-balancing loss of each document (DeepSeek-V3's sequence-wise loss); none = 0.01, and 0 with
    `bias_update`."""
    z: NonNegative = 0.0
    """Weight of the squared log-sum-exp of the router's logits (ST-MoE, Zoph et al. 2022: 1e-3)."""
    bias_update: NonNegative = 0.0
    """Step of the router's correction towards equal loads, after each optimizer step (Wang et al. 2024: 1e-3); needs
    `router: {correction: true}` in the spec."""


def problems(c: TrainConfig) -> list[Problem]:
    """Fields of `loss` that contradict each other."""
    loss = c.loss
    out: list[Problem] = []
    if loss.kind == "distillation":
        if loss.teacher is None:
            rule = "is missing, and loss.kind is distillation"
            out.append(Problem("loss.teacher", None, rule, "name the teacher's folder"))
        if loss.text_weight == 0:
            rule = "belongs to the cross-entropy, and loss.text_weight is 0"
            out += unused("loss", loss, ("label_smoothing", "z"), rule, "leave one out")
    else:
        only = ("teacher", "temperature", "divergence", "text_weight")
        rule = f"is for distillation, and loss.kind is {loss.kind}"
        out += unused("loss", loss, only, rule, "loss.kind: distillation, or leave it out")
    if loss.kind not in KINDS:
        rule = f"is for {' and '.join(KINDS)}, and loss.kind is a function of yours"
        out += unused("loss", loss, ("label_smoothing", "z"), rule, "leave it out, and let the function do it")
    return out
