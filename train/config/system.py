"""How the arithmetic is spread over devices, and in which numbers it is done."""

from __future__ import annotations

from typing import Literal

from spec.config import Model
from train.config.fields import Size


class Parallel(Model):
    """Degrees of parallelism; their product is the number of ranks."""

    dp: Size | None = None
    """Ranks that share the batch, weights sharded among them (FSDP2); none = ranks / (replicate * tp * pp)."""
    replicate: Size = 1
    """Copies of each such group, gradients summed between them (HSDP)."""
    tp: Size = 1
    """Ranks that share each layer: heads and inner widths, and the sequence outside of them."""
    pp: Size = 1
    """Stages of consecutive layers, each on ranks of its own."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of the forward and backward passes of a pipeline."""
    ep: Size = 1
    """Ranks that share a layer's experts; they are taken from dp and tp."""


class Memory(Model):
    """What is kept for the backward pass, and where."""

    offload: bool = False
    """Whether weights, gradients and moments stay in the CPU's memory while they are not used."""
