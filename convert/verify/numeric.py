"""The numeric checks as pure functions of logits: graph, arithmetic, invariants, quality. Shapes: T tokens, V vocab."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Arithmetic, Runtime
from backends.numpy.model import Oracle
from convert import gates
from convert.verify import routes
from convert.verify.emulate import FLASH_TILE, GELU_TABLES, EmulatedOps, RoundedOps
from convert.verify.metrics import Quality, nmse, typical
from convert.verify.report import Check, Status
from convert.verify.routes import Scores
from spec.config import MoE, Spec

Array = NDArray[Any]
Weights = Callable[[str], Any] | Mapping[str, Any]
Measure = Callable[[Array, Array], float]

CERTAIN = 8
"""Tokens that a graph check must at least compare."""


def judge(
    name: str, run: Array, reference: Array, gate: gates.Gate, what: str, measure: Measure = nmse, **details: Any
) -> Check:
    """One comparison of logits against its gate, which `measure` made too."""
    error = measure(run, reference)
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


@dataclass(frozen=True)
class Graph:
    """What float32 compute on given weights must give: the reference [1, T, V] and its controls [N, T, V]."""

    reference: Array
    control: Array
    plain: Array | None
    """The reference without the runtime's GELU table, where it has one."""
    layers: int
    hidden: int
    """Activations of a token in one layer."""
    certain: int
    """Tokens before the first whose experts rounding may turn; all of them where there are no experts."""


def graph_reference(spec: Spec, weights: Weights, ids: Array, tables: bool, length: int | None = None) -> Graph:
    """Run the oracle in float64 and, as the control, in float32.

    tables: the runtime's GELU is a float16 table by design; then the reference looks it up too, so that the gate stays
    a float32 one, and the plain error is reported. length: the session's declared length in tokens.
    """
    tables = tables and rounds_by_table(spec)

    def logits(looked_up: bool, forced: Mapping[str, Array] | None, scores: Scores) -> Array:
        ops = EmulatedOps(np.float64, linears=False, kv="f32", tables=looked_up)
        ops.forced = forced
        return Oracle(spec, weights, length=length, ops=ops).logits(ids, scores)

    exact = Scores()
    reference = logits(tables, None, exact)
    control, rounded = float32_controls(spec, weights, ids, exact, tables, length)
    plain = logits(False, routes.chosen(spec, exact), Scores()) if tables else None
    hidden = min(b.mlp.hidden * (b.mlp.router.top_k if isinstance(b.mlp, MoE) else 1) for b in spec.layers)
    certain = routes.certain_prefix(spec, exact, rounded, ids.shape[1])
    return Graph(reference, control, plain, spec.depth, hidden, certain)


NUDGED = 4
"""Controls of a mixture. How much a router amplifies rounding differs from token to token by orders of magnitude."""


def float32_controls(
    spec: Spec, weights: Weights, ids: Array, exact: Scores | None, tables: bool, length: int | None
) -> tuple[Array, Scores]:
    """The oracle in float32 with the experts that `exact` chooses, or its own: logits [N, T, V], and its routers'
    scores. One run; with mixtures a few more whose embedding rows are a rounding away, so that what routers amplify is
    seen."""
    count = 1 + NUDGED if routes.mixtures(spec) else 1
    nudging: dict[str, Any] = {"nudge": gates.UNIT["f32"], "nudged": range(1, count)}
    ops, rounded = EmulatedOps(np.float32, linears=False, kv="f32", tables=tables, **nudging), Scores()
    if exact is not None:
        chosen = routes.chosen(spec, exact)
        ops.forced = {scope: np.broadcast_to(e, (count, *e.shape[1:])) for scope, e in chosen.items()}
    oracle = Oracle(spec, weights, length=length, ops=ops)
    return oracle.logits(np.concatenate([ids] * count), rounded), rounded


def check_graph(run: Array, graph: Graph, what: str, name: str = "graph", tokens: slice = slice(None)) -> Check:
    """Float32 compute on the dequantized weights against the float64 oracle.

    run: the runtime's logits [1, t, V] for the positions `tokens`, in float32 arithmetic throughout.
    """
    first, last, _ = tokens.indices(graph.reference.shape[1])
    if graph.certain < graph.reference.shape[1]:
        last = min(last, graph.certain)
        if last - first < CERTAIN:
            reason = f"only {graph.certain} tokens come before a router's near tie, which rounding may turn"
            return Check(name, Status.NOT_RUN, reason=reason)
        what += f"; the {last - first} tokens before a router's near tie"
        tokens, run = slice(first, last), run[:, : last - first]
    reference = graph.reference[:, tokens]
    control = max(nmse(c[None, tokens], reference) for c in graph.control)
    positions = graph.reference.shape[1]
    lookups = 0 if graph.plain is None else run.shape[1] * graph.hidden
    gate = gates.gate("graph", "f32", control, layers=graph.layers, positions=positions, table_lookups=lookups)
    extra: dict[str, Any] = {"tokens": int(np.prod(run.shape[:2])), "layers": graph.layers}
    if graph.plain is not None:
        extra["nmse_without_gelu_table"] = nmse(run, graph.plain[:, tokens])
        what += "; GELU by the runtime's float16 table on both sides"
    return judge(name, run, reference, gate, what, **extra)


@dataclass(frozen=True)
class Emulation:
    """The same weights and ids three times over: [1, T, V], and what is rounded once or several times over."""

    exact: Array
    """Float64, no rounding."""
    tiled: Array
    """With the runtime's roundings, attention in float32 tiles (many queries at once)."""
    online: Array
    """With the runtime's roundings, attention summed in float16 (few queries at once)."""

    certain: bool = True
    """Whether rounding can turn no token's experts. Where it can, the controls chose their own."""
    turning: Array | None = None
    """[T] whether rounding may turn a token's experts."""

    @property
    def measure(self) -> Measure:
        """NMSE, or where experts are not certain the typical token's."""
        return nmse if self.certain else typical

    def control(self, queries: int, tokens: slice = slice(None)) -> float:
        """What the runtime's roundings cost when that many queries are computed at once: the worst of the controls, or,
        where a token that turned early may carry one off, the median one or the first, which rounds as the runtime."""
        runs = self.tiled if queries >= FLASH_TILE else self.online
        costs = [self.measure(run[None, tokens], self.exact[:, tokens]) for run in runs]
        return max(costs) if self.certain else max(costs[0], float(np.median(costs)))


def _emulation(
    spec: Spec, weights: Weights, ids: Array, length: int | None, ops: Callable[..., EmulatedOps], controls: int
) -> Emulation:
    """The first batch row exactly and `controls` more with roundings, in one pass over the weights, all with the
    experts of the first. Where rounding may turn one, a second pass in which they choose, several times over: which
    routes turn, and what follows from an early one, is a matter of luck.

    ops: the operations, by how often each control is there and by how batch rows are nudged.
    """

    def run(copies: int, scores: Scores, **nudging: Any) -> Array:
        rows = np.concatenate([ids] * (1 + controls * copies))
        return Oracle(spec, weights, length=length, ops=ops(copies, **nudging)).logits(rows, scores)

    scores = Scores()
    y = run(1, scores, follow=True)
    certain = routes.certain(spec, scores, scores)
    if certain.all():
        return Emulation(y[:1], y[1:2], y[controls:])
    n = 1 + NUDGED
    y = run(n, Scores(), nudged=[i for i in range(1, 1 + controls * n) if (i - 1) % n])
    return Emulation(y[:1], y[1 : 1 + n], y[1 + (controls - 1) * n :], False, ~certain)


def emulate(spec: Spec, weights: Weights, ids: Array, length: int | None = None) -> Emulation:
    """llama.cpp's roundings. ids [1, T]. Weights that are `Typed` say how their input is rounded."""

    def ops(n: int, **nudging: Any) -> EmulatedOps:
        rows, online = slice(1, 1 + 2 * n), slice(1 + n, 1 + 2 * n)
        return EmulatedOps(np.float64, rows=rows, online=online, nudge=gates.UNIT["f16"], **nudging)

    return _emulation(spec, weights, ids, length, ops, 2)


def emulate_dtype(spec: Spec, weights: Weights, ids: Array, length: int | None, a: Arithmetic) -> Emulation:
    """The control of a runtime that computes in one dtype: float32 NumPy, or the oracle with every operation's result
    rounded to 16 bits. Quantized activations are rounded on top, where weights are `Typed`."""
    single = a.compute == "f32" and a.cache == "f32"
    if single and a.activations is None:
        return _float32(spec, weights, ids, length)

    def ops(n: int, **nudging: Any) -> EmulatedOps:
        nudging["nudge"] = max(gates.UNIT[p] for p in (a.compute, a.cache))
        rounding: dict[str, Any] = {"compute": a.compute, "kv": a.cache, "rotary": a.tables, "gains": a.gains}
        return RoundedOps(np.float64, rows=slice(1, 1 + n), **rounding, **nudging)

    found = _emulation(spec, weights, ids, length, ops, 1)
    nothing = single and np.array_equal(found.tiled, found.exact)  # no weight of a type that rounds its input
    return _float32(spec, weights, ids, length) if nothing else found


def _float32(spec: Spec, weights: Weights, ids: Array, length: int | None) -> Emulation:
    scores = Scores()
    exact = Oracle(spec, weights, length=length).logits(ids, scores)
    y, rounded = float32_controls(spec, weights, ids, scores, False, length)
    certain = routes.certain(spec, scores, rounded)
    if certain.all():
        return Emulation(exact, y, y)
    y, _ = float32_controls(spec, weights, ids, None, False, length)
    return Emulation(exact, y, y, False, ~certain)


COARSENESS: tuple[str, ...] = ("f32", "f16", "bf16", "int8", "q8_0", "q8_k")


UNCERTAIN = "; the median token, since rounding may turn a router's near tie"


def coarsest(precisions: Sequence[str]) -> str:
    """The roundings' common bound is that of the coarsest."""
    return max(precisions, key=lambda p: (gates.UNIT[p], COARSENESS.index(p)))


def check_arithmetic(run: Array, emulation: Emulation, layers: int, precision: str, what: str) -> Check:
    """The shipped artifact with its stock settings against the float64 oracle on the same dequantized weights.

    run: logits [1, T, V] of all tokens at once. precision: the coarsest rounding on the path.
    """
    queries = run.shape[1]
    near = emulation.tiled if queries >= FLASH_TILE else emulation.online

    def compared(tokens: slice, what: str) -> Check:
        control = emulation.control(queries, tokens)
        gate = gates.gate("arithmetic", precision, control, layers=layers, positions=queries)
        unexplained = emulation.measure(run[:, tokens], near[:1, tokens])
        given = {"measure": emulation.measure, "unexplained": unexplained, "precision": precision}
        return judge("arithmetic", run[:, tokens], emulation.exact[:, tokens], gate, what, **given)

    check = compared(slice(None), what + ("" if emulation.certain else UNCERTAIN))
    if not emulation.certain and (reason := astray(run, emulation)):
        return replace(check, status=Status.FAIL, reason=reason)
    if check.status is Status.FAIL and (turned := turned_at(run, near, emulation)) is not None:
        where = f"token {turned}, where a router is near a tie, took other experts"
        if turned < CERTAIN:
            return Check("arithmetic", Status.NOT_RUN, reason=f"{where}, and too few tokens come before it")
        check = compared(slice(0, turned), f"{what}; {turned} of them, since {where}")
        return replace(check, flags=(*check.flags, f"{turned} of {queries} tokens were compared: {where}"))
    return check


ASTRAY = 0.5
"""NMSE that no other experts explain: logits of noise have 2, of the wrong sign 4, of twice the size 1. Controls whose
experts turned stayed below 0.2 (of 4 experts, one chosen)."""


def astray(run: Array, emulation: Emulation, tokens: slice = slice(None)) -> str:
    """What is wrong with a run that is too far from the reference to have turned a few experts; else nothing."""
    exact = emulation.exact[:, tokens]
    error = nmse(run, exact)
    if error <= max(ASTRAY, 2 * max(nmse(y[None, tokens], exact) for y in emulation.tiled)):
        return ""
    return f"NMSE {error:.2g} over all tokens, more than other experts explain"


TURNED = 10.0
"""A token whose error is that many times the largest of any token in the median control went another way."""


def turned_at(run: Array, controls: Array, emulation: Emulation) -> int | None:
    """The first token that went another way than the controls did, if rounding may turn its experts: what follows is
    another sequence. None where there is none, or where it had no choice: then it is a bug."""
    if emulation.turning is None or not np.isfinite(run).all():
        return None
    errors, usual = (np.square(y - emulation.exact).sum(-1) for y in (run[:, : emulation.exact.shape[1]], controls))
    far = np.flatnonzero(errors[0] > TURNED * np.median(usual.max(-1)))
    return int(far[0]) if len(far) and emulation.turning[far[0]] else None


def stepwise(runtime: Runtime, ids: Array, until: int = 24) -> tuple[Array, slice]:
    """The first `until` tokens again, in pieces: a prefill, ten single tokens, and two at once.

    ids [1, T]. Returns logits [1, t, V] and the positions that they belong to.
    """
    t = min(ids.shape[1], until)
    head = max(1, t - 12)
    parts = [runtime.prefill(ids[0, :head])[None]]
    parts += [runtime.step(ids[0, i : i + 1]) for i in range(head, max(head, t - 2))]
    if t > head:
        parts.append(runtime.step(ids[0, max(head, t - 2) : t]))
    return np.concatenate(parts)[None], slice(head - 1, t)


def check_cached(run: Array, tokens: slice, emulation: Emulation, layers: int, precision: str) -> Check:
    """The cache of the runtime as shipped: what `stepwise` returned against the float64 oracle, all at once."""
    control = emulation.control(1, tokens)
    gate = gates.gate("arithmetic", precision, control, layers=layers, positions=tokens.stop)
    what = f"prefill {tokens.start + 1}, then token by token to {tokens.stop}, in the runtime as shipped"
    what += "" if emulation.certain else UNCERTAIN
    exact = emulation.exact[:, tokens]
    check = judge("invariants", run, exact, gate, what, emulation.measure, precision=precision)
    if not emulation.certain and (reason := astray(run, emulation, tokens)):
        return replace(check, status=Status.FAIL, reason=reason)
    if check.status is Status.FAIL and emulation.turning is not None and emulation.turning[: tokens.stop].any():
        # which of them turned in the prefill is not seen here; the float32 graph is held to its own gate
        reason = f"{check.reason}; a router is near a tie among these tokens, so that rounding may turn its experts"
        return replace(check, status=Status.NOT_RUN, reason=reason)
    return check


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
