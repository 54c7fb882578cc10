"""Chat templates: where they come from, what is refused, and that running one is harmless."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")

from backends.base import Tokenizer
from backends.folder import write_tokenizer
from backends.gguf import read
from backends.gguf.container import read_header
from convert import templates
from convert.pipeline import convert
from convert.sources import open_source
from convert.verify import limits
from parity_tests.checkpoints import llama, write_checkpoint
from spec import UserError

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def write(folder: Path, told: Any = None, **files: str) -> tuple[Path, dict[str, Any]]:
    for name, text in files.items():
        file = folder / f"{name.replace('__', '/')}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return folder, {} if told is None else {"chat_template": told}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (None, (None, {})),
        ("T", ("T", {})),
        ([{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}], ("D", {"tool_use": "U"})),
        ([{"name": "rag", "template": "R"}, {"name": "tool", "template": "U"}], ("R", {"tool": "U"})),
        ({"default": "D", "rag": "R"}, ("D", {"rag": "R"})),
        ([], (None, {})),
        (7, (None, {})),
    ],
)
def test_templates_in_the_configuration(told: Any, expected: Any, tmp_path: Path) -> None:
    assert templates.read(*write(tmp_path, told)) == expected


def test_files_come_first_and_several_by_name(tmp_path: Path) -> None:
    folder, config = write(tmp_path, "C", chat_template="F", additional_chat_templates__tool_use="U")
    assert templates.read(folder, config) == ("F", {"tool_use": "U"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in %}", "chat template 'default': line 1 does not parse"),
        ("\n{{ x", "line 2 does not parse"),
        ("{% magic %}", "unknown tag 'magic'"),
        ("{{" + "(" * 5000 + "}}", "does not parse"),
        ("x" * 1_000_001, "more than such a file ever has"),
    ],
)
def test_what_is_no_template_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    folder, config = write(tmp_path, chat_template=text)
    with pytest.raises(UserError, match=r"chat.template") as e:
        templates.read(folder, config)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_names_are_no_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no name of a template"):
        templates.read(*write(tmp_path, [{"name": "../../x", "template": "T"}]))


def test_blocks_that_transformers_knows_parse() -> None:
    text = "{% generation %}x{% endgeneration %}{% for m in messages %}{% break %}{% endfor %}"
    assert templates.checked(text, "t") == text


def chats(template: str) -> tuple[tuple[str, ...], str | None]:
    return limits.conversations(Tokenizer(json={}, bos="<s>", chat_template=template))


def test_conversations_are_rendered_as_transformers_does() -> None:
    found, missing = chats(CHAT + "{{ bos_token }}{{ [1] | tojson }}")
    assert missing is None
    assert found[0] == "<user>What is 2 + 2?\n<a><s>[1]"
    assert len(found) == 3
    utils: Any = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [{"role": "user", "content": "What is 2 + 2?\n"}]
    theirs, _ = utils.render_jinja_template([messages], chat_template=CHAT, add_generation_prompt=True)
    assert chats(CHAT)[0][0] == theirs[0]


def test_what_a_template_refuses_is_left_out() -> None:
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    found, missing = chats(picky)
    assert len(found) == 2 and missing is None


def test_what_a_template_breaks_on_is_told() -> None:
    assert chats("{{ undefined_function() }}") == (
        (), "the chat template breaks: UndefinedError: 'undefined_function' is undefined",
    )  # fmt: skip
    assert chats("{{ raise_exception('no') }}") == ((), "the chat template refuses them all")
    found, missing = chats("{{ messages[1].content + 1 if messages[2] else 'x' }}")
    assert found == ("x", "x") and missing is not None and "TypeError" in missing


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 'a' * 10 ** 10 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
    ],
    ids=["escape", "memory", "time"],
)
def test_a_hostile_template_costs_little(text: str) -> None:
    start = time.perf_counter()
    found, missing = chats(text)
    assert found == () and missing is not None
    assert time.perf_counter() - start < 20


def test_every_template_is_written(tmp_path: Path) -> None:
    vocab = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    tokenizer = Tokenizer(json={"model": vocab}, chat_template="D", templates={"rag": "R"})
    names = write_tokenizer(tmp_path, tokenizer, 16)
    assert "additional_chat_templates/rag.jinja" in names
    assert templates.read(tmp_path, json.loads((tmp_path / "tokenizer_config.json").read_text())) == ("D", {"rag": "R"})


def test_llama_cpp_finds_templates_by_name(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from backends.gguf.tokenizer import tokenizer_metadata
    from parity_tests.tokenizer_shop import family

    tokenizer = family("gpt2")
    tokenizer.chat_template, tokenizer.templates = "D", {"rag": "R"}
    keys = tokenizer_metadata(tokenizer, 1000)
    assert keys["tokenizer.chat_template"] == "D"
    assert keys["tokenizer.chat_templates"] == ["rag"] and keys["tokenizer.chat_template.rag"] == "R"


@pytest.mark.parametrize(("name", "text", "message"), [
    ("../../../escaped", "T", "is no name of a template"), ("rag", "{% if %}", "does not parse"),
])  # fmt: skip
def test_templates_of_a_gguf_file_are_checked_as_those_of_a_folder(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    """A name becomes a file's: one that leads out of the folder is refused before anything is written."""
    pytest.importorskip("gguf")
    out = tmp_path / "m.gguf"
    convert(write_checkpoint(tmp_path / "source", llama()), "gguf", "f32", out, verify=False)
    header = read_header(out)
    keys = {**header.keys, "tokenizer.chat_templates": ["tool_use", name], "tokenizer.chat_template.tool_use": "T",
            f"tokenizer.chat_template.{name}": text}  # fmt: skip
    with pytest.MonkeyPatch.context() as m:
        m.setattr(read, "read_split", lambda path: replace(header, keys=keys))
        with pytest.raises(UserError, match=message):
            open_source(out)
