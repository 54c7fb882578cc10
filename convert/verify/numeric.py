"""The numeric checks as pure functions of logits: graph, arithmetic, invariants, quality. Shapes: T tokens, V vocab."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Runtime
from backends.numpy.model import Oracle
from convert import gates
from convert.verify.emulate import GELU_TABLES, EmulatedOps
from convert.verify.metrics import Quality, nmse
from convert.verify.report import Check, Status
from spec.config import Spec

Array = NDArray[Any]
Weights = Callable[[str], Any] | Mapping[str, Any]


def judge(name: str, run: Array, reference: Array, gate: gates.Gate, what: str, **details: Any) -> Check:
    """One comparison of logits against its gate."""
    error = nmse(run, reference)
    per_token = np.square(run - reference).sum(-1) / np.square(reference).sum(-1).clip(1e-300)
    details = {
        "control": gate.control,
        "formula": gate.formula,
        "ceiling": gate.ceiling,
        "max_abs": float(np.abs(run - reference).max()),
        "worst_token": float(per_token.max()),
        **details,
    }
    if not np.isfinite(run).all():
        return Check(
            name,
            Status.FAIL,
            error,
            gate.limit,
            f"{int((~np.isfinite(run)).sum())} logits are not finite",
            details=details,
        )
    if error > gate.limit:
        if not gate.usable:
            reason = (
                f"error above the gate, and rounding alone costs {gate.control:.1e}, above the bound {gate.ceiling:.1e}"
            )
            return Check(name, Status.FAIL, error, gate.limit, reason, details=details)
        reason = f"NMSE {error:.1e} exceeds {gate.formula}"
        if "unexplained" in details:
            reason += f" ({details['unexplained']:.1e} of it not explained by the runtime's roundings)"
        return Check(name, Status.FAIL, error, gate.limit, reason, details=details)
    if not gate.usable:
        reason = f"proves nothing: rounding alone costs {gate.control:.1e}, above the bound {gate.ceiling:.1e}"
        return Check(name, Status.NOT_RUN, error, gate.limit, reason, details=details)
    return Check(name, Status.PASS, error, gate.limit, what, details=details)


def rounds_by_table(spec: Spec) -> bool:
    """Whether a layer's activation is one that llama.cpp looks up in a float16 table."""
    return any(b.mlp.activation in GELU_TABLES for b in spec.layers)


def check_graph(
    run: Array, spec: Spec, weights: Weights, ids: Array, tables: bool, what: str, length: int | None = None
) -> Check:
    """Float32 compute on the dequantized weights against the float64 oracle.

    run: the runtime's logits [B, T, V] in float32 arithmetic throughout. tables: the runtime's GELU is a float16 table
    by design; then the reference looks it up too, so that the gate stays a float32 one; the plain error is reported.
    length: the session's declared length in tokens.
    """
    tables = tables and rounds_by_table(spec)

    def logits(dtype: Any, looked_up: bool) -> Array:
        ops = EmulatedOps(dtype, linears=False, kv="f32", tables=looked_up)
        return Oracle(spec, weights, length=length, ops=ops).logits(ids)

    reference = logits(np.float64, tables)
    control = nmse(logits(np.float32, tables), reference)
    gate = gates.gate("graph", "f32", control, layers=spec.depth, positions=ids.shape[-1])
    extra: dict[str, Any] = {"tokens": int(ids.size), "layers": spec.depth}
    if tables:
        extra["nmse_without_gelu_table"] = nmse(run, logits(np.float64, False))
        what += "; GELU by the runtime's float16 table on both sides"
    return judge("graph", run, reference, gate, what, **extra)


def exact_and_emulated(
    spec: Spec, weights: Weights, ids: Array, length: int | None = None
) -> tuple[Array, Array]:
    """The oracle's logits and those with the runtime's roundings, both [1, T, V], in one pass over the weights.

    ids [1, T]. Weights that are `Typed` say how their input is rounded.
    """
    ops = EmulatedOps(np.float64, rows=slice(1, 2))
    both = Oracle(spec, weights, length=length, ops=ops).logits(np.concatenate([ids, ids]))
    return both[:1], both[1:]


COARSENESS: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0", "q8_k")


def coarsest(precisions: Sequence[str]) -> str:
    """The roundings' common bound is that of the coarsest."""
    return max(precisions, key=lambda p: (gates.UNIT[p], COARSENESS.index(p)))


def check_arithmetic(run: Array, exact: Array, emulated: Array, spec: Spec, precision: str, what: str) -> Check:
    """The shipped artifact with its stock settings against the float64 oracle on the same dequantized weights.

    run, exact, emulated [1, T, V]. precision: the coarsest rounding on the path.
    """
    control = nmse(emulated, exact)
    gate = gates.gate("arithmetic", precision, control, layers=spec.depth, positions=exact.shape[1])
    return judge("arithmetic", run, exact, gate, what, unexplained=nmse(run, emulated), precision=precision)


def check_invariants(runtime: Runtime, ids: Array, run: Array, allowed: float, precision: str, layers: int) -> Check:
    """Prefill and then token by token equals all at once, inside the artifact's own runtime.

    ids [1, T]; run [1, T, V] its logits for them at once; allowed: the control's NMSE.
    """
    t = min(ids.shape[1], 24)
    head = max(1, t // 2)
    parts = [runtime.prefill(ids[0, :head])[None]]
    parts += [runtime.step(ids[0, i : i + 1]) for i in range(head, t - 2)]
    if t - 2 >= head:
        parts.append(runtime.step(ids[0, t - 2 : t]))
    stepped = np.concatenate(parts)
    at_once = run[0, head - 1 : head - 1 + len(stepped)]
    gate = gates.gate("invariant", precision, allowed, layers=layers, positions=t)
    what = f"prefill {head}, then token by token to {t}, equals all at once"
    return judge("invariants", stepped[None], at_once[None].astype(np.float64), gate, what)


def check_quality(run: Array, original: Array, ids: Array, level: str) -> Check:
    """What the level costs against the original weights: a budget, never called parity.

    run, original [1, T, V]; ids [1, T].
    """
    q = Quality()
    q.add(original[0], run[0], np.append(ids[0, 1:], -1))
    s = q.summary()
    budget = gates.kl_budget(level)
    what = (
        f"KL {s['kl_mean']:.2g} (99.9% {s['kl_999']:.2g}, max {s['kl_max']:.2g}), "
        f"delta NLL {s['delta_nll']:+.2g} ± {s['delta_nll_se']:.1g}, top-1 {s['top1']:.1%}"
    )
    over = budget is not None and s["kl_mean"] - 2 * s["kl_se"] > budget
    flags = (f"mean KL {s['kl_mean']:.2g} is over the budget of {budget:g} nats for {level}",) if over else ()
    return Check("quality", Status.PASS, s["kl_mean"], budget, what, flags, details=s)
