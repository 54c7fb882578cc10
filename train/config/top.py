"""What a training run is: one frozen configuration, from a YAML file, the command line, or both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from spec.config import Model, Spec
from spec.errors import Problem, SpecError, UserError, problems_from
from train.config.data import Batch, Data
from train.config.fields import Count, Size
from train.config.loss import Experts, Loss
from train.config.loss import problems as loss_problems
from train.config.optim import Optimizer, Schedule
from train.config.optim import problems as optimizer_problems
from train.config.quant import Quant, leveled
from train.config.quant import problems as quant_problems
from train.config.run import Checkpoint, Levels, Samples, Steps, Validation, Watch
from train.config.run import problems as watch_problems
from train.config.sources import problems as source_problems
from train.config.system import Kernels, Memory, Parallel, Precision, Switch
from train.config.system import problems as system_problems


def _source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class TrainConfig(Model):
    """A training run."""

    spec: str = "tiny"
    """A preset, a YAML file, or a folder with a spec.yaml."""
    data: Annotated[Data, BeforeValidator(_source), Parameter(name="*")] = Data()
    init: str | None = None
    """Weights to begin with: a checkpoint, a Hugging Face folder, a GGUF file or hf:owner/name. The spec and the
    tokenizer are then theirs. none = random ones."""
    tokenizer: str | None = None
    """A tokenizer.json or a folder that holds one; none = train a byte-level BPE on the text."""
    out: str | None = None
    """The run's folder; none = runs/NAME of the spec."""
    steps: Size = 600
    """Optimizer steps of the whole run; the schedule spans them."""
    seed: Count = 0
    """Seeds initialisation, the order of the data and dropout."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")] = "auto"
    """`auto` (the first that is there of CUDA, XPU, MPS, CPU), `cpu`, `cuda`, `cuda:1`, `xpu` or `mps`."""
    precision: Precision = "auto"
    """Arithmetic of the forward and backward pass; weights, gradients and moments stay float32. `auto` is bfloat16 on
    GPUs that have it, float32 elsewhere. `float16` scales its loss; `fp8` is bfloat16 with 8-bit products (torchao)."""
    compile: Switch = "auto"
    """Whether layers are compiled (`true`, `false`); `auto` compiles on GPUs, and on CPUs never by itself."""
    log_every: Size = 10
    """Steps between two lines of progress in a log file; train.jsonl has every step."""
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    experts: Experts = Experts()
    parallel: Parallel = Parallel()
    memory: Memory = Memory()
    attention: Kernels = Kernels()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    samples: Samples = Samples()
    watch: Watch = Watch()
    quant: Annotated[Quant, BeforeValidator(leveled), Parameter(name="*")] = Quant()
    ship: Levels | None = None
    """Levels that the model shall ship at later: which targets carry them is said before the first step. none = that of
    `quant`, else q8 and q4."""
    profile: Steps | None = None
    """Steps to trace with torch's profiler, `10..12`; the trace and a table go to OUT/training/profile."""

    @model_validator(mode="before")
    @classmethod
    def _older(cls, data: Any) -> Any:
        """A list at `quant` is what `ship` was called once; runs of that time go on."""
        if isinstance(data, Mapping) and isinstance(data.get("quant"), list | tuple):
            return {"ship": data["quant"], **{k: v for k, v in data.items() if k != "quant"}}
        return data

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return self.steps // 20 if self.schedule.warmup is None else self.schedule.warmup

    @property
    def validate_every(self) -> int:
        """Steps between two validations."""
        return self.validation.every or max(20, self.steps // 5)

    @property
    def rounds_from(self) -> int | None:
        """The step after which weights are rounded where they are read; none = never."""
        if not self.quant.on:
            return None
        if self.quant.start is not None:
            return self.quant.start
        return 0 if self.init is not None else self.steps * 3 // 4

    def rounds(self, step: int) -> bool:
        """Whether the weights after so many steps are rounded where they are read."""
        return self.rounds_from is not None and step >= self.rounds_from

    @property
    def ships(self) -> tuple[str, ...]:
        """The levels that the model shall ship at."""
        if self.ship is not None:
            return self.ship
        return (self.quant.level,) if self.quant.on else ("q8", "q4")

    def length(self, spec: Spec) -> int:
        """Tokens of a sequence."""
        return self.data.length or spec.context

    def sampled(self, step: int) -> bool:
        """Whether samples are due by their own interval."""
        every = self.samples.every
        return bool(every) and (step % every == 0 or step == self.steps)


def _contradictions(c: TrainConfig) -> list[Problem]:
    """What no single field shows. Asked of the whole configuration only: a layer of it may be half a truth."""
    out: list[Problem] = []
    if c.batch.micro is not None and c.batch.sequences % c.batch.micro:
        near = [n for n in range(1, c.batch.sequences + 1) if c.batch.sequences % n == 0]
        best = min(near, key=lambda n: abs(n - (c.batch.micro or 0)))
        rule = f"does not divide batch.sequences={c.batch.sequences}"
        out.append(Problem("batch.micro", c.batch.micro, rule, f"try {best}"))
    return [*out, *(p for problems in _SECTIONS for p in problems(c))]


_SECTIONS = (optimizer_problems, loss_problems, source_problems, watch_problems, system_problems, quant_problems)


def parse(data: Mapping[str, Any], source: str = "") -> TrainConfig:
    """A configuration from plain data. Raises `SpecError` with every problem: path, value, rule, fix."""
    try:
        return TrainConfig.model_validate(dict(data))
    except ValidationError as e:
        raise SpecError(problems_from(e, data, TrainConfig), source) from None


def read(path: str | Path) -> dict[str, Any]:
    """The plain data of a YAML file, checked. Raises `UserError`."""
    from spec.load import read_file, read_yaml

    text = read_file(path)
    data = read_yaml(text, str(path), "a run's configuration") if text.strip() else {}
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
    return config.model_copy(update={"data": config.data.absolute()})


def resumed(saved: TrainConfig, *layers: Mapping[str, Any]) -> TrainConfig:
    """A run's own configuration with `layers` over it. Where the kind of schedule changes, the fields that not every
    kind has are the new one's. Raises `SpecError`, and `UserError` for another optimizer, which the run's moments are
    not of."""
    data = saved.model_dump()
    kind = saved.optimizer.kind
    if other := next((k for layer in layers if (k := layer.get("optimizer", {}).get("kind", kind)) != kind), None):
        hint = "leave it out, or begin another run from the weights: --init CHECKPOINT --out ANOTHER"
        raise UserError(f"optimizer.kind: {kind} -> {other} cannot be changed on resume ({hint})")
    if any(layer.get("schedule", {}).get("kind", saved.schedule.kind) != saved.schedule.kind for layer in layers):
        data["schedule"] |= dict.fromkeys(("final", "decay", "decay_shape"))
    return layered(data, *layers)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """`optimizer.lr: 0.001 -> 0.0005`, one line a field."""

    def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in data.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    a, b = flat(old.model_dump()), flat(new.model_dump())
    return [f"{key}: {a[key]} -> {b[key]}" for key in a if a[key] != b[key]]


__all__ = ["TrainConfig", "differences", "dump", "layered", "parse", "read", "resumed"]
