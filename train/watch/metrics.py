"""The figures of a step."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

TIMING = frozenset({"seconds", "data_wait", "tokens_per_second", "tokens_per_second_smooth", "mfu", "memory"})
"""Figures that depend on the clock and the machine: two runs of one configuration differ in them alone."""


class Score(NamedTuple):
    """Of the held-out documents."""

    loss: float
    """Nats a token."""
    bits_per_byte: float | None
    """None where only answers are learnt: their tokens are not all of the text."""
    parts: Mapping[str, float]
    """The loss of each source, where there are several."""


def by_name(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Values by the last parts of paths; those that are alike are numbered."""
    out: dict[str, float] = {}
    for name, value in zip(names, values, strict=True):
        short = name.rstrip("/").rpartition("/")[2] or name
        same = sum(known.partition("#")[0] == short for known in out)
        out[f"{short}#{same + 1}" if same else short] = value
    return out


@dataclass(frozen=True)
class Metrics:
    """One optimizer step. Losses are in nats a token."""

    step: int
    loss: float
    """What is minimised."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens_per_second: float
    tokens: int
    """Valid targets since the run began."""
    skipped: int
    """Steps skipped since the run began."""
    rollbacks: int = 0
    """Returns to a checkpoint since the run began."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the loss is made of: `cross_entropy` where it is not the loss itself, and more."""
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    val_parts: Mapping[str, float] = field(default_factory=dict)
    """`val_loss` of each source, by its name."""
    seconds: float | None = None
    """Of the step, without scoring and saving."""
    data_wait: float | None = None
    """Seconds of the step in which the data was waited for."""
    tokens_per_second_smooth: float | None = None
    """Over the last 10 steps or so."""
    mfu: float | None = None
    """Share of the hardware's arithmetic that the model's own multiply-adds use; none on unknown hardware."""
    memory: int | None = None
    """Bytes of rank 0: the device's peak so far, or the process's resident memory."""

    @property
    def cross_entropy(self) -> float:
        """Of the training batch."""
        return self.parts.get("cross_entropy", self.loss)

    def values(self) -> dict[str, float | int]:
        """Everything that is known but the step, by name: what trackers log."""
        known = {k: v for k, v in asdict(self).items() if k not in ("step", "parts", "val_parts") and v is not None}
        known |= {"perplexity": perplexity(self.cross_entropy), **self.parts}
        if self.val_loss is not None:
            known["val_perplexity"] = perplexity(self.val_loss)
        return known | {f"val_loss/{name}": v for name, v in self.val_parts.items()}


def perplexity(loss: float) -> float:
    """exp of nats a token; infinite beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan


@dataclass
class Meter:
    """Times the steps of this process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    flops: float = 0.0
    """Of training one token: forward and backward."""
    peak: float | None = None
    """FLOP a second of all devices together; none where the hardware is unknown."""
    began: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    """Smoothed, with `tokens`."""
    tokens: float = 0.0

    def begin(self) -> None:
        """A step begins."""
        self.began, self.waited = time.perf_counter(), 0.0

    def end(self, tokens: int) -> dict[str, Any]:
        """The step is over: the timing fields of its `Metrics`. Asks the device nothing."""
        spent = max(time.perf_counter() - self.began, 1e-9)
        self.seconds = 0.9 * self.seconds + spent  # of both, so that their ratio weighs steps alike from the first on
        self.tokens = 0.9 * self.tokens + tokens
        smooth = self.tokens / self.seconds
        return {
            "seconds": spent,
            "data_wait": self.waited,
            "tokens_per_second": tokens / spent,
            "tokens_per_second_smooth": smooth,
            "mfu": smooth * self.flops / self.peak if self.peak else None,
            "memory": memory(self.device),
        }


def memory(device: torch.device) -> int | None:
    """Bytes: torch's peak on a GPU, what Metal's driver holds, or this process's resident memory."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
