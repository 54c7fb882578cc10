"""Tokenizer files: special tokens, BOS policy, ends of generation, templates, and vocabulary against embedding rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert.sources import open_source
from convert.tests.conftest import LLAMA, weights, write_checkpoint, write_huggingface
from convert.tokenizers import read_tokenizer, token_count
from convert.vocabularies.common import added
from spec import Spec, UserError

SPECIAL = ["<s>", "</s>", "<unk>", "<|eot|>"]


def tokenizer_json(tokens: int = 96, **fields: Any) -> dict[str, Any]:
    special = SPECIAL
    vocab = {f"t{i}": i for i in range(tokens - len(special))}
    first = tokens - len(special)
    vocab |= {t: first + i for i, t in enumerate(special)}
    tokens_added = [added(t, first + i) for i, t in enumerate(special)]
    return {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": tokens_added,
            "post_processor": None, **fields}  # fmt: skip


def template(*single: str) -> dict[str, Any]:
    pieces = [{"Sequence": {"id": "A", "type_id": 0}} if p == "A" else {"SpecialToken": {"id": p, "type_id": 0}}
              for p in single]  # fmt: skip
    tokens = {t: {"id": t, "ids": [92 + SPECIAL.index(t)], "tokens": [t]} for t in single if t != "A"}
    pair = [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": tokens}


def write(folder: Path, data: dict[str, Any] | None = None, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data or tokenizer_json()))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_special_tokens_come_from_either_file(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
          special_tokens_map={"unk_token": "<unk>", "eos_token": "<unk>"})  # fmt: skip
    t = read_tokenizer(tmp_path)
    assert t is not None and (t.bos, t.eos, t.unk, t.pad) == ("<s>", "</s>", "<unk>", None)
    assert token_count(t) == 96


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("processor", "config", "expected"),
    [
        (None, {}, (False, False)),
        (None, {"add_bos_token": True}, (True, False)),
        (template("<s>", "A"), {}, (True, False)),
        (template("<s>", "A", "</s>"), {}, (True, True)),
        ({"type": "Sequence", "processors": [BYTES, template("<s>", "A")]}, {}, (True, False)),
        (
            {
                "type": "RobertaProcessing",
                "cls": ["<s>", 92],
                "sep": ["</s>", 93],
                "trim_offsets": True,
                "add_prefix_space": False,
            },
            {},
            (True, True),
        ),
        (BYTES, {"add_bos_token": False}, (False, False)),
    ],
)
def test_bos_and_eos_are_added_where_the_tokenizer_does(
    tmp_path: Path, processor: Any, config: dict[str, Any], expected: tuple[bool, bool]
) -> None:
    write(tmp_path, tokenizer_json(post_processor=processor),
          tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", **config})  # fmt: skip
    t = read_tokenizer(tmp_path)
    assert t is not None and (t.add_bos, t.add_eos) == expected


def test_every_end_of_generation_is_kept(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": [93, 95]})
    t = read_tokenizer(tmp_path, {"eos_token_id": 94})
    assert t is not None and (t.eos, t.extra_eos) == ("</s>", ("<|eot|>",))
    write(tmp_path, tokenizer_config={}, generation_config={})
    t = read_tokenizer(tmp_path, {"eos_token_id": 95})
    assert t is not None and (t.eos, t.extra_eos) == ("<|eot|>", ())


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"chat_template": [{"name": "tool", "template": "T"},
                                                        {"name": "default", "template": "D"}]})  # fmt: skip
    t = read_tokenizer(tmp_path)
    assert t is not None and t.chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    t = read_tokenizer(tmp_path)
    assert t is not None and t.chat_template == "{{ messages }}"


def test_a_special_token_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"bos_token": "<bos>"})
    with pytest.raises(UserError, match="the bos token '<bos>' is not in the vocabulary"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}',
                                  '{"model": {"vocab": {}}, "added_tokens": [{}]}'])  # fmt: skip
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer.json: no") as e:
        read_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def changed(**change: Any) -> dict[str, Any]:
    data = tokenizer_json()
    data["model"] |= change
    return data


def with_added(**fields: Any) -> dict[str, Any]:
    data = tokenizer_json()
    data["added_tokens"][0] |= fields
    return data


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "WordPiece": (changed(type="WordPiece"), "model.type: WordPiece is no tokenizer of a decoder here"),
    "WordLevel": (changed(type="WordLevel"), "model.type: WordLevel is no tokenizer"),
    "negative": (changed(vocab={"a": -1}), "id -1 is no number from 0 to"),
    "large": (changed(vocab={"a": 10**12}), "id 1000000000000 is no number"),
    "fraction": (changed(vocab={"a": 1.5}), "id 1.5 is no number"),
    "boolean": (changed(vocab={"a": True}), "id True is no number"),
    "added id": (with_added(id=-3), "id -3 is no number"),
    "merges": (changed(merges=[["t1", "zz"]]), "`tokenizers` can open: .*zz"),
    "merge of three": (changed(merges=["t1 t2 t3"]), "`tokenizers` can open"),
    "step": (tokenizer_json(pre_tokenizer={"type": "Magic"}), "`tokenizers` can open"),
    "flag": (with_added(lstrip="yes"), "`tokenizers` can open"),
    "another id": (with_added(id=50), "added token '<s>' has id 50, and `tokenizers`, .* makes it 92"),
    "half a pair": (with_added(content="\ud83d"), "has half a surrogate pair"),
    "expression": (
        tokenizer_json(pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False,
        }), "`tokenizers` can open",
    ),
    "template": (tokenizer_json(post_processor=template("<s>")), "holds the text 0 times"),
    "template's ids": (
        tokenizer_json(post_processor=template("<s>", "A")) | {"added_tokens": []}, "'<s>' has ids .92., in the vocab",
    ),
}  # fmt: skip
BAD["template's ids"][0]["model"]["vocab"] |= {"<s>": 3, "t3": 92}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tmp_path: Path) -> None:
    data, message = BAD[name]
    write(tmp_path, data)
    with pytest.raises(UserError, match=message) as e:
        read_tokenizer(tmp_path)
    assert ("\n" not in str(e.value) and str(tmp_path) in str(e.value)) or "post_processor" in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "not valid JSON"),
        ('{"model": ' + '{"a": ' * 50_000, "not valid JSON"),
        ('{"model": {"vocab": {"a": 0, "a": 1}}}', "key 'a' appears twice"),
        ('{"model": {"vocab": {"a": NaN}}}', "NaN is no JSON number"),
        ('{"model": {"vocab": {"a": ' + "9" * 400 + "}}}", "is no number that a float holds"),
    ],
    ids=["deep list", "deep object", "twice", "nan", "giant"],
)
def test_hostile_json_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=message) as e:
        read_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_a_gigabyte_is_not_read(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    if name != "tokenizer_config.json":
        (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / name).open("wb") as f:
        f.truncate(10**9)
    with pytest.raises(UserError, match="1,000,000,000 bytes are more than such a file ever has"):
        read_tokenizer(tmp_path)


def test_a_word_piece_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\nthe\n")
    with pytest.raises(UserError, match=r"vocab.txt: a WordPiece vocabulary"):
        read_tokenizer(tmp_path)


def test_special_tokens_by_role_are_found_in_text(tmp_path: Path) -> None:
    """As transformers has them, though tokenizer.json does not list them."""
    data = tokenizer_json()
    data["added_tokens"] = []
    write(tmp_path, data, tokenizer_config={"eos_token": "</s>"})
    t = read_tokenizer(tmp_path)
    assert t is not None
    assert [(a["content"], a["id"], a["special"]) for a in t.json["added_tokens"]] == [("</s>", 93, True)]


def test_the_template_names_bos_and_eos_where_nothing_else_does(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_json(post_processor=template("<s>", "A", "</s>")))
    t = read_tokenizer(tmp_path)
    assert t is not None and (t.bos, t.eos, t.add_bos, t.add_eos) == ("<s>", "</s>", True, True)


def test_a_template_counts_more_than_a_flag_that_denies_it(tmp_path: Path) -> None:
    """transformers 5 and llama.cpp's converter drop the flag, too."""
    write(tmp_path, tokenizer_json(post_processor=template("<s>", "A")),
          tokenizer_config={"bos_token": "<s>", "add_bos_token": False})  # fmt: skip
    t = read_tokenizer(tmp_path)
    assert t is not None and t.add_bos


def test_a_batchs_truncation_and_padding_are_left_out(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "t0"}  # fmt: skip
    t = read_tokenizer(write(tmp_path, tokenizer_json(truncation=cut, padding=fill)))
    assert t is not None and t.json["truncation"] is None and t.json["padding"] is None


def test_random_merges_are_refused(tmp_path: Path) -> None:
    data = tokenizer_json()
    data["model"]["dropout"] = 0.1
    with pytest.raises(UserError, match=r"model.dropout: 0.1 splits a text differently every time"):
        read_tokenizer(write(tmp_path, data))


def test_tokens_that_take_forever_are_refused(tmp_path: Path) -> None:
    import base64

    lines = [base64.b64encode(t) + b" %d" % i for i, t in enumerate([*(bytes([b]) for b in range(256)), b"a" * 10**6])]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pattern": "."}))
    with pytest.raises(UserError, match="a token of 1,000,000 bytes"):
        read_tokenizer(tmp_path)


def test_more_rows_than_tokens_are_padding_and_said(tmp_path: Path, small: Spec) -> None:
    folder = write_checkpoint(tmp_path / "c", small, weights(small))
    write(folder, tokenizer_json(90))
    with open_source(folder) as source:
        assert source.notes == ["6 embedding rows have no token (padding)"]


def test_more_tokens_than_rows_are_an_error(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "hf", LLAMA)
    write(folder, tokenizer_json(97))
    with pytest.raises(UserError, match="the tokenizer has 97 tokens and the embedding 96 rows"):
        open_source(folder)
