"""torchao's AdamW with moments of 8 bits, in blocks that lie within rows.

torchao cuts a shard's flattened numbers into blocks of 256, so that how a tensor is sharded decides which numbers share
a scale, and a checkpoint of four ranks can't be read by two. Here a block is a part of one row, and of an eighth of it:
the largest power of two up to 256 that divides the eighth. Rows go where they like and take their scales with them, and
up to eight ranks may share a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit as _AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit

SMALLEST = 4096
"""Tensors of fewer numbers keep float32 moments, as in torchao and bitsandbytes."""


def block(p: Tensor) -> int:
    """Numbers that share a scale; 0 where the moments stay float32.

    Of a shard, `whole` is the shape of the whole tensor and `columns` the width of a rank's part of a row; both are the
    same on all ranks, and so is the answer.
    """
    whole: torch.Size = getattr(p, "whole", p.shape)
    if len(whole) != 2 or whole.numel() < SMALLEST or whole[1] % 8:
        return 0
    found = math.gcd(whole[1] // 8, 256)
    return found if found >= 16 and getattr(p, "columns", whole[1]) % found == 0 else 0


class AdamW8bit(_AdamW8bit):
    """AdamW (Loshchilov & Hutter 2019) with block-wise quantized moments (Dettmers et al. 2022)."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        size = block(p) if p.numel() else 0  # a rank may have no row of its own
        return OptimState8bit.zeros(p.shape, signed, size, p.device, p.dtype) if size else torch.zeros_like(p)

    def plain(self, p: Tensor, value: Tensor) -> dict[str, Tensor]:
        """A moment's codes [rows, columns] and scales [rows, columns / block] in its own memory; itself under no name
        where it is float32."""
        size = block(p)
        if not size or value.shape != p.shape:
            return {"": value}
        rows, columns = p.shape
        if isinstance(value, OptimState8bit):
            return {"codes": value.codes, "scale": value.scale.view(rows, columns // size)}
        return {"codes": torch.zeros_like(value, dtype=torch.uint8), "scale": value.new_zeros(0, columns // size)}

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; compiled on CUDA, where a kernel then does what are about forty operations."""
        compiled = any(p.is_cuda for g in self.param_groups for p in g["params"])
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            return super().step(closure)
