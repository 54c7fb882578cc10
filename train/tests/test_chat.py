"""Chats: what is written, and exactly which tokens the assistant wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from spec.errors import UserError
from train import config, session
from train.data import prepare, tokenizer
from train.data.chat import CHATML_TEMPLATE, Chats
from train.data.tokenizer import TextTokenizer

SPECIALS = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "</s>")

CHATML = CHATML_TEMPLATE
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('only user and assistant') }}"
    "{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
    "{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>\n"
    "{{ parts[0].replace('<think>', '').strip() if parts|length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].strip() }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Earlier answers lose their thoughts, and the last one always has some."""

CHAT = [
    {"role": "user", "content": "alpha größe?"},
    {"role": "assistant", "content": "beta λ λ"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "gamma assistant"},
]


@pytest.fixture(scope="module")
def tok() -> TextTokenizer:
    text = " ".join(["alpha beta gamma assistant user größe λ think"] * 200)
    return tokenizer.train([text], 500, 32, SPECIALS)


@pytest.fixture(scope="module")
def learnt(tok: TextTokenizer) -> Callable[..., list[str]]:
    """What is learnt from a chat: the runs of targets, as text."""

    def go(template: str, messages: Sequence[dict[str, str]]) -> list[str]:
        _, ids, mask = Chats(template, tok, True).encode(messages)
        assert mask is not None
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
        return [
            tok.fast.decode(ids[a:b], skip_special_tokens=False) for a, b in zip(edges[::2], edges[1::2], strict=True)
        ]

    return go


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_answers_and_their_ends_are_learnt(template: str, learnt: Callable[..., list[str]]) -> None:
    assert learnt(template, CHAT) == ["beta λ λ<|im_end|>", "gamma assistant<|im_end|>"]


def test_answers_of_a_template_that_forbids_other_roles(learnt: Callable[..., list[str]]) -> None:
    assert learnt(INSTRUCT, CHAT) == [" beta λ λ</s>", " gamma assistant</s>"]
    with pytest.raises(ValueError, match="refuses it: only user and assistant"):
        learnt(INSTRUCT, [{"role": "system", "content": "x"}, *CHAT])


def test_answers_of_a_template_that_rewrites_the_past(learnt: Callable[..., list[str]]) -> None:
    thought = "<think>alpha</think>gamma"
    chat = [CHAT[0], {"role": "assistant", "content": thought}, CHAT[2], {"role": "assistant", "content": thought}]
    assert learnt(THINKING, chat) == ["gamma<|im_end|>", "<think>\nalpha\n</think>\n\ngamma<|im_end|>"]
    assert learnt(THINKING, CHAT) == ["beta λ λ<|im_end|>", "<think>\n\n</think>\n\ngamma assistant<|im_end|>"]


def test_marks_in_a_message_are_refused(learnt: Callable[..., list[str]]) -> None:
    assert learnt(MARKED, [CHAT[0] | {"content": r"\u0000"}, CHAT[1]]) == ["beta λ λ<|im_end|>"]
    with pytest.raises(ValueError, match="contains a zero character"):
        learnt(MARKED, [CHAT[0] | {"content": "\0generation>"}, CHAT[1]])


def test_equal_texts_of_user_and_assistant_are_told_apart(learnt: Callable[..., list[str]]) -> None:
    chat = [{"role": r, "content": "beta"} for r in ("user", "assistant", "user", "assistant")]
    for template in (CHATML, MARKED, THINKING):
        runs = learnt(template, chat)
        assert len(runs) == 2
        assert all(r.endswith("beta<|im_end|>") for r in runs)


@pytest.mark.parametrize(
    ("template", "chat", "why"),
    [
        (CHATML, CHAT[:1], "nothing in it is written by an assistant"),
        (CHATML.replace("m.content", "m.content|upper"), CHAT, None),
        ("{{ messages|length }} messages", CHAT, "does not tell where message 1"),
        ("{{ messages[7].content }}", CHAT, "the chat template refuses it"),
        ("{{ ''.__class__.__mro__ }}", CHAT, "the chat template refuses it"),
    ],
)
def test_chats_that_cannot_be_told_are_refused(
    template: str, chat: list[dict[str, str]], why: str | None, learnt: Callable[..., list[str]]
) -> None:
    if why is None:  # whatever a template does to the answers: prefixes tell where they are
        assert learnt(template, chat) == ["BETA Λ Λ<|im_end|>", "GAMMA ASSISTANT<|im_end|>"]
        return
    with pytest.raises(ValueError, match=why):
        learnt(template, chat)


def test_a_token_across_the_edge_of_an_answer_is_refused() -> None:
    tok = tokenizer.train(["user:\n\n\nbeta " * 300], 400, 32)
    template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:\n{% endif %}"
    chats = Chats(template, tok, True)
    fine = [{"role": "user", "content": "beta"}, {"role": "assistant", "content": "beta"}]
    assert chats.encode(fine)[2] is not None
    with pytest.raises(ValueError, match="lies across the edge of an answer"):
        chats.encode([{"role": "user", "content": "beta"}, {"role": "assistant", "content": "\n\nbeta"}])


def test_ids_and_masks_are_those_of_transformers(tok: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, content in TextTokenizer(tok.json, {**tok.config, "chat_template": MARKED}).files().items():
        (tmp_path / name).write_bytes(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    _, ids, mask = Chats(MARKED, tok, True).encode(CHAT)
    assert mask is not None
    assert ids == list(expected["input_ids"])
    assert mask.tolist() == [bool(m) for m in expected["assistant_masks"]]
    for template in (CHATML, INSTRUCT, THINKING):
        plain = theirs.apply_chat_template(CHAT, chat_template=template, return_dict=True)
        assert Chats(template, tok, True).encode(CHAT)[1] == list(plain["input_ids"])
    assert tokenizer.load(tmp_path).template == MARKED


def chats_file(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def prepared(data: dict[str, Any], cache: Path) -> tuple[TextTokenizer, Any]:
    cache.mkdir(exist_ok=True)
    c = config.layered({"data": {"validation": 0.0, **data}})
    text = prepare.read(c.data, cache)
    tok = prepare.tokenizer_of(text, None, 400, 32, cache)
    return tok, prepare.tokenize(text, tok, cache)


def test_a_file_of_chats_becomes_tokens_with_a_mask(tmp_path: Path) -> None:
    rows = [{"messages": CHAT[: 2 + 2 * (n % 2)], "id": n} for n in range(30)]
    file = chats_file(tmp_path / "chats.jsonl", rows)
    data = {"source": str(file), "messages": "messages", "template": "chatml"}
    tok, made = prepared(data, tmp_path / "cache")
    [split] = made.train
    assert (split.documents, split.overlap, len(split.tokens)) == (30, 0, int(split.offsets[-1]))
    chats = Chats(CHATML, tok, True)
    for n, row in enumerate(rows):
        _, ids, mask = chats.encode(row["messages"])
        a, b = split.offsets[n : n + 2]
        assert split.tokens[a:b].tolist() == ids
        assert split.mask is not None
        assert mask is not None
        assert split.mask[a:b].tolist() == mask.tolist()
    assert tok.template == CHATML
    assert len(tok.fast.encode("<|im_end|>").ids) > 1  # in text it is text
    _, everything = prepared({**data, "answers_only": False}, tmp_path / "cache")
    assert everything.train[0].mask is None
    assert everything.fingerprint != made.fingerprint


def test_prompts_and_completions_are_chats(tmp_path: Path) -> None:
    pairs = chats_file(tmp_path / "pairs.jsonl", [{"prompt": f"alpha {n}", "completion": "beta"} for n in range(9)])
    chats = [{"messages": [{"role": "user", "content": f"alpha {n}"}, CHAT[1] | {"content": "beta"}]} for n in range(9)]
    file = chats_file(tmp_path / "chats.jsonl", chats)
    how = {"template": "chatml"}
    _, a = prepared({"source": str(pairs), "prompt": "prompt", "completion": "completion", **how}, tmp_path / "cache")
    _, b = prepared({"source": str(file), "messages": "messages", **how}, tmp_path / "cache")
    assert np.array_equal(a.train[0].tokens[:], b.train[0].tokens[:])
    assert np.array_equal(a.train[0].mask[:], b.train[0].mask[:])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            {"messages": [{"from": "human", "value": "x"}]},
            r"line 4: messages\[0\] is not .*; it has: from, value",
        ),
        ({"messages": "x"}, "line 4: column 'messages' holds a str, not a list"),
        ({"messages": [{"role": "user", "content": None}]}, r"line 4: messages\[0\] has no content"),
        ({"messages": CHAT[:1]}, "line 4: nothing in it is written by an assistant"),
        ({"chat": CHAT}, "line 4: no column 'messages'; there are: chat"),
    ],
)
def test_a_bad_chat_is_named_by_its_row(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    good = {"messages": CHAT}
    file = chats_file(tmp_path / "chats.jsonl", [good, good, good, row, good])
    with pytest.raises(UserError, match=why):
        prepared({"source": str(file), "messages": "messages", "template": "chatml"}, tmp_path / "cache")


def test_templates_that_are_not_there_are_named(tmp_path: Path) -> None:
    file = chats_file(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 3)
    data = {"source": str(file), "messages": "messages"}
    with pytest.raises(UserError, match=r"the tokenizer has no chat template .*chatml"):
        prepared(data, tmp_path / "cache")
    with pytest.raises(UserError, match=r"nowhere\.jinja: No such file"):
        prepared({**data, "template": str(tmp_path / "nowhere.jinja")}, tmp_path / "cache")
    (tmp_path / "bad.jinja").write_text("{% for %}", encoding="utf-8")
    with pytest.raises(UserError, match="the chat template does not parse"):
        prepared({**data, "template": str(tmp_path / "bad.jinja")}, tmp_path / "cache")


def test_chats_that_others_may_stand_in_for_are_left_out_and_counted(tmp_path: Path) -> None:
    tok = tokenizer.train(["user:\n\n\nbeta " * 300], 400, 32)
    (tmp_path / "tok").mkdir()
    for name, content in tok.files().items():
        (tmp_path / "tok" / name).write_bytes(content)
    template = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:\n{% endif %}"
    (tmp_path / "plain.jinja").write_text(template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    asked = {"role": "user", "content": "beta"}
    rows = [
        {"messages": [asked, answer]}
        for answer in (
            {"role": "assistant", "content": "beta"},
            {"role": "assistant", "content": "\n\nbeta"},
            {"role": "assistant", "content": "\n\n beta"},
            call,
        )
    ]
    cache = tmp_path / "cache"
    cache.mkdir()

    def made(rows: Sequence[dict[str, Any]]) -> Any:
        file = chats_file(tmp_path / "chats.jsonl", rows)
        how = {"source": str(file), "messages": "messages", "template": str(tmp_path / "plain.jinja")}
        c = config.layered({"data": {"validation": 0.0, **how}})
        return prepare.tokenize(prepare.read(c.data, cache), tokenizer.load(tmp_path / "tok"), cache)

    for _ in range(2):  # made, and from the cache
        data = made(rows)
        assert data.train[0].documents == 1
        assert [line.partition("chats.jsonl: ")[2] for line in data.left_out] == [
            "2 chat(s) left out: a token lies across the edge of an answer (which begins or ends with space?)",
            "1 chat(s) left out: the chat template does not write their tool calls",
        ]
    with pytest.raises(UserError, match=r"1 chat\(s\) left out: .*tool calls\n.*nothing in it to train on"):
        made(rows[3:])
    with pytest.raises(ValueError, match="does not write their tool calls"):
        Chats(CHATML, tok, False).encode([asked, {**call, "content": ""}])


def test_a_run_says_what_it_makes_of_chats(
    options: Callable[..., dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "README.md").write_text("about these chats")
    long = [{"role": "user", "content": "alpha " * 40}, CHAT[1]]
    chats_file(folder / "chats.jsonl", [{"messages": CHAT[:2]}, {"messages": long}] * 10)
    how = {"data__messages": "messages", "data__template": "chatml"}
    said = StringIO()

    def go(source: Path, out: str, **more: Any) -> session.Result:
        c = config.layered(options(out, data__source=str(source), steps=1, **how, **more))
        return session.train(c, console=Console(file=said, width=10_000))

    result = go(folder, "run", validation__at_start=True)
    assert "README.md: left out, it has no rows" in caplog.text
    assert "chats are longer than 32 tokens, and are cut" in said.getvalue()
    m = result.metrics
    assert m is not None and m.val_loss is not None and m.val_bits_per_byte is None
    assert "bits/byte" not in said.getvalue()
    assert "too small to hold" not in said.getvalue()
    go(chats_file(tmp_path / "one.jsonl", [{"messages": CHAT[:2]}]), "small")
    assert "validation: none, since the data is too small" in said.getvalue()
    with pytest.raises(UserError, match="no chats in it"):
        go(folder / "README.md", "readme")
