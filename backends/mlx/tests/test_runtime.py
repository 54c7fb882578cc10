"""Our own runtime: what it says of itself, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import backends
from backends.mlx import runtime as module
from parity_tests.artifacts import write
from parity_tests.cases import FEATURES, nmse, random_ids, random_weights
from spec.errors import UserError

SPEC = FEATURES["window_pattern"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("mlx", SPEC, random_weights(SPEC), tmp_path_factory.mktemp("m") / "m", "q4")


def test_it_is_found_by_its_mark_and_says_what_runs(folder: Path) -> None:
    with backends.load(folder) as r:
        info = r.info()
        assert info["device"] in module.devices()
        assert info["backend"] == "mlx" and info["carrier"] == "llama" and "f16" in info["precision"]
        assert r.vocab_size == SPEC.vocab_size and r.context == SPEC.context and r.eos_ids == frozenset()
        with pytest.raises(UserError, match=r"has no tokenizer\.json"):
            r.encode("x")
    with backends.load(folder, exact=True) as r:
        assert "f32" in r.info()["precision"]


def test_bad_requests_are_one_line(folder: Path) -> None:
    with backends.load(folder, context=20) as r:
        for ids, message in (
            (np.zeros((1, 0), int), "is needed"), (np.zeros(3, int), r"\[B, T\] is needed"),
            (np.array([[0, SPEC.vocab_size]]), "vocabulary"), (np.array([[-1]]), "vocabulary"),
            (np.zeros((1, 21), int), "longer context"),
        ):  # fmt: skip
            with pytest.raises(UserError, match=message):
                r.logits(ids)
        with pytest.raises(UserError, match="call prefill first"):
            r.step(np.array([1]))
        with pytest.raises(UserError, match=r"\[T\] is needed"):
            r.prefill(np.zeros(0, int))
        r.prefill(np.arange(15))
        with pytest.raises(UserError, match="21 tokens exceed"):
            r.step(np.arange(6))
        assert r.step(np.arange(5)).shape == (5, SPEC.vocab_size)


@pytest.mark.parametrize(("options", "message"), [
    ({"context": 0}, "context=0"), ({"context": 999}, "between 1 and the model's 48"), ({"threads": 0}, "threads=0"),
    ({"device": "tpu"}, "cpu and gpu"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module.load(folder, **options)


def test_long_prompts_are_computed_in_chunks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(SPEC, 3, 40)
    with backends.load(folder, exact=True) as r:
        whole, last = r.logits(ids), r.prefill(ids[0])
        monkeypatch.setattr(module, "CHUNK", 7)
        assert nmse(r.logits(ids), whole) < 1e-12
        assert nmse(r.prefill(ids[0]), last) < 1e-12


def test_a_failed_prefill_leaves_the_last_sequence_alone(folder: Path) -> None:
    with backends.load(folder) as r:
        r.prefill(np.arange(9))
        with pytest.raises(UserError):
            r.prefill(np.array([999]))
        assert r.step(np.array([3])).shape == (1, SPEC.vocab_size)
