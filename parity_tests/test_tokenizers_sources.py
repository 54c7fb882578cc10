"""Vocabulary files of other libraries, read as tokenizer.json: the ids of the libraries that they are for."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex

from backends.base import Tokenizer
from backends.text import ALPHABET
from backends.tokens import CL100K, QWEN2
from convert.tokenizers import read_tokenizer
from convert.verify.tokens import Texts, fuzz
from convert.vocabularies import sentencepiece as pieces
from parity_tests.tokenizer_shop import SPACE, family, trained_model
from spec import UserError

spm: Any = pytest.importorskip("sentencepiece")

IDENTITY = [
    (kind, fallback, dummy, extra)
    for kind in ("bpe", "unigram")
    for fallback in (True, False)
    for dummy in (True, False)
    for extra in ((False, True) if kind == "bpe" else (False,))  # a unigram's ties in runs are broken otherwise
]
QUICK = [
    ("bpe", True, True, False),
    ("bpe", True, False, False),
    ("unigram", True, True, False),
    ("unigram", True, False, False),
]


def same_ids(tokenizer: Tokenizer, want: Any, texts: list[str]) -> None:
    library = Texts.of(tokenizer, 1)
    for text in texts:
        assert library.plain(text) == list(want(text)), repr(text)


def model(kind: str, fallback: bool, dummy: bool, extra: bool, **options: Any) -> bytes:
    own = "" if dummy or extra else "<x>"
    return trained_model("identity", kind, byte_fallback=fallback, add_dummy_prefix=dummy,
                         remove_extra_whitespaces=extra, user_defined_symbols=own, vocab_size=700,
                         hard_vocab_limit=False, **options)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fallback", "dummy", "extra"),
    [pytest.param(*p, marks=[] if p in QUICK else pytest.mark.slow) for p in IDENTITY],
)
def test_a_sentencepiece_model_alone(kind: str, fallback: bool, dummy: bool, extra: bool, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data := model(kind, fallback, dummy, extra))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.sentencepiece == data
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == ("<unk>", "<s>", "</s>", False)
    theirs = spm.SentencePieceProcessor(model_proto=data)
    same_ids(tokenizer, theirs.encode, [t for t in fuzz(count=150, seed=7) if "<unk>" not in t])
    texts = Texts.of(tokenizer, 1)
    for text in ("a  b", "<0x41>", *(() if dummy or extra else (" x<x>y ", " <x> y"))):
        assert texts.plain(text) == theirs.encode(text)
    assert texts.library.decode(texts.plain("return the text")) == theirs.decode(theirs.encode("return the text"))


def test_own_symbols_next_to_a_prefix_are_refused(tmp_path: Path) -> None:
    """sentencepiece puts the space before the text alone, tokenizers after each symbol too."""
    (tmp_path / "tokenizer.model").write_bytes(trained_model("identity", "bpe", user_defined_symbols="<x>"))
    with pytest.raises(UserError, match=r"no equal form of this model: .*<x>"):
        read_tokenizer(tmp_path)


def test_classes_that_add_bos_and_settings_that_say_otherwise(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model("bpe", True, True, False))
    for config, adds in (
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"add_bos_token": True}, True),
        ({}, False),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = read_tokenizer(tmp_path)
        assert tokenizer is not None and tokenizer.add_bos == adds, config


def test_added_tokens_beside_a_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data := model("bpe", True, True, False))
    count = spm.SentencePieceProcessor(model_proto=data).get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": count, "<tool>": count + 1}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.eos == "<|im_end|>"
    special = {t["content"]: t["special"] for t in tokenizer.json["added_tokens"]}
    assert special["<|im_end|>"] and not special["<tool>"]
    assert Texts.of(tokenizer, 1).plain("<|im_end|><tool>") == [count, count + 1]
    (tmp_path / "added_tokens.json").write_text(json.dumps({"e": 5}))
    with pytest.raises(UserError, match="added token 'e' has id 5, and another one"):
        read_tokenizer(tmp_path)


def test_a_table_of_characters_that_tokenizers_reads_otherwise_is_refused(tmp_path: Path) -> None:
    """It looks whole clusters up, so that CR LF is one space there and two in sentencepiece."""
    (tmp_path / "tokenizer.model").write_bytes(trained_model("nmt_nfkc"))
    with pytest.raises(UserError, match="no equal form of this model"):
        read_tokenizer(tmp_path)


def field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


A_PIECE = field(1, field(1, b"a") + b"\x15" + struct.pack("<f", -1.0))
BROKEN: Mapping[str, tuple[bytes, str]] = {
    "text": (b"not a model at all", "neither a SentencePiece model nor"),
    "cut": (A_PIECE[:-2], "does not fit"),
    "endless": (b"\xff" * 12, "overflows"),
    "empty": (b"", "no pieces"),
    "huge": (b"\x0a\xff\xff\xff\xff\x0f", "does not fit"),
    "words": (A_PIECE + field(2, b"\x18\x03"), "a SentencePiece model of words"),
    "twice": (A_PIECE + A_PIECE, "'a' appears twice"),
    "suffix": (A_PIECE + field(2, b"\xc0\x01\x01"), "treat_whitespace_as_suffix"),
    "plain": (A_PIECE + field(3, b"\x28\x00"), "escape_whitespaces"),
    "bytes": (A_PIECE + field(2, b"\x98\x02\x01"), "without all 256 bytes"),
    "no_text": (field(1, field(1, b"\xff")), "neither"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_sentencepiece_model_is_one_line(name: str, tmp_path: Path) -> None:
    data, message = BROKEN[name]
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UserError, match=message) as e:
        read_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_the_reader_of_fields_agrees_with_protobuf() -> None:
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    data = model("unigram", True, True, True)
    theirs = model_pb2.ModelProto.FromString(data)
    ours = pieces.parse(data)
    assert ours.pieces == [(p.piece, p.score, p.type) for p in theirs.pieces]
    assert (ours.kind, ours.byte_fallback) == (theirs.trainer_spec.model_type, theirs.trainer_spec.byte_fallback)
    assert ours.charsmap == theirs.normalizer_spec.precompiled_charsmap
    assert ours.roles == {"unk": theirs.trainer_spec.unk_id, "bos": 1, "eos": 2}


def gpt2_files(folder: Path, name: str, config: dict[str, Any] | None = None) -> Tokenizer:
    tokenizer = family(name)
    found = tokenizer.json["model"]
    (folder / "vocab.json").write_text(json.dumps(found["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in found["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", None),
        ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}),
        ("qwen2", {"tokenizer_class": "Qwen2Tokenizer"}),
    ],
)
def test_a_vocabulary_and_merge_rules(name: str, config: dict[str, Any] | None, tmp_path: Path) -> None:
    tokenizer = gpt2_files(tmp_path, name, config)
    if name == "qwen2":  # its added tokens are no part of the vocabulary
        told = {t["id"]: t for t in tokenizer.json["added_tokens"]}
        config = {**(config or {}), "added_tokens_decoder": told}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_tokenizer(tmp_path)
    assert found is not None
    added = [t["content"] for t in found.json["added_tokens"]]
    same_ids(found, Texts.of(tokenizer, 1).plain, fuzz(added, 100))


def test_files_that_do_not_say_how_text_is_split_are_refused(tmp_path: Path) -> None:
    gpt2_files(tmp_path, "gpt2", {"tokenizer_class": "OddTokenizer"})
    with pytest.raises(UserError, match="how a OddTokenizer splits text stands nowhere"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(UserError, match=r"merges.txt: line 2: 'a b c' is no pair"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("\u0120a zq\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"`tokenizers` can open: .*zq"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UserError, match="no vocabulary of bytes"):
        read_tokenizer(tmp_path)


def ranks() -> dict[bytes, int]:
    """As tiktoken's files have them: bytes first, then what merging them makes."""
    found = family("llama3").json["model"]
    made = ["".join(m) for m in found["merges"]]
    order = [*ALPHABET, *dict.fromkeys(made)]
    return {bytes(ALPHABET[c] for c in t): i for i, t in enumerate(order)}


def by_rank(text: str, pattern: str, known: Mapping[bytes, int]) -> list[int]:
    """tiktoken's algorithm: pieces by an expression; in each, the pair whose result ranks lowest merges first."""
    from tokenizers import pre_tokenizers

    out = []
    for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text):
        parts = [bytes([b]) for b in piece.encode()]
        while len(parts) > 1:
            at = min(range(len(parts) - 1), key=lambda i: known.get(parts[i] + parts[i + 1], 1 << 60))
            if parts[at] + parts[at + 1] not in known:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        out += [known[piece.encode()]] if piece.encode() in known else [known[p] for p in parts]
    return out


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.tiktoken"])
def test_tiktoken_files(name: str, tmp_path: Path) -> None:
    known = ranks()
    lines = (base64.b64encode(t) + b" %d" % r for t, r in known.items())
    (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match="do not hold the expression"):
        read_tokenizer(tmp_path)
    end = {str(len(known)): {"content": "<|end_of_text|>", "special": True}}
    config = {"pattern": CL100K, "added_tokens_decoder": end, "eos_token": "<|end_of_text|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.eos == "<|end_of_text|>"
    same_ids(tokenizer, lambda text: by_rank(text, CL100K, known), fuzz(count=150))


def test_a_class_whose_expression_is_known(tmp_path: Path) -> None:
    lines = (base64.b64encode(t) + b" %d" % r for t, r in ranks().items())
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.json["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN2}


def test_tekken_files(tmp_path: Path) -> None:
    known = ranks()
    vocab = [{"rank": r, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for t, r in known.items()]
    config = {"pattern": CL100K, "default_vocab_size": 20 + len(known), "default_num_special_tokens": 20}
    special = [{"rank": i, "token_str": t} for i, t in enumerate(("<unk>", "<s>", "</s>", "[INST]"))]
    data = {"config": config, "vocab": vocab, "special_tokens": special}
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None and (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == ("<s>", "</s>", True)
    same_ids(tokenizer, lambda text: [i + 20 for i in by_rank(text, CL100K, known)], fuzz(count=100))
    assert Texts.of(tokenizer, 1).want("[INST]x")[:2] == [1, 3]
    data["config"] = {}
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="no tekken vocabulary"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"YQ== x", "line 257"), (b"YQ== 3", "has a rank already"), (b"!! 300", "line 257"), (b"YWI= 5", "one rank")],
)
def test_damaged_ranks_are_one_line(line: bytes, message: str, tmp_path: Path) -> None:
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join([*lines, line]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pattern": CL100K}))
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)


def test_the_mark_of_a_space_is_one_character() -> None:
    assert pieces.SPACE == SPACE == "\u2581"
