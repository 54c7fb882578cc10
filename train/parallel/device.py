"""Which device computes, and what is known of it."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from spec.errors import UserError

ORDER = ("cuda", "xpu", "mps", "cpu")
"""`auto` takes the first that is there."""

BACKENDS = {"cuda": "nccl", "xpu": "xccl"}
"""What carries the collectives; gloo elsewhere."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of mallopt(3); 32 MiB is the largest threshold that it takes for memory of its own mapping."""


@dataclass(frozen=True)
class Hardware:
    """What the choice of numbers depends on."""

    kind: str
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    """Compute capability of a CUDA device."""
    bfloat16: bool = True
    """Whether it computes in bfloat16 without emulation."""


def count(kind: str) -> int:
    """Devices of a type that torch sees."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    return int(kind == "cpu" or torch.backends.mps.is_available())


def choose_device(name: str) -> torch.device:
    """`auto` is the first of `ORDER` that is there. Raises `UserError` for a device that is not there."""
    if name == "auto":
        name = next(kind for kind in ORDER if count(kind))
    device = torch.device(name)
    found = count(device.type)
    if (device.index or 0) >= found:
        there = ", ".join(f"{kind} ({count(kind)})" if kind in BACKENDS else kind for kind in ORDER if count(kind))
        raise UserError(f"device: {name} is not there (torch sees {there}; use auto)")
    return device


def hardware(device: torch.device) -> Hardware:
    """What the device is."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", torch.cuda.get_device_name(device), capability, half)
    if device.type == "xpu":
        return Hardware("xpu", torch.xpu.get_device_name(device), bfloat16=torch.xpu.is_bf16_supported())
    if device.type == "mps":
        return Hardware("mps", platform.processor(), bfloat16=torch.backends.mps.is_macos_or_newer(14, 0))
    return Hardware("cpu", _processor())


def memory(device: torch.device) -> int | None:
    """Bytes of the device's memory; none where nobody says."""
    if device.type in BACKENDS:
        module = torch.cuda if device.type == "cuda" else torch.xpu
        return int(module.get_device_properties(device).total_memory)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def describe(device: torch.device, asked: str) -> str:
    """`cuda:0 (NVIDIA H100, 85 GB, 1 of 8 here; the first that torch finds)`"""
    found, size = hardware(device), memory(device)
    here = count(device.type)
    parts = [found.name, "" if size is None else f"{size / 1e9:.0f} GB"]
    parts.append(
        f"{torch.get_num_threads()} threads" if device.type == "cpu" else f"1 of {here} here" if here > 1 else ""
    )
    why = f"the first that is there of {', '.join(ORDER)}" if asked == "auto" else "as asked"
    return f"{device} ({', '.join(p for p in parts if p)}; {why})"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def keep_memory() -> None:
    """Let this process keep what it frees for its next allocations (glibc): a step on the CPU allocates what the last
    one freed, and pages that went back to the system cost time to get again."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    for option, value in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, 2**25)):
        mallopt(option, value)
