"""The graph with caches of fixed length, in ONNX Runtime, under the very code that runs engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from backends.numpy.model import Oracle
from backends.tensorrt.engine import limits
from backends.tensorrt.session import Sequences
from backends.tensorrt.support import computed_in
from parity_tests.artifacts import EXACT, check_packing, chunked, opened, values
from parity_tests.cases import FEATURES, nmse, random_ids, random_specs, random_weights
from parity_tests.tensorrt_graphs import OrtExecutor, write_graph
from spec import Spec

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx_ir")


def sequences(path: Path, spec: Spec, compute: str, chunk: int = 20, batch: int = 2) -> tuple[Sequences, OrtExecutor]:
    """A runtime over the artifact's graph, with bounds so small that prompts and batches go in pieces."""
    executor = OrtExecutor(path, spec, compute)
    bounds = replace(limits(spec, compute), chunk=chunk, batch=batch)
    return Sequences(executor, bounds, spec.vocab_size, spec.context), executor


def check(spec: Spec, path: Path, level: str, compute: str) -> None:
    """Whole batches, chunks, token by token, against the oracle on the artifact's weights."""
    weights = random_weights(spec)
    write_graph(spec, weights, path, level, compute)
    runtime, executor = sequences(path, spec, compute)
    artifact = opened("tensorrt", path)
    oracle = Oracle(spec, values(artifact), length=artifact.session or spec.context)
    length = min(47, spec.context - 1)
    ids = random_ids(spec, 3, length)
    exact = oracle.logits(ids)
    for batch in (1, 3):
        got = runtime.logits(ids[:batch])
        assert got.shape == (batch, length, spec.vocab_size) and got.dtype == np.float32
        for row in range(batch):
            assert nmse(got[row], exact[row]) <= EXACT, f"batch {batch}, row {row}"
        assert nmse(got[:, -4:], exact[:batch, -4:]) <= 4 * EXACT
    assert max(b for b, *_ in executor.calls) == 2  # a batch of 3 is cut
    assert max(t for _, t, _ in executor.calls) == min(20, length)
    for chunks in ([length], [9, 1, 5, 1, length - 16], [1] * min(length, 24)):
        pieces, at = chunked(runtime, ids[0], [c for c in chunks if c > 0])  # type: ignore[arg-type]
        assert nmse(pieces, exact[0, at]) <= EXACT, f"chunks {chunks}"


@pytest.mark.parametrize("name", FEATURES)
def test_features_match_the_oracle(name: str, tmp_path: Path) -> None:
    check(FEATURES[name], tmp_path, "f32", "f32")


@pytest.mark.parametrize("level", ["bf16", "f16", "q8", "q4", "fp8", "nvfp4"])
@pytest.mark.parametrize("name", ["llama", "tied", "uneven_width", "gpt2", "gemma2", "moe_sinks"])
def test_levels_match_the_oracle_on_their_own_weights(name: str, level: str, tmp_path: Path) -> None:
    """The shipped 16-bit graph with its arithmetic widened, as `load(exact=True)` builds it."""
    check(FEATURES[name], tmp_path, level, computed_in(level, ""))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(spec=random_specs())
def test_any_combination_matches_the_oracle(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> None:
    for level in ("f32", "q4"):
        check(spec, tmp_path_factory.mktemp("any"), level, computed_in(level, ""))


@pytest.mark.parametrize("level", ["f32", "bf16", "f16", "q8", "q4", "fp8", "nvfp4"])
@pytest.mark.parametrize("name", ["tied", "uneven_width", "learned", "alibi_odd_heads", "moe_sigmoid"])
def test_weights_go_in_bit_for_bit(name: str, level: str, tmp_path: Path) -> None:
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    write_graph(spec, weights, tmp_path, level, computed_in(level, ""))
    (tmp_path / "model.engine").touch()
    check_packing("tensorrt", tmp_path, spec, weights, level)


def test_logits_leave_the_sequence_in_progress_alone(tmp_path: Path) -> None:
    spec = FEATURES["window"]
    write_graph(spec, random_weights(spec), tmp_path, "f32", "f32")
    runtime, _ = sequences(tmp_path, spec, "f32")
    ids = random_ids(spec, 1, 30)[0]
    whole = runtime.logits(ids[None])[0]
    assert nmse(runtime.prefill(ids[:11]), whole[10]) < 1e-12
    runtime.logits(ids[None, ::-1].copy())
    assert nmse(runtime.step(ids[11:]), whole[11:]) < 1e-12
    assert nmse(runtime.prefill(ids[:3]), whole[2]) < 1e-12  # a new sequence in the old one's caches


def test_an_old_row_never_shows_in_a_new_sequence(tmp_path: Path) -> None:
    """Rows of a batch are independent, and the future changes nothing."""
    spec = FEATURES["gemma2"]
    write_graph(spec, random_weights(spec), tmp_path, "f32", "f32")
    runtime, _ = sequences(tmp_path, spec, "f32", batch=4)
    ids = random_ids(spec, 3, 40)
    got = runtime.logits(ids)
    other = ids.copy()
    other[0] = other[0, ::-1]
    other[1:, 30:] = (other[1:, 30:] + 1) % spec.vocab_size
    assert np.array_equal(runtime.logits(other)[1:, :30], got[1:, :30])
