"""Which operator computes a layer's attention, decided by its fields alone."""

from __future__ import annotations

from enum import Enum

from spec.config import Alibi, Attention, Rope


class Kernel(Enum):
    """An implementation of `attend`."""

    GROUPED = "GroupQueryAttention"
    """com.microsoft: rotation, window, softcap and sinks inside, caches written in place."""
    ATTENTION = "Attention"
    """ONNX's, with an explicit mask."""
    DECOMPOSED = "MatMul and Softmax"


def kernel(a: Attention, profile: str) -> Kernel:
    """The operator for a resolved layer."""
    assert a.head_dim is not None, "a resolved layer"
    alibi = isinstance(a.position, Alibi)
    rotated = a.position.rotary_dim(a.head_dim) if isinstance(a.position, Rope) else 0
    if profile == "ort" and not alibi and a.head_dim % 8 == 0 and rotated % 16 == 0:
        return Kernel.GROUPED
    return Kernel.DECOMPOSED if alibi or a.sinks or a.softcap is not None else Kernel.ATTENTION
