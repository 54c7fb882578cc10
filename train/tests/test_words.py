"""Word by word encoding is the tokenizer's own, for every text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from train.data.tokenizer import PATTERN
from train.data.words import Words, words_of

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")

SOURCES = [p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("test_*.py"))]


def split(pattern: str) -> Any:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CUTS = {
    "trained": split(PATTERN),
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": split(LLAMA3),
    "qwen2": split(QWEN2),
}


def made(cut: Any, normalizer: Any = None) -> Tokenizer:
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = cut
    fast.decoder = decoders.ByteLevel()
    if normalizer is not None:
        fast.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    fast.train_from_iterator([*SOURCES, "größe λόγος 東京 привет 😀 " * 99], trainer)
    fast.add_tokens([AddedToken("<think>", special=False)])
    fast.encode_special_tokens = True
    return fast


@pytest.fixture(scope="module")
def encoders() -> dict[str, tuple[Tokenizer, Words]]:
    out: dict[str, tuple[Tokenizer, Words]] = {}
    for name, cut in CUTS.items():
        fast = made(cut, normalizers.NFC() if name == "qwen2" else None)
        words = words_of(fast)
        assert words is not None
        out[name] = fast, words
    return out


@pytest.fixture(scope="module")
def same(encoders: dict[str, tuple[Tokenizer, Words]]) -> Callable[[str, str], None]:
    def check(name: str, text: str) -> None:
        fast, words = encoders[name]
        assert words.encode(text).tolist() == fast.encode(text, add_special_tokens=False).ids

    return check


ANY = st.text(st.characters(codec="utf-8"), max_size=60)
TRICKY = st.text(
    st.sampled_from("aZzsS'tT09½² \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2028\u3000\u200b.,_<ſKéeλ\u0301東😀\x00")
)


@pytest.mark.parametrize("name", CUTS)
@given(text=st.one_of(ANY, TRICKY))
@settings(max_examples=150, deadline=None)
@example(text="it's IT'S it'ſ 12345 a<think>b <|end|> é e\u0301 \n\n  x")
@example(text="".join(map(chr, range(0x20, 0x2FF))))
def test_every_text_has_the_tokenizers_ids(name: str, same: Callable[[str, str], None], text: str) -> None:
    same(name, text)


@pytest.mark.parametrize("name", CUTS)
def test_whole_files_have_the_tokenizers_ids(name: str, same: Callable[[str, str], None]) -> None:
    for text in SOURCES:
        same(name, text)
        same(name, text.replace("e", "é").replace("    ", "\u3000"))


def test_most_words_are_encoded_once(encoders: dict[str, tuple[Tokenizer, Words]]) -> None:
    _, words = encoders["trained"]
    for text in SOURCES:
        words.encode(text)
    before = len(words.known)
    assert before > 100
    for text in SOURCES:
        words.encode(text)
    assert len(words.known) == before


@pytest.mark.parametrize(
    "cut",
    [
        pre_tokenizers.Metaspace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        split(r"\p{Lu}?\p{Ll}+|."),
        split(r"\p{L}++|\s+|."),
        split(r"\w+|\s+|[^\w\s]+"),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)]),
    ],
)
def test_tokenizers_that_cut_otherwise_are_left_alone(cut: Any) -> None:
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = cut
    assert words_of(fast) is None


def test_models_and_normalizers_that_do_more_are_left_alone() -> None:
    fast = made(CUTS["gpt2"], normalizers.Lowercase())
    assert words_of(fast) is None
    unigram = Tokenizer(models.Unigram([("a", 0.0)], 0, False))
    unigram.pre_tokenizer = CUTS["gpt2"]
    assert words_of(unigram) is None
