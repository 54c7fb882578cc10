"""In which numbers the forward and backward passes compute."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from train.parallel.mesh import Ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_precision(name: str, device: torch.device) -> tuple[str, str]:
    """The precision, and why."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "the GPU has it"
    return "float32", f"bfloat16 autocast is no clear gain on {device.type}; ask for it with --precision bfloat16"


def autocast(ranks: Ranks, precision: str) -> Any:
    """Autocast for one process; FSDP casts by its own policy."""
    if precision == "float32" or ranks.world > 1:
        return nullcontext()
    return torch.autocast(ranks.device.type, DTYPES[precision])
