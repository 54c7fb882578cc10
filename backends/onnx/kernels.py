"""Which operator computes a layer's attention, decided by its fields alone."""

from __future__ import annotations

from enum import Enum

from spec.config import Alibi, Attention


class Kernel(Enum):
    """An implementation of `attend`."""

    GROUPED = "GroupQueryAttention"
    """com.microsoft: rotation, window, softcap and sinks inside, caches written in place."""
    ATTENTION = "Attention"
    """ONNX's, with an explicit mask."""
    DECOMPOSED = "MatMul and Softmax"


def kernel(a: Attention, profile: str) -> Kernel:
    """The operator for a resolved layer."""
    if a.softcap is not None or a.sinks or isinstance(a.position, Alibi):
        return Kernel.DECOMPOSED
    return Kernel.ATTENTION
