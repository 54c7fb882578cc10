"""Where a run takes place, for its report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from train.config import TrainConfig
from train.parallel import Ranks

PACKAGES = ("allotrope", "torch", "numpy", "tokenizers", "pytorch_optimizer", "torchao", "datasets", "transformers")


def environment(c: TrainConfig, ranks: Ranks, precision: str, kernels: dict[str, str]) -> dict[str, Any]:
    """Versions, devices, ranks and precision, as JSON holds them; `kernels` are attention kernels by reason."""
    d = ranks.degrees
    cuda = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(ranks.device) if cuda else platform.processor() or platform.machine()
    return {
        "device": f"{ranks.device}: {name}" if name else str(ranks.device),
        "ranks": ranks.world,
        "parallel": " x ".join(f"{k} {getattr(d, k)}" for k in ("pp", "replicate", "dp", "tp") if getattr(d, k) > 1),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "attention": "; ".join(f"{kernel} ({reason})" for reason, kernel in kernels.items()),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda if cuda else None,
        "seed": c.seed,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
