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
