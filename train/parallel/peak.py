"""Peak arithmetic of known hardware, for the share of it that training reaches."""

from __future__ import annotations

import re

import torch

TERA = 1e12

PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bfloat16": 2250, "fp8": 4500, "tf32": 1125, "float32": 75},
    "GB200": {"bfloat16": 2500, "fp8": 5000, "tf32": 1250, "float32": 80},
    "GH200": {"bfloat16": 989.4, "fp8": 1978.9, "tf32": 494.7, "float32": 66.9},
    "H200": {"bfloat16": 989.4, "fp8": 1978.9, "tf32": 494.7, "float32": 66.9},
    "H100": {"bfloat16": 989.4, "fp8": 1978.9, "tf32": 494.7, "float32": 66.9},
    "H100 NVL": {"bfloat16": 835.5, "fp8": 1671, "tf32": 417.5, "float32": 60},
    "H100 PCIe": {"bfloat16": 756.5, "fp8": 1513, "tf32": 378, "float32": 51.2},
    "A100": {"bfloat16": 312, "tf32": 156, "float32": 19.5},
    "A40": {"bfloat16": 149.7, "tf32": 74.8, "float32": 37.4},
    "A10": {"bfloat16": 125, "tf32": 62.5, "float32": 31.2},
    "L4": {"bfloat16": 121, "fp8": 242.5, "tf32": 60, "float32": 30.3},
    "L40": {"bfloat16": 181, "fp8": 362, "tf32": 90.5, "float32": 90.5},
    "L40S": {"bfloat16": 362, "fp8": 733, "tf32": 183, "float32": 91.6},
    "RTX A6000": {"bfloat16": 154.8, "tf32": 77.4, "float32": 38.7},
    "RTX 3090": {"bfloat16": 71, "tf32": 35.6, "float32": 35.6},
    "RTX 4090": {"bfloat16": 165.2, "fp8": 330.3, "tf32": 82.6, "float32": 82.6},
    "RTX 5090": {"bfloat16": 209.5, "fp8": 419, "tf32": 104.8, "float32": 104.8},
    "V100": {"float16": 125, "float32": 15.7},
    "T4": {"float16": 65, "float32": 8.1},
    "MI300X": {"bfloat16": 1307.4, "fp8": 2614.9, "float32": 163.4},
}
"""Dense TFLOP a second by the words of the device's name, from the makers' data sheets (GeForce and RTX with float32
accumulation). float16 equals bfloat16 where it is not said."""

VARIANTS = ("Laptop", "Max-Q", "Mobile", "D", "MIG")
"""Words of slower devices that bear a listed name."""


def flops(name: str, precision: str) -> float | None:
    """FLOP a second of a device at a precision; none for hardware or numbers that are not listed."""
    words = set(re.findall(r"[A-Za-z0-9]+", name))
    if words & set(VARIANTS):
        return None
    fitting = [key for key in PEAKS if set(key.split()) <= words]
    if not fitting:
        return None
    row = PEAKS[max(fitting, key=lambda key: len(key.split()))]
    found = row.get(precision, row.get("bfloat16") if precision == "float16" else None)
    return None if found is None else found * TERA


def peak_flops(device: torch.device, precision: str, devices: int = 1) -> float | None:
    """FLOP a second of that many such devices together; none where the hardware is not known."""
    if device.type != "cuda":
        return None
    found = flops(torch.cuda.get_device_name(device), precision)
    return None if found is None else found * devices
