"""YAML in and out, migration, and what a broken file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from spec import SpecError, UserError, dump, load, parse
from spec.load import MIGRATIONS, read_yaml
from spec.tests.strategies import specs

SMALL: dict[str, Any] = {
    "vocab_size": 64, "width": 32, "depth": 4, "context": 16,
    "block": {"attention": {"heads": 4}, "mlp": {"hidden": 64}},
}  # fmt: skip


@given(specs())
def test_dump_then_parse_gives_the_same_spec(data: dict[str, Any]) -> None:
    spec = parse(data)
    again = parse(read_yaml(dump(spec), "dump"))
    assert again == spec
    assert again.layers == spec.layers
    assert again.hash == spec.hash
    assert dump(again) == dump(spec)


@given(specs())
def test_a_resolved_layer_leaves_no_default_open(data: dict[str, Any]) -> None:
    spec = parse(data)
    assert len(spec.layers) == spec.depth
    for b in spec.layers:
        a = b.attention
        assert None not in (a.kv_heads, a.head_dim, a.scale)
        assert b.mlp.gated or not b.mlp.bias.gate


def test_a_file_a_folder_and_a_preset_load(tmp_path: Path) -> None:
    spec = load("tiny")
    file = tmp_path / "spec.yaml"
    file.write_text(dump(spec), encoding="utf-8")
    assert load(file) == load(tmp_path) == load(str(file)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width: [1", "f.yaml:1:10: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("width: 1\nwidth: 2", "f.yaml:2:1: not valid YAML: key 'width' appears twice"),
        ("- 1", "f.yaml: a spec is a mapping of fields, not list"),
        ("", "f.yaml: a spec is a mapping of fields, not NoneType"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
    ],
)
def test_text_that_is_no_spec_names_the_place(text: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        read_yaml(text, "f.yaml")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_numbers_without_a_dot_are_numbers() -> None:
    assert read_yaml("eps: 1e-5\ntheta: 1E6\nplain: -2e+3\nword: e5", "f") == {
        "eps": 1e-5, "theta": 1e6, "plain": -2000.0, "word": "e5",
    }  # fmt: skip


def test_unreadable_files_say_so_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"name: \xff")
    with pytest.raises(UserError, match=r"x\.yaml: not UTF-8 at byte 6$"):
        load(file)
    with pytest.raises(UserError, match=r"tinny: neither a file nor a preset \(did you mean tiny\?\)$"):
        load("tinny")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (2, "version: 2 is newer than this program's 1 (upgrade allotrope)"),
        (0, "version: 0 has no migration (compare the file with `python -m spec schema` and write version: 1)"),
        ("1", "version: '1' is no whole number (write version: 1)"),
        (True, "version: True is no whole number (write version: 1)"),
    ],
)
def test_a_version_that_cannot_be_read_says_what_to_do(version: object, message: str) -> None:
    with pytest.raises(SpecError) as e:
        parse({**SMALL, "version": version})
    assert str(e.value) == message


def test_an_older_file_is_lifted_version_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def lift(step: str) -> Any:
        return lambda data: {**data, "name": data.get("name", "") + step}

    monkeypatch.setitem(MIGRATIONS, -1, lift("a"))
    monkeypatch.setitem(MIGRATIONS, 0, lift("b"))
    assert parse({**SMALL, "version": -1}).name == "ab"
    assert parse({**SMALL, "version": 0}).name == "b"
    assert parse(SMALL).name == "model"


def test_the_hash_ignores_names_initialisation_and_dropout_but_nothing_else() -> None:
    spec = parse(SMALL)
    same = {**SMALL, "name": "other", "init": {"std": 0.5}, "embedding": {"dropout": 0.5}}
    assert parse(same).hash == spec.hash
    written_out = {**SMALL, "overrides": {"0..3": {"attention": {"kv_heads": 4, "head_dim": 8, "scale": 8**-0.5}}}}
    assert parse(written_out).hash == spec.hash, "the resolved layers count, however they are written"
    for change in ({"context": 17}, {"head": {"tied": True}}, {"overrides": {"3": {"norm": {"eps": 1e-6}}}}):
        assert parse({**SMALL, **change}).hash != spec.hash
