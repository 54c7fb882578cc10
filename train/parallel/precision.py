"""In which numbers the forward and backward passes compute. Weights, gradients and moments are float32 everywhere."""

from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spec.errors import MissingDependency, UserError
from train.parallel.device import Hardware, hardware
from train.parallel.mesh import Ranks

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.bfloat16,
}
"""In which dtype layers compute; fp8 is that of products alone."""

WHOLE = 16
"""Widths of an fp8 product are multiples of this."""


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision, and why. Raises `UserError` for one that the device does not have."""
    return choose(name, hardware(device))


def choose(name: str, found: Hardware) -> tuple[str, str]:
    """The precision on a device, and why. Raises `UserError` for one that it does not have."""
    if name == "auto":
        if found.kind in ("cuda", "xpu") and found.bfloat16:
            return "bfloat16", "the GPU has it"
        return "float32", f"bfloat16 is no clear gain on {found.kind}; ask for it with --precision bfloat16"
    if why := refusal(name, found):
        raise UserError(f"precision: {name} {why}")
    return name, "as asked"


def refusal(name: str, found: Hardware) -> str | None:
    """Why a device does not compute in a precision, and what to use; or none."""
    here = f"not {found.name or found.kind}"
    if found.kind == "cuda":
        here += f" ({found.capability[0]}.{found.capability[1]})"
    if name == "tf32" and (found.kind != "cuda" or found.capability < (8, 0)):
        return f"needs a CUDA device of compute capability 8.0 (A100) or newer, {here} (use float32)"
    if name == "fp8" and (found.kind != "cuda" or found.capability < (8, 9)):
        return f"needs a CUDA device of compute capability 8.9 (L4, RTX 4090, H100) or newer, {here} (use bfloat16)"
    if name == "bfloat16" and not found.bfloat16:
        return f"is emulated at best on {found.name or found.kind} (use float16)"
    return None


def prepare(precision: str) -> None:
    """Set what torch does with float32 products on the whole process."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def autocast(ranks: Ranks, precision: str) -> Any:
    """Autocast where weights are whole; FSDP casts by its own policy."""
    if DTYPES[precision] == torch.float32 or ranks.mesh is not None:
        return nullcontext()
    return torch.autocast(ranks.device.type, DTYPES[precision])


def convert_to_fp8(decoder: nn.Module, *, emulate: bool = False) -> list[str]:
    """Give the layers' linears 8-bit products (torchao: dynamic scales for each tensor); names and weights stay.

    Routers, the head, and widths that are no multiple of 16 keep their numbers; returns the names of those linears.
    `emulate` computes them in float32, for hardware without 8-bit products. Raises `MissingDependency`.
    """
    if importlib.util.find_spec("torchao") is None:
        raise MissingDependency("precision: fp8 needs torchao: pip install 'allotrope[optimizers]'")
    with _quiet():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    kept: list[str] = []

    def eligible(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        fits = module.in_features % WHOLE == 0 and module.out_features % WHOLE == 0
        if not fits:
            kept.append(name)
        return fits

    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)  # tokens need be no multiple of 16
    convert_to_float8_training(decoder, module_filter_fn=eligible, config=config)
    return kept


@contextmanager
def _quiet() -> Any:
    """torchao tells of its kernels that this build of torch cannot load; none of them is used here."""
    loggers = [logging.getLogger(n) for n in ("torchao", "torch.utils._pytree")]
    before = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, before, strict=True):
            log.setLevel(level)


@dataclass
class Scaler:
    """The factor of the loss that keeps float16's gradients in range (Micikevicius et al. 2018): halved when gradients
    overflow, doubled after `interval` steps that did not. A power of two, so that scaling rounds nothing.

    torch's own GradScaler asks each gradient on each rank; here the global norm, which is the same on all ranks, has
    already said whether all of them are finite.
    """

    scale: float = 1.0
    interval: int = 2000
    steady: int = 0
    """Steps since the last overflow or doubling."""
    overflows: int = 0
    """Steps skipped since the run began, because a smaller factor was needed."""

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the factor."""
        if self.scale != 1:
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(1 / self.scale)

    def overflowed(self, loss: float, norm: float) -> bool:
        """Whether a smaller factor may make a step's gradients finite; the factor of the next step is set."""
        if not math.isfinite(loss):
            return False
        if not math.isfinite(norm):
            if self.scale == 1:
                return False
            self.scale, self.steady = self.scale / 2, 0
            self.overflows += 1
            return True
        self.steady += 1
        if self.steady >= self.interval and self.scale < 2.0**24:
            self.scale, self.steady = self.scale * 2, 0
        return False

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "steady": self.steady, "overflows": self.overflows}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self.scale = float(state["scale"])
        self.steady, self.overflows = int(state["steady"]), int(state["overflows"])


def scaler(precision: str) -> Scaler | None:
    """What float16 needs; none for other precisions."""
    return Scaler(2.0**16) if precision == "float16" else None
