"""llama.cpp's ids against the tokenizer's own, on fuzzed text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer

from backends.base import Tokenizer
from backends.gguf import pretokenizers
from backends.gguf.runtime import load
from backends.gguf.tokenizer import tokenizer_metadata
from convert.verify.tokens import check_tokenizer
from parity_tests.cases import BASE, random_weights
from parity_tests.gguf_specs import write_file
from spec import Spec, parse
from spec.errors import UserError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
ByteLevel = pre_tokenizers.ByteLevel

CORPUS = [
    Path(pretokenizers.__file__).read_text(encoding="utf-8"),
    "Ünïcödé naïve café 日本語のテキスト Привет мир 12345 😀 DON'T won't I'LL they've  \t\n\n  x = y ** 2\r\n" * 4,
]


def samples(count: int = 300) -> list[str]:
    """Random bytes, random characters of kinds that pre-tokenizers tell apart, and pieces of text."""
    rng = random.Random(0)
    out = ["", " ", "   ", "\n", "a\u200db", "\u00a0x", "\u3000", "<s", "\ufeffx"]
    kinds = " \t\n\r'sStTrRlLvVeEdDmM0123456789abcXYZ.,!?-_()[]{}éßñ日本語😀абВ"
    for _ in range(count):
        roll = rng.random()
        if roll < 0.4:
            out.append(bytes(rng.randrange(256) for _ in range(40)).decode("utf-8", "replace"))
        elif roll < 0.7:
            out.append("".join(rng.choice(kinds) for _ in range(60)))
        else:
            text = rng.choice(CORPUS)
            at = rng.randrange(max(1, len(text) - 120))
            out.append(text[at : at + 120])
    return out


def split(expression: str) -> Any:
    return pre_tokenizers.Split(Regex(expression), "isolated")


def trained(pre: Any, **options: Any) -> HFTokenizer:
    """A byte-level BPE of 600 tokens."""
    t = HFTokenizer(models.BPE(**options))
    t.pre_tokenizer, t.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>", "<|pad|>"], initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    t.train_from_iterator(CORPUS, trainer)
    return t


def sized(rows: int) -> Spec:
    return parse(BASE | {"vocab_size": rows})


def compare(t: HFTokenizer, tokenizer: Tokenizer, path: Path, pad: int = 5) -> Any:
    """All samples encode to the same ids, and decode to the same bytes. Returns the open runtime."""
    spec = sized(t.get_vocab_size() + pad)
    write_file(spec, random_weights(spec), path, tokenizer=tokenizer)
    runtime = load(path)
    for text in samples():
        ids = t.encode(text).ids
        assert runtime.encode(text) == ids, repr(text)
    return runtime


SEQUENCE = {
    "gpt2": (ByteLevel(add_prefix_space=False), {}, "gpt-2"),
    "llama3": ([split(LLAMA3)], {"ignore_merges": True}, "llama-bpe"),
    "llama3_merging": ([split(LLAMA3)], {}, "dbrx"),
    "qwen2": ([split(QWEN2)], {}, "qwen2"),
    "digits": ([pre_tokenizers.Digits(individual_digits=True), split(pretokenizers.GPT2)], {}, "starcoder"),
    "gpt2_spelled_out": ([split(pretokenizers.GPT2 + r"|\s+")], {}, "gpt-2"),
}


@pytest.mark.parametrize("name", SEQUENCE)
def test_a_self_trained_byte_level_bpe_just_works(name: str, tmp_path: Path) -> None:
    pre, options, expected = SEQUENCE[name]
    if isinstance(pre, list):
        pre = pre_tokenizers.Sequence([*pre, ByteLevel(add_prefix_space=False, use_regex=False)])
    t = trained(pre, **options)
    tokenizer = Tokenizer(json.loads(t.to_str()), eos="<|endoftext|>", pad="<|pad|>", chat_template="{{ messages }}")
    with compare(t, tokenizer, tmp_path / "m.gguf") as runtime:
        assert runtime.meta("tokenizer.ggml.pre") == expected
        assert runtime.meta("tokenizer.chat_template") == "{{ messages }}"
        assert runtime.eos_ids == {0}
        for text in samples(60):
            assert runtime.decode(t.encode(text).ids) == text.encode()
        assert runtime.decode([0, 1]) == b""


@pytest.mark.slow
@pytest.mark.parametrize("known", [p for p in pretokenizers.KNOWN if not p.caveat], ids=lambda p: p.name)
def test_every_known_pre_tokenizer_is_what_the_table_says(known: Any, tmp_path: Path) -> None:
    steps = [split(e) for e in known.expressions]
    pre = pre_tokenizers.Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])
    t = trained(pre, ignore_merges=known.ignore_merges)
    compare(t, Tokenizer(json.loads(t.to_str()), eos="<|endoftext|>"), tmp_path / "m.gguf").close()


def spm(prefix: bool) -> dict[str, Any]:
    """A character-level BPE with byte fallback, as tokenizer.json."""
    t = HFTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    replace = normalizers.Replace(" ", "\u2581")
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    t.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
    names = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *names], show_progress=False, limit_alphabet=100
    )
    t.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    data = json.loads(t.to_str())
    data["added_tokens"] = [a for a in data["added_tokens"] if not a["content"].startswith("<0x")]
    return data


def completed(data: dict[str, Any]) -> dict[str, Any]:
    """With every way to split a token as a rule, as in converted SentencePiece models."""
    vocab, seen, rules = data["model"]["vocab"], set(), []
    for left, right in data["model"]["merges"]:
        token = left + right
        if token not in seen:
            seen.add(token)
            rules += [[token[:i], token[i:]] for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    data["model"]["merges"] = rules
    return data


@pytest.mark.parametrize(
    ("prefix", "complete", "model"),
    [(False, False, "gpt2"), (False, True, "llama"), (True, True, "llama")],
    ids=["rules", "scores", "scores-prefix"],
)
def test_sentencepiece_style_bpe(prefix: bool, complete: bool, model: str, tmp_path: Path) -> None:
    data = completed(spm(prefix)) if complete else spm(prefix)
    data["post_processor"] = json.loads(processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    ).__getstate__())  # fmt: skip
    t = HFTokenizer.from_str(json.dumps(data))
    tokenizer = Tokenizer(data, bos="<s>", eos="</s>", unk="<unk>", add_bos=True)
    with compare(t, tokenizer, tmp_path / "m.gguf") as runtime:
        assert runtime.meta("tokenizer.ggml.model") == model
        assert runtime.encode("x")[0] == 1
        text = "café 日本語 😀\n  x"
        assert runtime.decode(t.encode(text).ids).decode().removeprefix(" " if prefix else "") == text
        check = check_tokenizer(runtime, tokenizer, 100)
        assert check.status == "PASS", check.reason
        assert check.details["round_trips"] > 200


def test_text_in_another_normal_form_is_flagged(tmp_path: Path) -> None:
    """As in Qwen's tokenizers: llama.cpp does not normalize, so only text that is in the form gets the same ids."""
    t = trained(pre_tokenizers.Sequence([split(QWEN2), ByteLevel(add_prefix_space=False, use_regex=False)]))
    t.normalizer = normalizers.NFC()
    data = json.loads(t.to_str())
    spec = sized(t.get_vocab_size())
    write_file(spec, random_weights(spec), tmp_path / "m.gguf", tokenizer=Tokenizer(data))
    with load(tmp_path / "m.gguf") as runtime:
        check = check_tokenizer(runtime, Tokenizer(data), 100)
    assert check.status == "PASS", check.reason
    assert any("NFC" in flag for flag in check.flags)


def test_rules_with_a_prefix_are_refused() -> None:
    with pytest.raises(UserError, match="train without prepending"):
        tokenizer_metadata(Tokenizer(spm(True), bos="<s>", eos="</s>"), 1000)


def plain() -> dict[str, Any]:
    return json.loads(trained(ByteLevel(add_prefix_space=False)).to_str())


def test_an_unknown_expression_is_shown_with_the_closest() -> None:
    data = plain()
    pattern = {"Regex": QWEN2 + "|x"}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip
    with pytest.raises(UserError, match=r"is none of llama.cpp's pre-tokenizers \(closest: qwen2"):
        tokenizer_metadata(Tokenizer(data, eos="<|endoftext|>"), 700)


REFUSED = {
    "WordPiece": ({"model": {"type": "WordPiece", "vocab": {}}}, "model.type: WordPiece"),
    "lowercase": ({"normalizer": {"type": "Lowercase"}}, "normalizer: Lowercase"),
    "prefix": ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
    "whitespace": ({"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_do_is_refused(name: str) -> None:
    patch, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        tokenizer_metadata(Tokenizer(plain() | patch, eos="<|endoftext|>"), 700)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="vocab_size: 100, but the tokenizer has id 599"):
        tokenizer_metadata(Tokenizer(plain(), eos="<|endoftext|>"), 100)


def test_types_and_special_ids() -> None:
    data = plain()
    data["added_tokens"].append({"id": 600, "content": "<tool>", "special": False})
    tokenizer = Tokenizer(data, bos="<|pad|>", eos="<|endoftext|>", extra_eos=("<tool>",), add_bos=True)
    keys = tokenizer_metadata(tokenizer, 603)
    types = keys["tokenizer.ggml.token_type"]
    assert (types[0], types[5], types[600], types[601]) == (3, 1, 4, 5)
    assert keys["tokenizer.ggml.tokens"][601:] == ["[PAD601]", "[PAD602]"]
    assert keys["tokenizer.ggml.bos_token_id"] == 1
    assert keys["tokenizer.ggml.eos_token_id"] == 0
    assert keys["tokenizer.ggml.eot_token_id"] == 600
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False


def test_without_a_tokenizer_ids_still_run(tmp_path: Path) -> None:
    spec = sized(97)
    write_file(spec, random_weights(spec), tmp_path / "m.gguf")
    with load(tmp_path / "m.gguf") as runtime:
        assert runtime.vocab_size == 97
        assert runtime.eos_ids == frozenset()
        with pytest.raises(UserError, match="has no tokenizer"):
            runtime.encode("x")
