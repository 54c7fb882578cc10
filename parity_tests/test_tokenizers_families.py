"""Every family's kind of tokenizer in every client: the ids of `tokenizers`, on text made to break them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentencepiece")

from backends.base import Tokenizer
from backends.folder import write_tokenizer
from backends.text import Text
from convert.tokenizers import read_tokenizer, token_count
from convert.verify import limits
from convert.verify.report import Status
from convert.verify.tokens import Texts, check_tokenizer, compare
from parity_tests.cases import BASE, random_weights
from parity_tests.tokenizer_shop import BYTE_LEVEL, FAMILIES, UNIGRAM, family
from spec import Spec, UserError, parse

COUNT = 60

LLAMA_CPP: dict[str, tuple[str, ...]] = {
    "neox": ("NFC",), "qwen2": ("NFC",), "cohere": ("NFC",), "phi4": ("<|im_start|>",), "glm4": ("nothing around",),
    "falcon": (">>TITLE<<|endoftext|>",), "olmo2": ("|||IP_ADDRESS|||",),
    "mistral3": ("no space before",), "t5": ("U+0085",), "mt5": ("U+0085",),
}  # fmt: skip
"""What llama.cpp cannot do with texts of a family, by a word of the flag."""
GENAI: dict[str, tuple[str, ...]] = {
    "neox": ("NFC",), "qwen2": ("NFC",), "cohere": ("NFC",), "phi4": ("<|im_start|>",),
}  # fmt: skip
NO_GENAI = frozenset({"falcon", "bloom", "mistral3", *UNIGRAM})
"""Families whose tokenizer onnxruntime-genai does not have."""


def folder(name: str, path: Path, **config: Any) -> tuple[Path, Tokenizer]:
    tokenizer = family(name)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    write_tokenizer(path, tokenizer, 128)
    return path, tokenizer


def sized(tokenizer: Tokenizer) -> Spec:
    return parse(BASE | {"vocab_size": token_count(tokenizer) + 5})


def assert_passes(check: Any, flags: Sequence[str] = ()) -> None:
    assert check.status is Status.PASS, check.reason
    assert len(check.flags) == len(flags)
    assert all(any(word in flag for flag in check.flags) for word in flags), check.flags


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_the_tokenizer_back(name: str, tmp_path: Path) -> None:
    path, tokenizer = folder(name, tmp_path)
    words = Text.read(path)
    assert words is not None
    assert_passes(check_tokenizer(words, tokenizer, COUNT))
    again = read_tokenizer(path)
    assert again is not None
    policy = ("bos", "eos", "unk", "pad", "extra_eos", "add_bos", "add_eos")
    assert [getattr(again, r) for r in policy] == [getattr(tokenizer, r) for r in policy]
    texts = Texts.of(tokenizer, COUNT)
    assert not compare(texts, Texts.of(again, 1).want, frozenset()).wrong


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_and_mlx_lm_have_the_ids(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from convert.verify.stock import check_stock

    path, tokenizer = folder(name, tmp_path)
    assert check_stock(path, tokenizer, COUNT) is None
    utils = pytest.importorskip("mlx_lm.utils")
    stock = utils.load_tokenizer(path)
    texts = Texts.of(tokenizer, COUNT)
    assert not compare(texts, lambda text: list(stock.encode(text)), frozenset()).wrong
    assert stock.eos_token_id == texts.library.token_to_id(tokenizer.eos)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_has_the_ids(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from backends.gguf.runtime import Words
    from parity_tests.gguf_specs import write_file

    tokenizer = family(name)
    spec = sized(tokenizer)
    write_file(spec, random_weights(spec), tmp_path / "m.gguf", tokenizer=tokenizer)
    with Words(tmp_path / "m.gguf") as words:
        assert_passes(check_tokenizer(words, tokenizer, COUNT), LLAMA_CPP.get(name, ()))


@pytest.mark.parametrize("name", FAMILIES)
def test_genai_has_the_ids_or_opens_no_tokenizer(name: str, tmp_path: Path) -> None:
    og: Any = pytest.importorskip("onnxruntime_genai")
    from backends.onnx import genai
    from convert.verify.report import Check
    from convert.verify.stock import check_genai, stub

    tokenizer = family(name)
    write_tokenizer(tmp_path, tokenizer, 128, genai.tokenizer_class(tokenizer))
    genai.write_config(tmp_path, sized(tokenizer), tokenizer, profile="ort", compute="f32")
    if name in NO_GENAI:
        stub(tmp_path)
        with pytest.raises(RuntimeError, match="Unsupported tokenizer class"):
            og.Tokenizer(og.Model(str(tmp_path)))
    found = check_genai(tmp_path, tokenizer, Check("tokenizer", Status.PASS), COUNT)
    assert_passes(found, ("pass it token ids",) if name in NO_GENAI else (*GENAI.get(name, ()), "NUL"))


@pytest.mark.parametrize("name", ["falcon", "llama2", "mistral3"])
def test_what_genai_reads_otherwise_would_not_pass(name: str, tmp_path: Path) -> None:
    """The check finds each where a folder says no more than tokenizer.json."""
    pytest.importorskip("onnxruntime_genai")
    from backends.onnx import genai
    from convert.verify import stock

    tokenizer = family(name)
    write_tokenizer(tmp_path, tokenizer, 128)
    genai.write_config(tmp_path, sized(tokenizer), tokenizer, profile="ort", compute="f32")
    assert stock.genai(tmp_path, Texts.of(tokenizer, COUNT)).wrong


@pytest.mark.parametrize(("name", "type_"), [("llama3", "qwen2"), ("gpt2", "qwen2")])
def test_a_type_whose_tokenizer_transformers_builds_itself_would_not_pass(
    name: str, type_: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from backends.tokens import misread
    from convert.verify.stock import check_stock

    path, tokenizer = folder(name, tmp_path, model_type=type_)
    check = check_stock(path, tokenizer, COUNT)
    assert check is not None and check.status is Status.FAIL and "Qwen2Tokenizer" in check.reason
    assert type_ in misread(tokenizer)


def test_qwen2_own_tokenizer_is_read_as_one(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from backends.tokens import misread
    from convert.verify.stock import check_stock

    path, tokenizer = folder("qwen2", tmp_path, model_type="qwen2")
    assert not misread(tokenizer)
    assert check_stock(path, tokenizer, COUNT) is None


@pytest.mark.parametrize("target", ["hf", "mlx"])
def test_qkv_biases_come_with_any_tokenizer(target: str) -> None:
    """A qwen2 in every way but its tokenizer becomes another architecture of the same function."""
    pytest.importorskip("mlx" if target == "mlx" else "transformers")
    spec = parse(BASE | {"vocab_size": 97, "block": {
        **BASE["block"], "attention": {"heads": 4, "kv_heads": 2, "head_dim": 8, "bias": dict.fromkeys("qkv", True)},
    }, "width": 32})  # fmt: skip
    other, own = family("llama3"), family("qwen2")
    if target == "hf":
        from backends.hf.build import carried

        found = [carried(spec, "", t).carrier.arch for t in (own, other)]
        assert carried(spec, "qwen2", other).carrier.arch == "qwen2", "asked for by name"
    else:
        from backends.mlx.choose import choose
        from backends.tokens import misread

        found = [choose(spec, "f32", "f32", misread(t)).carrier for t in (own, other)]
    assert found[0] == "qwen2" and found[1] not in ("qwen2", "model.py"), found


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_a_qwen2_folder_with_any_tokenizer_is_converted(name: str, tmp_path: Path) -> None:
    """Back to qwen2 with Qwen's own alone; with another it is written as another architecture, and says so."""
    transformers = pytest.importorskip("transformers")
    from convert.pipeline import convert

    tokenizer = family(name)
    config = transformers.Qwen2Config(vocab_size=token_count(tokenizer) + 5, hidden_size=32, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                                      max_position_embeddings=128)  # fmt: skip
    source, out = tmp_path / "in", tmp_path / "out"
    transformers.Qwen2ForCausalLM(config).save_pretrained(source)
    write_tokenizer(source, tokenizer, 128)
    result = convert(source, "hf", "q8", out)  # verified
    told = json.loads((out / "config.json").read_text())["model_type"]
    assert told == result.support.carrier == result.receipt["carrier"]
    assert (told == "qwen2") == (name == "qwen2")
    assert any(f"written as {told}: in a folder of qwen2" in n for n in result.notes) == (name != "qwen2")
    if name != "qwen2":
        with pytest.raises(UserError, match=rf"hf: tokenizer: .*leave --architecture out, and it is written as {told}"):
            convert(source, "hf", "q8", tmp_path / "other", options={"architecture": "qwen2"})


def test_the_documented_table_is_what_is_measured() -> None:
    page = (Path(__file__).parent.parent / "docs" / "tokenizers.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    table = {row[0].split("`")[1]: row[2:] for row in rows if len(row) == 4}
    assert table.keys() == FAMILIES.keys()
    for name, (llama_cpp, genai) in table.items():
        assert (llama_cpp == "=") == (name not in LLAMA_CPP), name
        expected = "ids only" if name in NO_GENAI else "=" if name not in GENAI else genai
        assert genai == expected and (genai == "=") == (name not in GENAI and name not in NO_GENAI), name


class Client:
    """`tokenizers` itself, with a fault."""

    eos_ids = frozenset(range(2000))

    def __init__(self, tokenizer: Tokenizer, limits: frozenset[str] = frozenset()) -> None:
        self.texts, self.limits = Texts.of(tokenizer, 1), limits

    def encode(self, text: str) -> list[int]:
        return self.fault(self.texts.want(self.before(text)), text)

    def before(self, text: str) -> str:
        return text

    def fault(self, ids: list[int], text: str) -> list[int]:
        return ids

    def decode(self, ids: Sequence[int]) -> bytes:
        return self.texts.library.decode(list(ids), skip_special_tokens=True).encode()


class ForgetsEmoji(Client):
    def fault(self, ids: list[int], text: str) -> list[int]:
        return ids[:-1] if "\U0001f600" in text else ids


class DoubleBos(Client):
    def fault(self, ids: list[int], text: str) -> list[int]:
        return ids[:1] + ids


class ForgetsBos(Client):
    def fault(self, ids: list[int], text: str) -> list[int]:
        return ids[1:]


class DropsNextLine(Client):
    def before(self, text: str) -> str:
        return text.replace("\x85", "")


class MoreSpace(Client):
    def before(self, text: str) -> str:
        return f" {text}" if text.startswith(" ") else text


class NoFirstSpace(Client):
    """Right where a space is first alone."""

    def fault(self, ids: list[int], text: str) -> list[int]:
        return ids if text.startswith(" ") else ids[:-1]


class Nul(Client):
    def fault(self, ids: list[int], text: str) -> list[int]:
        return ids[:-1] if "\0" in text else ids


class Unspecial(Client):
    """Special tokens in the text are text to it."""

    def before(self, text: str) -> str:
        return text.replace("<|eot_id|>", "<| eot_id|>")


class Strips(Client):
    def before(self, text: str) -> str:
        return text.replace("<|end_header_id|>\n", "<|end_header_id|>")


CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}"
)


FAULTS = (Client, ForgetsEmoji, DoubleBos, ForgetsBos, DropsNextLine, MoreSpace, NoFirstSpace, Nul, Unspecial, Strips)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_with_a_fault_fails(fault: type[Client]) -> None:
    """Even one that may have every limit there is."""
    tokenizer = replace(family("llama3"), chat_template=CHAT)
    whole = limits.GENAI | {"around", "next line"}
    check = check_tokenizer(fault(tokenizer, whole), tokenizer, COUNT)
    assert (check.status is Status.PASS) == (fault is Client), check.reason


@pytest.mark.parametrize(("name", "lost"), [("falcon", ">>TITLE<<|endoftext|>"), ("phi4", " <|im_start|> ")])
def test_where_tokens_overlap_or_take_spaces_none_may_be_lost(name: str, lost: str) -> None:
    class Loses(Client):
        def before(self, text: str) -> str:
            return text.replace(lost, "")

    tokenizer = family(name)
    assert check_tokenizer(Loses(tokenizer, limits.GENAI), tokenizer, 10).status is Status.FAIL


def test_a_client_that_ends_a_text_at_a_nul_is_told() -> None:
    class Ends(Client):
        def before(self, text: str) -> str:
            return text.split("\0")[0]

    tokenizer = family("llama3")
    check = check_tokenizer(Ends(tokenizer, limits.GENAI), tokenizer, 10)
    assert_passes(check, ("NUL",))
    assert check_tokenizer(Ends(tokenizer), tokenizer, 10).status is Status.FAIL


def test_a_limit_must_be_allowed() -> None:
    class Plain(Client):
        def encode(self, text: str) -> list[int]:
            return self.texts.plain(text)

    tokenizer = family("glm4")
    assert check_tokenizer(Plain(tokenizer), tokenizer, 10).status is Status.FAIL
    allowed = check_tokenizer(Plain(tokenizer, frozenset({"around"})), tokenizer, 10)
    assert allowed.status is Status.PASS and "nothing around" in allowed.flags[0]


def test_a_verification_without_conversations_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2")
    from convert import templates

    def flags(template: str) -> tuple[str, ...]:
        tokenizer = replace(family("llama3"), chat_template=template)
        return check_tokenizer(Client(tokenizer), tokenizer, 5).flags

    assert flags(CHAT) == ()
    assert flags("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT) == ()
    assert "conversations were not compared: the chat template breaks: UndefinedError" in flags("{{ f() }}")[0]
    monkeypatch.setattr(templates, "find_spec", lambda name: None)
    assert flags(CHAT + " ") == ("conversations were not compared: jinja2 is not installed",)


def test_conversations_are_compared_as_they_are(tmp_path: Path) -> None:
    """White space that a token takes is no limit where the chat template writes some there."""
    pytest.importorskip("llama_cpp")
    from backends.gguf.runtime import Words
    from parity_tests.gguf_specs import write_file

    tokenizer = family("phi4")
    spec = sized(tokenizer)
    write_file(spec, random_weights(spec), tmp_path / "m.gguf", tokenizer=tokenizer)
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>%s{{ m.content }}<|im_end|>{% endfor %}"
    with Words(tmp_path / "m.gguf") as words:
        tight = replace(tokenizer, chat_template=turns.replace("%s", ""))
        assert len(limits.conversations(tight)[0]) == 3
        loose = replace(tokenizer, chat_template=turns.replace("%s", "\n"))
        assert check_tokenizer(words, loose, COUNT).status is Status.FAIL


def test_tokens_that_overlap_are_compared_where_they_do(tmp_path: Path) -> None:
    """llama.cpp takes the longest anywhere first, tokenizers the one that begins first."""
    pytest.importorskip("llama_cpp")
    from backends.gguf.runtime import Words
    from parity_tests.gguf_specs import write_file

    tokenizer = family("gpt2")
    first = tokenizer.json["added_tokens"][0]
    for i, text in enumerate(("<ab", "b>long>")):
        tokenizer.json["added_tokens"].append({**first, "id": 700 + i, "content": text, "normalized": False})
    spec = sized(tokenizer)
    write_file(spec, random_weights(spec), tmp_path / "m.gguf", tokenizer=tokenizer)
    with Words(tmp_path / "m.gguf") as words:
        check = check_tokenizer(words, tokenizer, COUNT)
    assert_passes(check, ("'<ab>long>'",))
    strict = check_tokenizer(Client(tokenizer), tokenizer, COUNT)
    assert_passes(strict)


def test_ids_with_holes_and_rows_beyond_them(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from backends.gguf.runtime import Words
    from convert.verify.stock import check_stock
    from parity_tests.gguf_specs import write_file

    tokenizer = family("qwen2")
    vocab = tokenizer.json["model"]["vocab"]
    for token, i in zip(tokenizer.json["added_tokens"], range(720, 900, 7), strict=False):
        token["id"] = vocab[token["content"]] = i
    spec = sized(tokenizer)
    write_file(spec, random_weights(spec), tmp_path / "m.gguf", tokenizer=tokenizer)
    with Words(tmp_path / "m.gguf") as words:
        assert_passes(check_tokenizer(words, tokenizer, COUNT), ("NFC",))
    write_tokenizer(tmp_path, tokenizer, 128)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert check_stock(tmp_path, tokenizer, COUNT) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"single_word": True}, "single_word"),
        ({"content": "a\0b"}, "NUL"),
    ],
)
def test_tokens_that_llama_cpp_cannot_hold_are_refused(change: dict[str, Any], message: str) -> None:
    from backends.gguf.tokenizer import tokenizer_metadata

    tokenizer = family("gpt2")
    tokenizer.json["added_tokens"].append({**tokenizer.json["added_tokens"][0], "id": 900, "content": "new", **change})
    with pytest.raises(UserError, match=message):
        tokenizer_metadata(tokenizer, 1000)


def test_names_of_models_do_not_change_their_tokens() -> None:
    """llama.cpp lets every special token of a model called Phi-3 take the white space after it."""
    from backends.gguf.tokenizer import display_name

    assert display_name("My-Phi-3-clone", family("llama3")) == "My-phi 3-clone"
    assert "phi-3" in display_name("mini", family("phi3"))
    assert display_name("Phi-3-mini", family("phi3")) == "Phi-3-mini"


def test_every_byte_level_family_has_all_bytes() -> None:
    for name in BYTE_LEVEL:
        texts = Texts.of(family(name), 1)
        assert all(texts.library.decode(texts.plain(chr(i))) for i in range(1, 256)), name
