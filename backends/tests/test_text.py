"""Decoding to bytes equals what `tokenizers` decodes, for every kind of decoder; the BOS policy."""

# ruff: noqa: S106 (an unknown token is no password)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from backends.text import Text
from spec.errors import UserError

TEXT = [
    "The quick brown fox",
    "na\u00efve caf\u00e9, 12 + 30 = 42",
    "\u4f60\u597d, \U0001f600!\n\ttabs  and  spaces",
    " a leading space",
]
SPECIAL = ["<s>", "</s>", "<pad>"]


def byte_level() -> Tokenizer:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet))
    t.add_tokens(["  and"])  # an added token is plain text, not the byte alphabet
    return t


def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", *SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"Thequickbrownfx,aleding"]
    vocabulary = {p: i for i, p in enumerate(dict.fromkeys(pieces))}
    vocabulary |= {"\u2581T": len(vocabulary), "he": len(vocabulary) + 1}
    t = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("\u2581", "T"), ("h", "e")], unk_token="<unk>", byte_fallback=True)
    )
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.add_special_tokens(SPECIAL)
    return t


def metaspace() -> Tokenizer:
    t = Tokenizer(models.Unigram())
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    t.train_from_iterator(
        TEXT * 9, trainers.UnigramTrainer(vocab_size=90, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>")
    )
    return t


def word_piece() -> Tokenizer:
    t = Tokenizer(models.WordPiece(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.decoder = decoders.WordPiece()
    t.train_from_iterator(TEXT * 9, trainers.WordPieceTrainer(vocab_size=150, special_tokens=[*SPECIAL, "<unk>"]))
    return t


KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace, "word_piece": word_piece}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXT)
def test_decoding_equals_the_tokenizers_own(kind: str, text: str) -> None:
    fast = KINDS[kind]()
    ids = fast.encode(text).ids
    start, end = (fast.token_to_id(s) for s in SPECIAL[:2])
    assert start is not None and end is not None
    got = Text(fast, {}).decode([start, *ids, end])  # special tokens vanish
    assert got.decode() == fast.decode(ids)
    if kind in ("byte_level", "byte_fallback"):
        assert got.decode() == text


def test_bytes_of_a_split_character_are_kept() -> None:
    fast = byte_level()
    text = Text(fast, {})
    ids = fast.encode("\U0001f600").ids
    if len(ids) == 1:  # learned whole: spell it in bytes
        ids = [fast.token_to_id(c) or 0 for c in "\u00f0\u0141\u013a\u0122"]
    assert len(ids) > 1
    assert b"".join(text.decode([i]) for i in ids) == "\U0001f600".encode()


def test_every_byte_has_a_token() -> None:
    fast = byte_level()
    text = Text(fast, {})
    alphabet = [fast.token_to_id(c) or 0 for c in pre_tokenizers.ByteLevel.alphabet()]
    assert sorted(text.decode([i]) for i in alphabet) == [bytes([b]) for b in range(256)]


@pytest.mark.parametrize(
    ("config", "head", "tail"),
    [
        ({}, [0], []),  # no policy in the configuration: the post-processor's
        ({"add_bos_token": True}, [0], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"add_bos_token": False, "add_eos_token": False}, [], []),
    ],
)
def test_the_bos_policy(config: dict[str, Any], head: list[int], tail: list[int]) -> None:
    fast = byte_level()
    plain = fast.encode("fox").ids
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    text = Text(fast, {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config})
    assert text.encode("fox") == head + plain + tail
    assert text.eos_ids == {1}


def test_further_ends_come_from_the_generation_configuration(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    text = Text.read(tmp_path)
    assert text is not None and text.eos_ids == {1, 2}


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    assert Text.read(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer"):
        Text.read(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        Text.read(tmp_path)
