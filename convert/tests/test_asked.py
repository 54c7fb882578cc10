"""Recipes in words: options, recipe files, and what is no recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.asked import asked, from_dict, read
from convert.recipe import Recipe
from spec.errors import UserError


def test_options_become_a_recipe() -> None:
    assert asked() is None
    assert asked("q4") == Recipe("q4")
    assert asked("q4", None, ["head=q8", "layers.*.attn.v = q8"], 4.5) == Recipe(
        "q4", (("head", "q8"), ("layers.*.attn.v", "q8")), 4.5
    )
    assert asked(overrides=["head=q8"]) == Recipe("", (("head", "q8"),))


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("700 mb", 7 * 10**8), ("123456", 123456), (".5kb", 500), ("12B", 12)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    found = asked(size=text)
    assert found is not None and found.size == size


def test_a_recipe_file_is_what_a_recipe_writes(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("level: q4\noverrides:\n  head: q8\n  layers.*.attn.v: q8\nbits: 4.7\n")
    found = read(file)
    assert found == Recipe("q4", (("head", "q8"), ("layers.*.attn.v", "q8")), 4.7)
    assert from_dict(found.to_dict(), "again") == found
    file.write_text("level: q4\nsize: 2GB\n")
    assert asked("q4-g128", file, ["head=f16"]) == Recipe("q4-g128", (("head", "f16"),), None, 2 * 10**9)
    assert asked(None, file, (), 4.6) == Recipe("q4", (), 4.6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("levels: q4", r"levels: is no key of a recipe \(did you mean level\?\)"),
        ("overrides: [head, q8]", "overrides: maps globs to levels"),
        ("overrides: {head: 8}", "overrides: 'head': 8: a glob and a level are words"),
        ("level: 4", "level: 4 is no name"),
        ("bits: many", "bits: many: is no number of bits"),
        ("size: big", "size: big: is no size, as in 2GB"),
        ("bits: 4.5\nsize: 2GB", "two budgets"),
        ("[q4]", "a recipe is a mapping"),
    ],
)
def test_a_recipe_file_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        asked(file=file)


@pytest.mark.parametrize("word", ["headq8", "=q8", "head=", "head"])
def test_an_override_names_a_glob_and_a_level(word: str) -> None:
    with pytest.raises(UserError, match=f"--override {word}: is no GLOB=LEVEL"):
        asked(overrides=[word])


@pytest.mark.parametrize("size", ["0", "2XB", "-1GB", "GB", "nan", "0.1B"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        asked(size=size)


@pytest.mark.parametrize("bits", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_number_of_bits_is_refused(bits: float) -> None:
    with pytest.raises(UserError, match="is no number of bits"):
        asked(bits=bits)


def test_two_budgets_are_refused_and_a_missing_file_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two budgets"):
        asked(bits=4.5, size="2GB")
    with pytest.raises(UserError, match=r"--recipe .*nothing.yaml: No such file"):
        asked(file=tmp_path / "nothing.yaml")
