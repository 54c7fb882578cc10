"""Quantization-aware training: at which levels the forward pass reads the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import BeforeValidator

from spec.config import Model, Positive
from spec.errors import Problem, nearest
from spec.levels import GROUPS
from train.config.fields import Count, unused
from train.config.run import listed

if TYPE_CHECKING:
    from train.config.top import TrainConfig

NONE = "none"


class Quant(Model):
    """The level that the model is trained for, in the words of `convert`."""

    level: Annotated[str, Parameter(name="--quant")] = NONE
    """A portable level with codes, `q4`, `q4-g128` or `q8`: forward passes read the weights as `convert --quant` of
    the same level ships them, the optimizer changes those behind them. `none` = full precision."""
    override: Annotated[
        tuple[str, ...], BeforeValidator(listed), Parameter(name="--quant.override", negative="", n_tokens=1)
    ] = ()
    """Other levels for some matrices, `head=q8,layers.*.attn.v=q8`, as `convert --override` takes them."""
    bits: Annotated[Positive | None, Parameter(name="--quant.bits")] = None
    """Bits per weight over all matrices, spent on int8 beside 4 bits; none = 4.95."""
    start: Annotated[Count | None, Parameter(name="--quant.start")] = None
    """Steps in full precision before; none = three quarters of all steps, with `init` 0."""

    @property
    def on(self) -> bool:
        """Whether there is anything to quantize."""
        return self.level != NONE

    @property
    def ships_at(self) -> str:
        """The level to convert to."""
        return self.level if self.on else "q4"

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """Glob and level of each override."""
        return tuple((glob.strip(), level.strip()) for glob, _, level in (o.partition("=") for o in self.override))


def leveled(value: Any) -> Any:
    """`quant: q4` for `quant: {level: q4}`."""
    return {"level": value} if isinstance(value, str) else value


def problems(c: TrainConfig) -> list[Problem]:
    """What contradicts itself in what is quantized, or is rounded a second time by something else."""
    q, out = c.quant, list[Problem]()
    if not q.on:
        return unused(
            "quant", q, ("override", "bits", "start"), "is for a run that quantizes, and quant=none", "quant q4"
        )
    if q.level not in GROUPS:
        several = [part.strip() for part in q.level.split(",") if part.strip()]
        fix = nearest(q.level, [NONE, *GROUPS])
        if len(several) > 1:
            fix = f"--quant {several[-1]}; what the model shall ship at later is --ship {q.level}"
        return [Problem("quant.level", q.level, "is no level to train at", fix)]
    out += [
        Problem("quant.override", o, "names no level", "layers.*.attn.v=q8")
        for o, (glob, level) in zip(q.override, q.overrides, strict=True)
        if not (glob and level)
    ]
    if q.start is not None and q.start >= c.steps:
        rule = f"steps in full precision leave none of steps={c.steps} to quantize"
        out.append(Problem("quant.start", q.start, rule, f"try {c.steps * 3 // 4}"))
    if c.precision == "fp8":
        rule = f"would round the codes of quant={q.level} once more, to 4 bits"
        out.append(Problem("precision", c.precision, rule, "precision bfloat16"))
    if c.checkpoint.dtype == "bfloat16":
        rule = f"has 8 bits, and a code times its scale at quant={q.level} up to 16"
        out.append(Problem("checkpoint.dtype", c.checkpoint.dtype, rule, "checkpoint.dtype float32"))
    return out


__all__ = ["NONE", "Quant", "leveled", "problems"]
