"""Verification where a router's choice is near a tie, which rounding may turn either way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from backends.base import Arithmetic
from backends.numpy.model import Oracle
from convert.verify import routes
from convert.verify.emulate import RoundedOps, Typed
from convert.verify.metrics import nmse, typical
from convert.verify.numeric import (
    CERTAIN,
    Emulation,
    check_arithmetic,
    check_cached,
    check_graph,
    emulate,
    emulate_dtype,
    graph_reference,
)
from convert.verify.report import Status
from convert.verify.run import _unleft
from parity_tests.cases import FEATURES, random_ids, random_weights
from parity_tests.mutants import ExpertsSwapped, OracleRuntime
from spec import Spec
from spec.config import merge

SPEC = FEATURES["moe"]
HALF = Arithmetic(compute="bf16", cache="f32")


def near_tie(spec: Spec, at: float) -> dict[str, Any]:
    """Weights with which experts 0 and 1 have scores that differ by about `at` of their size, in every layer."""
    weights = random_weights(spec)
    for name in [n for n in weights if n.endswith(".router.weight")]:
        weights[name][1] = weights[name][0] * np.float32(1 + at)
    return weights


def test_scores_keep_nothing_else() -> None:
    kept = routes.Scores()
    Oracle(SPEC, random_weights(SPEC)).logits(random_ids(SPEC, 1, 8), kept)
    assert sorted(kept) == ["L0.mlp.scores", "L1.mlp.scores"]


def test_dense_specs_are_always_certain() -> None:
    assert routes.certain_prefix(FEATURES["llama"], {}, {}, 13) == 13


def test_experts_that_are_all_chosen_are_certain() -> None:
    patch = {"block": {"mlp": {"experts": 2, "router": {"top_k": 2}}}}
    spec = Spec.model_validate(merge(SPEC.model_dump(exclude_unset=True), patch))
    scores = {f"L{i}.mlp.scores": np.zeros((1, 4, 2)) for i in range(2)}
    assert routes.certain(spec, scores, scores).all()


def test_the_graph_check_compares_what_comes_before_a_near_tie() -> None:
    """Two experts that are equal up to rounding leave nothing that float32 could be held to."""
    ids = random_ids(SPEC, 1, 40)
    clear, tied = random_weights(SPEC), near_tie(SPEC, 0.0)
    assert graph_reference(SPEC, clear, ids, tables=False).certain == 40
    graph = graph_reference(SPEC, tied, ids, tables=False)
    assert graph.certain < 40
    check = check_graph(Oracle(SPEC, tied, np.float32).logits(ids), graph, "float32")
    assert check.status is (Status.PASS if graph.certain >= CERTAIN else Status.NOT_RUN)
    assert "near tie" in check.reason


def test_a_wrong_graph_is_caught_before_the_first_near_tie() -> None:
    ids, weights = random_ids(SPEC, 1, 40), random_weights(SPEC)
    graph = graph_reference(SPEC, weights, ids, tables=False)
    cut = type(graph)(**{**vars(graph), "certain": 17})
    good = check_graph(Oracle(SPEC, weights, np.float32).logits(ids), cut, "float32")
    assert good.status is Status.PASS and good.details["tokens"] == 17
    bad = OracleRuntime(SPEC, weights, ExpertsSwapped()).logits(ids)
    assert check_graph(bad, cut, "mutant").status is Status.FAIL


@pytest.mark.parametrize("feature", [n for n in FEATURES if n.startswith("moe")])
def test_rounded_arithmetic_passes_though_routes_flip(feature: str) -> None:
    """The runtime here rounds as bfloat16 does and chooses its own experts, which are often others."""
    spec = FEATURES[feature]
    ids, weights = random_ids(spec, 1, 47), random_weights(spec, 3)
    emulation = emulate_dtype(spec, weights, ids, None, HALF)
    run = Oracle(spec, weights, ops=RoundedOps(compute="bf16", kv="bf16")).logits(ids)
    check = check_arithmetic(run, emulation, spec.depth, "bf16", "bfloat16")
    assert check.status is Status.PASS, check.reason


def test_rounded_arithmetic_with_swapped_experts_fails() -> None:
    ids, weights = random_ids(SPEC, 1, 47), random_weights(SPEC, 3)
    emulation = emulate_dtype(SPEC, weights, ids, None, HALF)

    class Swapped(RoundedOps):
        def experts(self, x: Any, routes: Any, w: Any, m: Any) -> Any:
            return super().experts(x, (np.array([1, 0, 2, 3, 4])[routes[0]], routes[1]), w, m)

    run = Oracle(SPEC, weights, ops=Swapped(compute="bf16")).logits(ids)
    assert check_arithmetic(run, emulation, SPEC.depth, "bf16", "bfloat16").status is Status.FAIL


def test_the_control_takes_the_references_experts() -> None:
    """Rounded inputs of products, a near tie everywhere: the control's error stays that of rounding."""
    ids, weights = random_ids(SPEC, 1, 40), random_weights(SPEC)
    typed = {n: Typed(w, "q8_0") if w.ndim > 1 and w.shape[1] % 32 == 0 else w for n, w in weights.items()}
    emulation = emulate(SPEC, typed, ids)
    exact = Oracle(SPEC, weights).logits(ids)
    assert nmse(emulation.exact, exact) < 1e-20
    assert 1e-7 < typical(emulation.tiled[:1], exact) < 1e-2


def test_rounding_of_one_batch_row_leaves_the_others_exact() -> None:
    ids, weights = np.concatenate([random_ids(SPEC, 1, 20)] * 3), random_weights(SPEC)
    ops = RoundedOps(compute="bf16", rows=slice(1, 2), follow=True)
    y = Oracle(SPEC, weights, ops=ops).logits(ids)
    exact = Oracle(SPEC, weights).logits(ids[:1])
    assert nmse(y[:1], exact) < 1e-25 and nmse(y[2:], exact) < 1e-25 and nmse(y[1:2], exact) > 1e-7


def test_typical_ignores_the_few() -> None:
    rng = np.random.default_rng(0)
    ref = rng.standard_normal((1, 40, 9))
    run = ref + 1e-3 * rng.standard_normal(ref.shape)
    usual = typical(run, ref)
    run[0, :5] += 1.0
    assert typical(run, ref) == pytest.approx(usual, rel=0.3) and nmse(run, ref) > 100 * usual
    run[0, 7] = np.nan
    assert typical(run, ref) == np.inf


def test_a_run_is_compared_up_to_the_token_that_turned() -> None:
    """From there on it is another sequence, unless the token had no choice: then it is a bug."""
    ids, weights = random_ids(SPEC, 1, 40), random_weights(SPEC)
    exact, turning = emulate_dtype(SPEC, weights, ids, None, HALF).exact, np.zeros(40, bool)
    calm = exact + 1e-2 * exact.std() * np.random.default_rng(0).normal(size=exact.shape)
    good = Emulation(exact, calm, calm)
    turning[[5, 15]] = True
    run = good.tiled[:1].copy()
    elsewhere = 0.6 * exact.std()
    run[0, 15:] += elsewhere

    def checked(turning: Any) -> Any:
        emulation = replace(good, certain=False, turning=turning)
        return check_arithmetic(run, emulation, SPEC.depth, "bf16", "bfloat16")

    check = checked(turning)
    assert check.status is Status.PASS and "15 of them" in check.reason and "15 of 40 tokens" in check.flags[0]
    turning[15] = False
    assert checked(turning).status is Status.FAIL
    assert checked(None).status is Status.FAIL
    turning[:] = True
    run[0, 4:15] += elsewhere
    assert checked(turning).status is Status.NOT_RUN
    run[0, 4:] = np.nan
    assert checked(turning).status is Status.FAIL


@pytest.mark.parametrize("wrong", ["noise", "sign", "size", "end"])
def test_no_near_tie_excuses_another_function(wrong: str) -> None:
    ids, weights = random_ids(SPEC, 1, 40), random_weights(SPEC)
    good = emulate_dtype(SPEC, weights, ids, None, HALF)
    exact = good.exact
    noise = np.random.default_rng(0).normal(size=exact.shape) * exact.std()
    end = np.concatenate([exact[:, :24], -exact[:, 24:]], axis=1)
    run = {"noise": noise, "sign": -exact, "size": 2 * exact, "end": end}[wrong]
    emulation = replace(good, certain=False, turning=np.ones(40, bool))
    assert check_arithmetic(run, emulation, SPEC.depth, "bf16", "bfloat16").status is Status.FAIL
    cached = check_cached(run[:, 20:32], slice(20, 32), emulation, SPEC.depth, "bf16")
    assert cached.status is Status.FAIL


def test_a_window_that_a_near_tie_hides_is_told() -> None:
    patch = {"block": {"attention": {"window": 20}}}
    spec = Spec.model_validate(merge(SPEC.model_dump(exclude_unset=True), patch))
    assert _unleft(spec, 20) == ("the window of 20 tokens is not left: 20 were compared",)
    assert not _unleft(spec, 21) and not _unleft(SPEC, 8)
