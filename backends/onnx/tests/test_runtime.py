"""The runtime's manners: bounds, order of calls, bad input, text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import backends
from backends.base import Runtime
from convert.tokenizers import read_tokenizer
from parity_tests.artifacts import write
from parity_tests.cases import random_ids, random_weights
from parity_tests.checkpoints import llama, write_checkpoint
from spec.errors import UserError

SPEC = llama(depth=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx")
    weights = random_weights(SPEC)
    tokenizer = read_tokenizer(write_checkpoint(path / "checkpoint", SPEC, weights))
    return write("onnx", SPEC, weights, path / "m", "q4", tokenizer)


@pytest.fixture
def runtime(folder: Path) -> Iterator[Runtime]:
    with backends.load(folder, threads=1, context=40) as made:
        yield made


def test_a_session_has_bounds(runtime: Runtime) -> None:
    ids = random_ids(SPEC, 1, 60)
    assert runtime.context == 40
    for call in (lambda: runtime.logits(ids), lambda: runtime.prefill(ids[0])):
        with pytest.raises(UserError, match="60 tokens exceed the session's context of 40"):
            call()
    runtime.prefill(ids[0, :38])
    runtime.step(ids[0, 38:40])
    with pytest.raises(UserError, match="41 tokens exceed"):
        runtime.step(ids[0, 40:41])


@pytest.mark.parametrize("bad", [-1, SPEC.vocab_size])
def test_ids_are_of_the_vocabulary(runtime: Runtime, bad: int) -> None:
    with pytest.raises(UserError, match="beyond the vocabulary of 384"):
        runtime.logits(np.array([[1, bad]]))
    with pytest.raises(UserError, match="beyond the vocabulary"):
        runtime.prefill(np.array([bad]))


def test_calls_come_in_order_and_with_tokens(runtime: Runtime) -> None:
    with pytest.raises(UserError, match="no sequence to continue"):
        runtime.step(np.array([1]))
    with pytest.raises(UserError, match=r"shape \[0\]"):
        runtime.prefill(np.array([], np.int64))
    with pytest.raises(UserError, match=r"\[B, T\] is needed"):
        runtime.logits(np.array([1, 2]))


def test_a_refused_step_leaves_the_sequence_as_it_was(runtime: Runtime) -> None:
    ids = random_ids(SPEC, 1, 12)[0]
    runtime.prefill(ids[:10])
    with pytest.raises(UserError):
        runtime.step(np.array([9999]))
    got = runtime.step(ids[10:])
    runtime.prefill(ids[:10])
    assert np.array_equal(got, runtime.step(ids[10:]))


def test_a_prefill_that_fails_leaves_nothing_to_continue(runtime: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(SPEC, 1, 12)[0]
    runtime.prefill(ids[:5])
    monkeypatch.setattr("backends.onnx.runtime.CHUNK", 4)
    plain, calls = type(runtime)._call, []

    def failing(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise UserError("out of memory")
        return plain(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(type(runtime), "_call", failing)
        with pytest.raises(UserError, match="out of memory"):
            runtime.prefill(ids)
    with pytest.raises(UserError, match="no sequence to continue"):
        runtime.step(ids[:1])


def test_logits_leave_the_sequence_alone(runtime: Runtime) -> None:
    ids = random_ids(SPEC, 2, 12)
    runtime.prefill(ids[0, :11])
    runtime.logits(ids)
    got = runtime.step(ids[0, 11:])
    runtime.prefill(ids[0, :11])
    assert np.array_equal(got, runtime.step(ids[0, 11:]))


def test_results_outlive_the_runtime(folder: Path) -> None:
    ids = random_ids(SPEC, 1, 12)
    with backends.load(folder, threads=1) as made:
        got = made.logits(ids)
        kept = got.copy()
        for _ in range(5):
            made.logits(random_ids(SPEC, 1, 12, 3))
    assert np.array_equal(got, kept)


def test_settings_that_make_no_sense_are_refused(folder: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"context": 0}, "between 1 and the model's 128"),
        ({"context": 129}, "between 1 and the model's 128"),
        ({"threads": 0}, "at least 1"),
        ({"device": "tpu"}, "there are: cpu"),
    ]
    for settings, message in refused:
        with pytest.raises(UserError, match=message):
            backends.load(folder, **settings)


def test_it_says_what_runs(runtime: Runtime) -> None:
    info = runtime.info()
    assert info["backend"] == "onnx" and info["device"] == "cpu" and info["profile"] == "ort"
    assert info["precision"] == "q4 weights, f32 compute" and info["context"] == 40 and info["threads"] == 1


def test_text_goes_through_the_folders_own_tokenizer(runtime: Runtime, tmp_path: Path) -> None:
    ids = runtime.encode("def f(x):")
    assert ids[0] == 0 and runtime.decode(ids) == b"def f(x):"
    assert runtime.eos_ids == {1}
    path = write("onnx", SPEC, random_weights(SPEC), tmp_path / "m")
    with backends.load(path) as silent, pytest.raises(UserError, match=r"has no tokenizer\.json"):
        silent.encode("x")
