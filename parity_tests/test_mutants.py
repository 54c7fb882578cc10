"""The proof catches every seeded bug, with the check that owns it, and lets the unmutated through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends.numpy.model import Oracle
from convert import gates
from convert.verify.emulate import EmulatedOps, Typed
from convert.verify.numeric import check_arithmetic, check_graph, emulate, graph_reference, stepwise
from convert.verify.report import Check, Status
from parity_tests.cases import FEATURES, random_ids, random_weights
from parity_tests.mutants import CACHE, GRAPH, Float32, Mutant, OracleRuntime
from spec.ops import Step
from spec.rope import RopeTable


def graph(ops: Float32, feature: str, *, stepped: bool = False) -> Check:
    """The graph check on a runtime made of these operations, fed all at once or in pieces."""
    spec = FEATURES[feature]
    weights, ids = random_weights(spec), random_ids(spec, 1, 40)
    runtime, reference = OracleRuntime(spec, weights, ops), graph_reference(spec, weights, ids, tables=False)
    if stepped:
        run, tokens = stepwise(runtime, ids)
        return check_graph(run, reference, "mutant", "invariants", tokens)
    return check_graph(runtime.logits(ids), reference, "mutant")


@pytest.mark.parametrize("feature", sorted({m.feature for m in GRAPH.values()}))
def test_the_graph_check_passes_correct_operations(feature: str) -> None:
    check = graph(Float32(), feature)
    assert check.status is Status.PASS and check.gate is not None and check.gate < 1e-9


@pytest.mark.parametrize("name", GRAPH)
def test_the_graph_check_kills(name: str) -> None:
    mutant: Mutant = GRAPH[name]
    check = graph(mutant.ops(), mutant.feature)
    assert check.status is Status.FAIL
    assert check.measured is not None and check.gate is not None
    assert check.measured > 100 * check.gate, "caught, but by luck"


@pytest.mark.parametrize("name", CACHE)
def test_the_invariants_kill(name: str) -> None:
    mutant = CACHE[name]
    assert graph(Float32(), mutant.feature, stepped=True).status is Status.PASS
    assert graph(mutant.ops(), mutant.feature, stepped=True).status is Status.FAIL


@pytest.mark.parametrize("name", CACHE)
def test_cache_mutants_are_invisible_all_at_once(name: str) -> None:
    """Which is why the invariants are there: no comparison of whole prefills could see these."""
    assert graph(CACHE[name].ops(), CACHE[name].feature).status is Status.PASS


def test_a_nan_fails_whatever_the_gate() -> None:
    spec = FEATURES["llama"]
    weights, ids = random_weights(spec), random_ids(spec, 1, 8)
    run = OracleRuntime(spec, weights, Float32()).logits(ids)
    run[0, 3, 5] = np.nan
    check = check_graph(run, graph_reference(spec, weights, ids, tables=False), "")
    assert check.status is Status.FAIL and "not finite" in check.reason


def test_an_inflated_control_proves_nothing() -> None:
    gate = gates.gate("graph", "f32", 1e-4, layers=2, positions=16)
    assert not gate.usable


class RoundedThetaOff(EmulatedOps):
    """The runtime's own roundings, and a rotation that is 0.1 % too fast."""

    def rotation(self, table: RopeTable, step: Step[Any]) -> Any:
        return super().rotation(replace(table, inv_freq=(table.inv_freq * 1.001).astype(np.float32)), step)


class RoundedHeadsInterleaved(EmulatedOps):
    def mix(self, q: Any, k: Any, v: Any, step: Any, key_slots: Any, a: Any, w: Any) -> Any:
        n = q.shape[1] // k.shape[1]
        return super().mix(q, np.tile(k, (1, n, 1, 1)), np.tile(v, (1, n, 1, 1)), step, key_slots, a, w)


@pytest.mark.parametrize(
    ("ops", "activation", "status"),
    [
        (EmulatedOps, "q8_0", Status.PASS),
        (EmulatedOps, "f16", Status.PASS),
        (RoundedThetaOff, "f16", Status.FAIL),
        (RoundedThetaOff, "q8_0", Status.PASS),  # hidden by the activations' rounding: why the graph is checked apart
        (RoundedHeadsInterleaved, "q8_0", Status.FAIL),
    ],
)
def test_the_arithmetic_check_sees_what_exceeds_the_runtimes_own_rounding(
    ops: type[EmulatedOps], activation: str, status: Status
) -> None:
    spec = FEATURES["llama"]
    ids = random_ids(spec, 1, 40)
    weights = {n: Typed(w, activation) if w.ndim == 2 else w for n, w in random_weights(spec).items()}
    run = Oracle(spec, weights, ops=ops(online=slice(0, 1))).logits(ids)
    check = check_arithmetic(run, emulate(spec, weights, ids), spec.depth, activation, "mutant")
    assert check.status is status, check
