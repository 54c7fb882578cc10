"""MXFP4 weights, as GPT-OSS's experts come: bytes `NAME_blocks` [..., C / 32, 16] and `NAME_scales` [..., C / 32].

Every 32 columns share a power of two (OCP Microscaling Formats, E8M0: 2^(code - 127)); a byte holds two codes of E2M1,
the lower half first. What they mean is exact in float32 and in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.sources.store import Store, widen

BLOCKS, SCALES = "_blocks", "_scales"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
PAIRS = np.stack(np.meshgrid(np.r_[E2M1, -E2M1], np.r_[E2M1, -E2M1], indexing="ij")[::-1], axis=-1).reshape(256, 2)
"""The two values of a byte."""
BYTES = ("U8", "F8_E8M0")


@dataclass(frozen=True)
class Blocks:
    """A tensor of such blocks, whose rows are those of the products."""

    codes: str
    scale: str
    shape: tuple[int, ...]
    dtype: str = "MXFP4"

    def rows(self, store: Store, start: int, stop: int) -> NDArray[np.float32]:
        groups = self.shape[-1] // 32
        codes = store.raw(self.codes, start * groups, stop * groups)
        powers = widen(store.raw(self.scale, start, stop), "F8_E8M0")
        values = PAIRS[codes].reshape(stop - start, groups, 32)
        values *= powers[..., None]
        return values.reshape(stop - start, groups * 32)


def blocks(store: Store, codes: str) -> Blocks | str:
    """The tensor that `codes` (ending in `_blocks`) holds, or what is wrong with it."""
    scale = codes.removesuffix(BLOCKS) + SCALES
    entry, beside = store.entries[codes], store.entries.get(scale)
    if beside is None:
        return f"blocks without {scale.rsplit('.', 1)[-1]} beside them"
    if entry.dtype != "U8" or beside.dtype not in BYTES:
        return f"blocks of {entry.dtype} with scales of {beside.dtype}: bytes are read"
    if len(entry.shape) < 3 or entry.shape[-1] != 16 or entry.shape[:-1] != beside.shape:
        return f"blocks {list(entry.shape)} with scales {list(beside.shape)}: 16 bytes for each scale are read"
    return Blocks(codes, scale, (*entry.shape[:-2], entry.shape[-2] * 32))
