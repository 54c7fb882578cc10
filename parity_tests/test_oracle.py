"""Laws that the oracle must obey by itself: the forward pass has no other reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from backends.numpy.model import Oracle
from parity_tests.cases import FEATURES, nmse, random_ids, random_specs, random_weights
from spec import Spec


def _stepwise(oracle: Oracle, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    cache, out, at = oracle.new_cache(len(ids)), [], 0
    for n in sizes:
        y, cache = oracle.forward(ids[:, at : at + n], cache)
        out.append(y)
        at += n
    return np.concatenate(out, 1)


def check_laws(spec: Spec) -> None:
    ids = random_ids(spec, 2, 20)
    oracle = Oracle(spec, random_weights(spec))
    full = oracle.logits(ids)
    assert np.isfinite(full).all()
    assert np.abs(full).std() > 1e-3
    np.testing.assert_allclose(_stepwise(oracle, ids, [1] * 20), full, rtol=0, atol=1e-10)
    np.testing.assert_allclose(_stepwise(oracle, ids, [7, 1, 9, 3]), full, rtol=0, atol=1e-10)
    np.testing.assert_allclose(oracle.logits(ids[1:]), full[1:], rtol=0, atol=1e-10)
    changed = ids.copy()
    changed[:, 12:] = (changed[:, 12:] + 1) % spec.vocab_size
    np.testing.assert_allclose(oracle.logits(changed)[:, :12], full[:, :12], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FEATURES)
def test_laws_hold_for_every_feature(name: str) -> None:
    check_laws(FEATURES[name])


@settings(max_examples=15, deadline=None)
@given(random_specs())
def test_laws_hold_for_random_specs(spec: Spec) -> None:
    check_laws(spec)


@pytest.mark.parametrize("name", ["llama", "learned", "alibi", "window", "sinks"])
def test_packed_documents_equal_separate_ones(name: str) -> None:
    spec = FEATURES[name]
    ids, oracle = random_ids(spec, 1, 20), Oracle(spec, random_weights(spec))
    segments = np.array([[0] * 8 + [1] * 12])
    positions = np.array([[*range(8), *range(12)]])
    packed = oracle.logits(ids, positions=positions, segments=segments)
    apart = np.concatenate([oracle.logits(ids[:, :8]), oracle.logits(ids[:, 8:])], 1)
    np.testing.assert_allclose(packed, apart, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_changes_the_function(name: str) -> None:
    """A feature that the forward pass ignores would equal the plain Llama with the same weights where shapes agree."""
    spec, plain = FEATURES[name], FEATURES["llama"]
    if name == "llama":
        return
    ids = random_ids(plain, 1, 40)
    weights, same = random_weights(spec), random_weights(plain)
    weights |= {n: w for n, w in same.items() if n in weights and weights[n].shape == w.shape}
    assert nmse(Oracle(spec, weights).logits(ids), Oracle(plain, same).logits(ids)) > 1e-5


def test_a_sequence_beyond_the_declared_length_is_refused() -> None:
    spec = FEATURES["llama"]
    with pytest.raises(ValueError, match="exceed the session's length of 48"):
        Oracle(spec, random_weights(spec)).logits(random_ids(spec, 1, 49))


def test_taps_name_every_intermediate() -> None:
    spec = FEATURES["llama"]
    taps: dict[str, np.ndarray] = {}
    Oracle(spec, random_weights(spec)).logits(random_ids(spec, 1, 5), taps)
    assert {"embed", "L0.attn.q_rope", "L1.mlp.down", "L1.out", "final_norm", "logits"} <= set(taps)
