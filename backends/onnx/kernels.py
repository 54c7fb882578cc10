"""Which operator computes a layer's attention and its experts, decided by fields and levels alone."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from spec.config import Activation, Alibi, Attention, MoE, Rope
from spec.levels import CODES, GROUPS


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


SWISHES: dict[Activation, float] = {"silu": 1.0, "quick_gelu": 1.702}
"""Activations x * sigmoid(slope * x)."""
QMOE: dict[Activation, str] = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu"}
"""What QMoE calls the activations that it has without a gate."""


def activations_of(profile: str, compute: str, asked: str = "") -> str:
    """How the inputs of products with codes are taken: `int8` (on CPUs in blocks, ONNX Runtime's accuracy level 4) or
    `float`, as they are. That is `asked`, or what is fast where nothing was."""
    return asked or ("int8" if profile == "ort" and compute == "f32" else "float")


def grouped_experts(m: MoE, profile: str, compute: str, levels: Mapping[str, str], activations: str) -> bool:
    """Whether com.microsoft's QMoE computes a layer's experts; `levels` are those of its gate, up and down.

    Measured with onnxruntime 1.32 on CPUs: QMoE gates with swish alone, takes the gate's and up's rows in turn, and
    rounds its input to int8 whenever codes have 8 bits: then only where `activations` are to be int8. Its brother
    for floats, MoE, computes token by token: the loop over experts is as fast for one token and faster for many.
    """
    kinds = set(levels.values())
    if profile != "ort" or not kinds <= set(GROUPS) or len({GROUPS[x] for x in kinds}) > 1:  # it has one block_size
        return False
    if activations != "int8" and any(CODES[x] == 8 for x in kinds):
        return False
    if not m.gated:
        return m.activation in QMOE
    swish = m.activation in SWISHES or m.activation == "clamped_swiglu"
    return swish and levels["gate"] == levels["up"] and m.bias.gate == m.bias.up
