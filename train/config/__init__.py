"""What a training run is: one frozen configuration, from a YAML file, the command line, or both."""

from __future__ import annotations

from train.config.data import Batch, Data
from train.config.loss import Experts, Loss
from train.config.optim import Optimizer, Schedule
from train.config.quant import Quant
from train.config.run import Checkpoint, Samples, Validation, Watch
from train.config.system import Memory, Parallel
from train.config.top import TrainConfig, differences, dump, layered, parse, read, resumed

__all__ = [
    "Batch",
    "Checkpoint",
    "Data",
    "Experts",
    "Loss",
    "Memory",
    "Optimizer",
    "Parallel",
    "Quant",
    "Samples",
    "Schedule",
    "TrainConfig",
    "Validation",
    "Watch",
    "differences",
    "dump",
    "layered",
    "parse",
    "read",
    "resumed",
]
