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


def kernel(a: Attention, profile: str, compute: str = "f32") -> Kernel:
    """The operator for a resolved layer.

    Measured: GroupQueryAttention takes heads of a multiple of 8 dimensions and rotates multiples of 16; in 16 bits
    TensorRT builds Attention for multiples of 8 only.
    """
    assert a.head_dim is not None, "a resolved layer"
    alibi = isinstance(a.position, Alibi)
    rotated = a.position.rotary_dim(a.head_dim) if isinstance(a.position, Rope) else 0
    whole = a.head_dim % 8 == 0
    if profile == "ort" and whole and not alibi and rotated % 16 == 0:
        return Kernel.GROUPED
    plain = not alibi and not a.sinks and a.softcap is None
    return Kernel.ATTENTION if plain and (whole or compute == "f32") else Kernel.DECOMPOSED
