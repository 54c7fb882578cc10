"""What a training run is: one frozen configuration, from a YAML file, the command line, or both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import BeforeValidator, Field, ValidationError

from spec.config import Model, Positive, Probability
from spec.errors import Problem, SpecError, UserError, problems_from

Size = Annotated[int, Field(ge=1)]  # not strict as in a spec: values come from the command line too
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Data(Model):
    """The text, and how it is cut into sequences."""

    source: Annotated[str, Parameter(name="--data")] = "stdlib"
    """A text file, a folder of text files, or `stdlib`: the Python standard library's own source."""
    length: Annotated[Size | None, Parameter(name="--data.length")] = None
    """Tokens in a sequence; none = the spec's context."""
    document_mask: Annotated[bool, Parameter(name="--data.document_mask")] = False
    """Whether documents packed into one sequence are hidden from each other, positions beginning anew in each."""
    validation: Annotated[Annotated[float, Field(ge=0, lt=1)], Parameter(name="--data.validation")] = 0.05
    """Share of the documents held out for validation, chosen by their hashes."""
    cache: Annotated[str | None, Parameter(name="--data.cache")] = None
    """Folder for tokenizers and tokenised text; none = the user's cache folder."""


class Batch(Model):
    """How many sequences an optimizer step sees, and how many at a time."""

    sequences: Size = 4
    """Sequences in an optimizer step, over all ranks."""
    micro: Size | None = None
    """Sequences in one forward pass on one rank; none = the rank's share of the step. Fewer accumulate gradients."""


class Optimizer(Model):
    """AdamW (Loshchilov & Hutter 2019), and what happens to the gradients before it."""

    lr: Positive = 1.5e-3
    """Peak learning rate."""
    betas: Annotated[tuple[Probability, Probability], Parameter(negative="")] = (0.9, 0.99)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Decoupled weight decay of the matrices."""
    decay_embeddings: bool = False
    """Whether embeddings decay too (a tied head is an embedding)."""
    decay_norms: bool = False
    """Whether norm gains, biases and attention sinks decay too."""
    clip: Positive | None = 1.0
    """Largest global norm of the gradients; none = no clipping."""
    max_skipped: Size = 10
    """The run ends after this many steps in a row whose loss or gradients are not finite."""


class Schedule(Model):
    """The learning rate over the steps: linear warm-up, then half a cosine."""

    warmup: Count | None = None
    """Steps of warm-up; none = a twentieth of all steps."""
    final: Fraction = 0.05
    """Learning rate of the last step, as a share of the peak."""


class Validation(Model):
    """When the held-out documents are scored."""

    every: Size | None = None
    """Steps between two scores; none = a fifth of all steps, at least 20. The last step is always scored."""
    tokens: Size = 32768
    """Tokens scored, spread evenly over the held-out documents."""


class Checkpoint(Model):
    """When the run is saved."""

    every: Size = 100
    """Steps between two checkpoints. The last step is always saved."""
    keep: Size = 2
    """Checkpoints kept, the newest."""


def _source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class TrainConfig(Model):
    """A training run."""

    spec: str = "tiny"
    """A preset, a YAML file, or a folder with a spec.yaml."""
    data: Annotated[Data, BeforeValidator(_source), Parameter(name="*")] = Data()
    tokenizer: str | None = None
    """A tokenizer.json or a folder that holds one; none = train a byte-level BPE on the text."""
    out: str | None = None
    """The run's folder; none = runs/NAME of the spec."""
    steps: Size = 600
    """Optimizer steps of the whole run; the schedule spans them."""
    seed: Count = 0
    """Seeds initialisation, the order of the data and dropout."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward and backward pass; weights, gradients and moments stay float32. `auto` is bfloat16 on
    CUDA devices that have it, float32 elsewhere."""
    log_every: Size = 10
    """Steps between two lines of progress in a log file; train.jsonl has every step."""
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return self.steps // 20 if self.schedule.warmup is None else self.schedule.warmup

    @property
    def validate_every(self) -> int:
        """Steps between two validations."""
        return self.validation.every or max(20, self.steps // 5)


def _contradictions(c: TrainConfig) -> list[Problem]:
    """What no single field shows. Asked of the whole configuration only: a layer of it may be half a truth."""
    out: list[Problem] = []
    if c.batch.micro is not None and c.batch.sequences % c.batch.micro:
        near = [n for n in range(1, c.batch.sequences + 1) if c.batch.sequences % n == 0]
        best = min(near, key=lambda n: abs(n - (c.batch.micro or 0)))
        rule = f"does not divide batch.sequences={c.batch.sequences}"
        out.append(Problem("batch.micro", c.batch.micro, rule, f"try {best}"))
    if c.schedule.warmup is not None and c.schedule.warmup >= c.steps:
        rule = f"leaves no step of steps={c.steps} after the warm-up"
        out.append(Problem("schedule.warmup", c.schedule.warmup, rule, "lower it, or raise steps"))
    return out


def parse(data: Mapping[str, Any], source: str = "") -> TrainConfig:
    """A configuration from plain data. Raises `SpecError` with every problem: path, value, rule, fix."""
    try:
        return TrainConfig.model_validate(dict(data))
    except ValidationError as e:
        raise SpecError(problems_from(e, data, TrainConfig), source) from None


def read(path: str | Path) -> dict[str, Any]:
    """The plain data of a YAML file, checked. Raises `UserError`."""
    from spec.load import read_yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    data = read_yaml(text, str(path)) if text.strip() else {}
    return parse(data, str(path)).model_dump(exclude_unset=True)


def dump(config: TrainConfig) -> str:
    """The whole configuration as YAML; `parse(read_yaml(dump(c)))` equals `c`."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def layered(*layers: Mapping[str, Any]) -> TrainConfig:
    """A configuration from plain data laid over each other; the last one wins. Raises `SpecError`."""
    from spec.config import merge

    data: dict[str, Any] = {}
    for layer in layers:
        data = merge(data, layer)
    config = parse(data)
    if problems := _contradictions(config):
        raise SpecError(problems)
    source = config.data.source
    if source == "stdlib":
        return config
    # A run may be resumed from another folder.
    absolute = str(Path(source).expanduser().absolute())
    return config.model_copy(update={"data": config.data.model_copy(update={"source": absolute})})


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """`optimizer.lr: 0.001 -> 0.0005`, one line a field."""

    def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in data.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    a, b = flat(old.model_dump()), flat(new.model_dump())
    return [f"{key}: {a[key]} -> {b[key]}" for key in a if a[key] != b[key]]


__all__ = ["TrainConfig", "differences", "dump", "layered", "parse", "read"]
