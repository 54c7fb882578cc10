"""Sampling, stop strings and streaming, over the oracle and a scripted runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.generate import Held, Sampler, generate, repeat_less
from spec.errors import UserError

V = 260
"""256 bytes, an end token (256), and three that mean nothing."""


class Scripted:
    """A runtime whose likeliest continuation of anything is a given sequence of bytes, then the end token."""

    def __init__(self, script: bytes, context: int = 1000, gap: float = 50.0) -> None:
        self.script, self.gap = [*script, 256], gap
        self._context, self._at, self.fed = context, 0, list[int]()

    vocab_size = V

    @property
    def context(self) -> int:
        return self._context

    def _next(self) -> NDArray[np.float32]:
        logits = np.linspace(0, 1, V).astype(np.float32)
        logits[self.script[min(self._at, len(self.script) - 1)]] = self.gap
        self._at += 1
        return logits

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        self._at, self.fed = 0, ids.tolist()
        return self._next()

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        self.fed += ids.tolist()
        return np.stack([self._next() for _ in ids])

    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> bytes:
        out = bytes(i for i in ids if i < 256)
        return out.removeprefix(b" ")  # as SentencePiece does at the beginning

    eos_ids = frozenset({256})

    def info(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...


def greedy(script: bytes, **options: Any) -> list[str]:
    return list(generate(Scripted(script), [65], temperature=0, **options))


def test_pieces_are_whole_characters_and_the_end_token_ends() -> None:
    text = "na\u00efve \u4f60\u597d \U0001f600!"
    pieces = greedy(text.encode())
    assert "".join(pieces) == text
    assert len(pieces) == len(text)


def test_a_space_after_the_prompt_is_kept() -> None:
    assert "".join(greedy(b" world")) == " world"


def test_every_token_is_fed_back_once() -> None:
    runtime = Scripted(b"abc")
    heard: list[int] = []
    list(generate(runtime, [1, 2], temperature=0, on_token=heard.append))
    assert runtime.fed == [1, 2, 97, 98, 99]
    assert heard == [97, 98, 99, 256]


@pytest.mark.parametrize(("most", "expected"), [(0, ""), (1, "a"), (3, "abc")])
def test_the_number_of_tokens_is_bounded(most: int, expected: str) -> None:
    assert "".join(greedy(b"abcdef", max_tokens=most)) == expected


def test_the_context_bounds_it_too() -> None:
    runtime = Scripted(b"abcdefgh", context=6)
    assert "".join(generate(runtime, [65, 66], temperature=0)) == "abcd"
    with pytest.raises(UserError, match="6 tokens leave no room in a context of 6"):
        generate(runtime, [65] * 6)


def test_a_character_cut_off_at_the_end_is_dropped_and_a_broken_one_replaced() -> None:
    assert "".join(greedy("ab\u4f60".encode(), max_tokens=4)) == "ab"
    assert "".join(greedy(b"a\xffb")) == "a\ufffdb"


@pytest.mark.parametrize(
    ("script", "stop", "expected"),
    [
        (b"one\n\ntwo", ["\n\n"], "one"),
        (b"one\ntwo", ["\n\n"], "one\ntwo"),  # what was held back is released
        (b"aab", ["ab"], "a"),
        (b"abcabd", ["abd"], "abc"),
        (b"xxSTOPyy", ["STOP", "xS"], "x"),
        (b"ends with ST", ["STOP"], "ends with ST"),
        ("caf\u00e9!".encode(), ["\u00e9"], "caf"),
    ],
)
def test_stop_strings_never_leak(script: bytes, stop: list[str], expected: str) -> None:
    assert "".join(greedy(script, stop=stop)) == expected


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_held_text_is_what_stands_before_the_first_stop(text: str, stop: list[str], data: st.DataObject) -> None:
    held, out, at = Held(stop), "", 0
    while at < len(text) and not held.stopped:
        n = data.draw(st.integers(1, 3))
        out += held.push(text[at : at + n])
        assert not any(s in out for s in stop)
        at += n
    out += held.flush()
    # the first stop string to be complete ends it; it began wherever the earliest of those complete by then does
    assert not any(s in out for s in stop)
    if any(s in text for s in stop):
        assert held.stopped
        assert text.startswith(out)
        assert any(text[len(out) :].startswith(s) for s in stop)
    else:
        assert out == text


def test_one_seed_gives_one_text() -> None:
    def text(seed: int | None) -> str:
        return "".join(generate(Scripted(b"", gap=1.0), [65], max_tokens=40, seed=seed))

    assert text(1) == text(1)
    assert len({text(n) for n in range(5)}) == 5
    assert text(None) != text(None)


def drawn(sampler: Sampler, logits: np.ndarray, n: int = 4000) -> np.ndarray:
    counts = np.bincount([sampler(logits, [0]) for _ in range(n)], minlength=len(logits))
    return counts / n


LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, np.array([0.16, 0.09, 0.0225, 0.01, 0.0025]) / 0.285),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.71}, [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        ({"min_p": 0.3}, [8 / 17, 6 / 17, 3 / 17, 0, 0]),
        ({"top_k": 4, "top_p": 0.5, "min_p": 0.9}, [1, 0, 0, 0, 0]),
        ({"repetition_penalty": 2.0}, np.array([0.16, 0.3, 0.15, 0.1, 0.05]) / 0.76),  # token 0 has occurred
    ],
)
def test_draws_follow_the_distribution(options: dict[str, Any], expected: Sequence[float]) -> None:
    got = drawn(Sampler(seed=3, **options), LOGITS)
    p = np.asarray(expected)
    sigma = np.sqrt(p * (1 - p) / 4000)
    assert (np.abs(got - p) <= 4.5 * sigma).all()


def test_top_k_keeps_k_even_among_equals() -> None:
    p = Sampler(top_k=2).probabilities(np.zeros(5))
    assert np.count_nonzero(p) == 2


def test_the_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    got = repeat_less(np.array([2.0, -2.0, 2.0, -2.0]), [0, 1, 1, 99], 2.0)
    np.testing.assert_array_equal(got, [1.0, -4.0, 2.0, -2.0])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20),
    st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    st.integers(0, 25),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_a_sampler_always_chooses_a_possible_token(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    sampler = Sampler(temperature, top_k, top_p, min_p, 1.3, seed=0)
    token = sampler(np.array(logits), [0])
    assert 0 <= token < len(logits)
    if temperature:
        p = sampler.probabilities(repeat_less(np.array(logits), [0], 1.3))
        assert p[token] > 0 or np.isclose(p.sum(), 1)


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(ArithmeticError, match="not numbers"):
        Sampler()(np.array([1.0, np.nan]), [])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"seed": -1}, {"max_tokens": -1},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_before_anything_runs(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        generate(Scripted(b"a"), [65], **options)


@pytest.mark.parametrize(("ids", "stop"), [([], ()), ([1], [""])])
def test_empty_prompts_and_stops_are_refused(ids: list[int], stop: Sequence[str]) -> None:
    with pytest.raises(UserError):
        generate(Scripted(b"a"), ids, stop=stop)
