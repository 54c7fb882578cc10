"""What a run does beside training: scoring, saving, sampling, watching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BeforeValidator, Field

from spec.config import Model, Positive
from spec.errors import Problem
from train.config.fields import Count, NonNegative, Size, unused

if TYPE_CHECKING:
    from train.config.top import TrainConfig


def listed(value: Any) -> Any:
    """`q4,q8` as a list; the command line gives a list of such texts."""
    if isinstance(value, list | tuple):
        return [part for v in value for part in (listed(v) if isinstance(v, str) else [v])]
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


class Validation(Model):
    """When the held-out documents are scored."""

    every: Size | None = None
    """Steps between two scores; none = a fifth of all steps, at least 20. The last step is always scored."""
    tokens: Size = 32768
    """Tokens scored, spread evenly over the held-out documents."""
    at_start: bool = False
    """Whether the weights that the run begins with are scored too."""
    patience: Size | None = None
    """Scores in a row without a new best one after which the run ends; none = it goes on to its last step."""


class Checkpoint(Model):
    """When the run is saved, and in which other forms."""

    every: Size = 100
    """Steps between two checkpoints. The last step is always saved."""
    minutes: Positive | None = None
    """A checkpoint also when the last one is this old; none = by steps alone."""
    keep: Size = 2
    """Checkpoints kept, the newest."""
    best: bool = True
    """Whether a step whose validation loss is the lowest so far is saved too, and kept as long as it is."""
    asynchronous: bool | None = None
    """Whether files are written while training goes on, from a copy in the CPU's memory; none = on accelerators."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of model.safetensors. Resuming reads the training state, which has every bit."""
    shard_size: Positive = 5.0
    """Gigabytes of one file of weights; a larger model has several, and an index."""
    export: Annotated[tuple[str, ...], BeforeValidator(listed), Parameter(negative="", n_tokens=1)] = ()
    """What checkpoints are converted to beside the training, target and level: `hf:f32,gguf:q4`, or a list. f32 is
    the level of one without."""
    export_every: Size | None = None
    """Steps between two that are converted, saved for it; none = only the last step, which always is."""

    def in_background(self, device: str) -> bool:
        """Whether files are written while training goes on."""
        return device != "cpu" if self.asynchronous is None else self.asynchronous


class Samples(Model):
    """Texts that the model writes as it learns."""

    every: Count | None = None
    """Steps between two rounds of samples; none = with every validation, 0 = never."""
    prompts: Annotated[tuple[str, ...], Parameter(negative="")] = ("",)
    """Beginnings to continue; an empty one begins a document."""
    tokens: Size = 64
    """Tokens of a sample, at most."""
    temperature: NonNegative = 0.8
    """Temperature of the draws; 0 takes the likeliest token."""
    seed: Count = 0
    """Seeds the draws, apart from all that the training draws."""


Reaction = Literal["skip", "rollback", "stop"]


class Watch(Model):
    """What the run tells of itself, and what it does when the loss goes wrong."""

    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Parameter(negative="")] = ()
    """`tensorboard`, `wandb`, or both, beside train.jsonl, which is always written."""
    wandb_project: str = "allotrope"
    """Project of the W&B run."""
    wandb_mode: Literal["auto", "online", "offline"] = "auto"
    """`auto` is $WANDB_MODE, else online where a key is known and offline where none is."""
    nonfinite: Reaction = "skip"
    """A loss or gradient that is not finite: `skip` the step, `rollback` to the last checkpoint and go on behind the
    batch, or save and `stop`. In each case the optimizer never sees it."""
    spike: Literal["off", "skip", "rollback", "stop"] = "off"
    """The same for a loss or a gradient norm that leaps."""
    spike_std: Positive = 6.0
    """A loss is a spike beyond the mean of the window plus this many standard deviations (one counts as at least 1 % of
    the mean)."""
    spike_norm: Positive | None = 10.0
    """A gradient norm is a spike beyond this many times the median of the window; none = norms are not judged."""
    spike_window: Annotated[int, Field(ge=8)] = 100
    """Applied steps that are looked back on. Until there are so many, and during the warm-up, nothing is a spike."""
    rollbacks: Count = 3
    """Rollbacks of a run, at most; the next one stops it."""


Levels = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(listed), Parameter(negative="", n_tokens=1)
]
"""Precision levels, `q4,q8` or a list."""

Steps = Annotated[str, Field(pattern=r"^[1-9]\d*(\.\.[1-9]\d*)?$")]
"""`10`, or `10..12` with both ends."""


def problems(c: TrainConfig) -> list[Problem]:
    """What contradicts itself in what is watched: nothing that was asked for may never come."""
    out: list[Problem] = []
    first, _, last = (c.profile or "").partition("..")
    if last and int(last) < int(first):
        out.append(Problem("profile", c.profile, "ends before it begins", f"try {last}..{first}"))
    elif first and int(first) > c.steps:
        out.append(Problem("profile", c.profile, f"begins behind the last step, {c.steps}", "lower it"))
    w = c.watch
    if w.spike != "off" and w.spike_window >= c.steps:
        rule = f"applied steps come before the first that is judged, and steps={c.steps}"
        out.append(Problem("watch.spike_window", w.spike_window, rule, "lower it, or watch.spike off"))
    if w.spike == "off":
        names = ("spike_std", "spike_norm", "spike_window")
        out += unused("watch", w, names, "is a threshold of watch.spike, which is off")
    if c.data.validation == 0 and c.data.validation_source is None:
        fix = "data.validation 0.05, or data.validation_source"
        out += unused(
            "validation", c.validation, ("patience", "at_start"), "needs scores, and nothing is held out", fix
        )
    if not c.checkpoint.export:
        rule = "is for checkpoint.export, which names no target"
        out += unused("checkpoint", c.checkpoint, ("export_every",), rule, "checkpoint.export gguf:q4, or leave it out")
    if c.samples.every and not c.samples.prompts:
        out.append(Problem("samples.every", c.samples.every, "has no prompts to continue", 'samples: {prompts: [""]}'))
    return out
