"""Every tolerance of the proof, in one place, derived and never loosened to make something pass.

An error is a normalised mean squared error: NMSE = sum((y - ref)^2) / sum(ref^2) over all logits. A gate on it is
`ratio * control + floor`, where the control is the same function on the same weights and ids with nothing but the
runtime's own roundings (measured, see `convert.verify.emulate`). Three things keep that honest:

* the ratio is fixed: 2 on the root (4 on NMSE) for float32 graphs, 3 on NMSE where the runtime's activation rounding
  is itself emulated, as both sides then round alike and only accumulation order is left;
* the floor is the rounding of one operation, k u^2, for graphs so short that a control's luck would decide;
* the ceiling is the a-priori bound k L u^2 + (position u)^2. A control that exceeds it proves nothing, and the check
  says NOT_RUN instead of passing behind an inflated gate.

u is the unit roundoff of the rounding that dominates; L counts layers. Measured on an 8-layer Llama against float64,
NMSE / (L u^2) is 55 (float32), 7 (float16) and 5 (bfloat16); a second rotary term covers float32 angles, whose absolute
error grows as position * u. Structural bugs start at 1e-5 (see `parity_tests/mutants.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

UNIT: Mapping[str, float] = {
    "f64": 2.0**-53,
    "f32": 2.0**-24,
    "f16": 2.0**-11,
    "bf16": 2.0**-8,
    "q8_0": 1 / 254,  # half a step of 127 levels, relative to the largest of a block of 32
    "q8_k": 1 / 254,  # the same, of a block of 256
    "int8": 1 / 254,  # ONNX Runtime's blocks of 32
}
"""Unit roundoff: the largest relative error of one rounding."""

RATIO: Mapping[str, float] = {"graph": 4.0, "arithmetic": 3.0}
"""Times the control's NMSE: graph, and arithmetic in float32, is 2 squared (as in PyTorch's own accuracy harness)."""

FLOOR_K = 8.0
"""One operation's worth of roundings: a norm, two products and a sum lie on every path."""

FLIPS = 8
"""Look-ups in a float16 table (llama.cpp's GELU) that float32 noise may turn to the neighbouring entry beyond what the
control saw. There are few in a small run, so their number scatters; one of them changes one of `activations` values by
at most 2^-10, so costs at most 2^-20 / activations of NMSE."""

CEILING_K: Mapping[str, float] = {"f32": 1e4, "f16": 1e3, "bf16": 1e3, "q8_0": 1e3, "q8_k": 1e3, "int8": 1e3}
"""How far above k L u^2 (k about 50 measured in float32, 5 in 16 bits) a control may lie and still prove something."""

STRUCTURAL = 1e-6
"""The smallest seeded structural bug measures 4e-6. A graph check whose gate exceeds this could not see it."""


@dataclass(frozen=True)
class Gate:
    """A limit on an NMSE, and where it comes from."""

    limit: float
    """The error must not exceed this."""
    control: float
    """What the roundings alone cost."""
    ceiling: float
    """The a-priori bound; a control above it proves nothing."""
    formula: str

    @property
    def usable(self) -> bool:
        """Whether the control is small enough for the gate to mean anything."""
        return self.control <= self.ceiling


def bound(precision: str, layers: int, positions: int) -> float:
    """The a-priori bound k L u^2 + (position u32)^2 on an NMSE."""
    return CEILING_K[precision] * layers * UNIT[precision] ** 2 + (positions * UNIT["f32"]) ** 2


def gate(check: str, precision: str, control: float, *, layers: int, positions: int, table_lookups: int = 0) -> Gate:
    """The gate of one check.

    check: `graph` or `arithmetic`. precision: the coarsest rounding on the path, a key of `UNIT`.
    control: the NMSE that the emulated roundings alone have. positions: tokens in the sequence.
    table_lookups: activations of one layer that both sides look up in a float16 table.
    """
    flips = FLIPS * 2.0**-20 / table_lookups if table_lookups else 0.0
    ratio = RATIO["graph" if precision == "f32" else check]
    floor = FLOOR_K * UNIT["f32"] ** 2 + flips
    ceiling = bound(precision, layers, positions) + flips
    if check == "graph":
        ceiling = min(ceiling, STRUCTURAL / ratio)
    formula = f"{ratio:g} x control {control:.1e} + {floor:.0e}"
    return Gate(ratio * control + floor, control, ceiling, formula)


KL_BUDGET: Mapping[str, float] = {
    "f32": 1e-6,
    "f16": 1e-4,
    "bf16": 1e-3,
    "q8": 0.003,
    "q8_0": 0.003,
    "q6_k": 0.011,
    "q5_k": 0.022,
    "q5_0": 0.03,
    "q5_1": 0.03,
    "q4": 0.08,
    "q4-g128": 0.11,
    "q4_k": 0.07,
    "q4_0": 0.15,
    "q4_1": 0.15,
    "iq4_nl": 0.1,
    "iq4_xs": 0.1,
    "mxfp4": 0.2,
    "nvfp4": 0.15,
    "fp8": 0.015,
    "q3_k": 0.25,
    "iq3": 0.3,
    "q2_k": 0.9,
    "iq2": 1.5,
    "iq1": 3.0,
    "tq1": 3.0,
    "tq2": 2.0,
}
"""Mean KL divergence in nats that a level may cost against the original weights: about twice llama.cpp's published
figures for an 8 B model on wikitext-2 (Q8_0 .0014, Q6_K .0055, Q5_K_M .011, Q4_K_M .031, Q4_0 .072, Q3_K_M .102,
Q2_K .445). A breach is flagged, never a failure, and staying within it is never called parity."""


def kl_budget(level: str) -> float | None:
    """The budget of a level: its own, or that of the longest name that it begins with (`q4_k_m` -> `q4_k`)."""
    fits = [k for k in KL_BUDGET if level == k or level.startswith(k + "_")]
    return KL_BUDGET[max(fits, key=len)] if fits else None


TOKENIZER_DIFFERENCES = 0
"""Token ids are equal or they are not."""
