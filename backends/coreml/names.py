"""How canonical names are written in MIL, whose identifiers are letters, digits and underscores."""

from __future__ import annotations

from spec.config import MoE, Spec
from spec.params import Param, params

INPUT, KEYS, VALUES, POSITION, LOGITS = "inputIds", "keyCache", "valueCache", "position", "logits"
"""What swift-transformers expects of a stateful model; `position` is ours."""
PREFILL, DECODE, ONLY = "prefill", "decode", "main"
"""Functions of a package: two, or the only one."""


def mil_name(canonical: str) -> str:
    """`layers.0.attn.q.weight` -> `layers_0_attn_q_weight`; canonical names stay distinct: `mlp.shared_gate` and
    `mlp.shared.gate` too."""
    return canonical.replace("shared_gate", "sharedGate").replace(".", "_")


def rope_names(index: int) -> tuple[str, str]:
    """The constants of a rotary table: cosines and sines [context, dim / 2]."""
    return f"rope_{index}_cos", f"rope_{index}_sin"


def slopes_name(layer: int) -> str:
    """The constant of a layer's ALiBi slopes."""
    return f"layers_{layer}_attn_slopes"


def by_name(spec: Spec) -> dict[str, Param]:
    """Every parameter by its canonical name."""
    return {p.name: p for p in params(spec)}


def in_linear(p: Param) -> bool:
    """Whether a vector is the bias of a product, which has the dtype of the product; all others are float32."""
    return p.role == "bias" and not p.name.split(".")[-2].endswith(("norm", "router"))


def experts_in(spec: Spec, canonical: str) -> int:
    """How many experts lie one below the other in a tensor's rows."""
    m = spec.layers[int(canonical.split(".")[1])].mlp if ".mlp.experts." in canonical else None
    return m.experts if isinstance(m, MoE) else 1
