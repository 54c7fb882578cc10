"""Quantization-aware training: forward passes read the weights as they will ship."""

from __future__ import annotations

from train.quant.levels import levels, recipe
from train.quant.weights import Quantized

__all__ = ["Quantized", "levels", "recipe"]
