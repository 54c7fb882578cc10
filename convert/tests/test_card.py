"""Model cards: the Hub's own classes read them back, and they say where the model comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from convert import pipeline
from convert.tests.conftest import LLAMA, write_huggingface
from spec import Spec

Writes = Callable[..., Path]


def made(source: Path, out: Path, level: str = "q8", **settings: Any) -> ModelCard:
    pipeline.convert(source, "gguf", level, out, **settings)
    return ModelCard(out.with_name(out.name + ".md").read_text())


def test_front_matter_is_carried_over_and_round_trips(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "m", LLAMA)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: its-own\nlicense_link: https://example.org/l\nlanguage:\n- en\n- fr\n"
        "datasets: [a/b]\nbase_model: owner/origin\ntags: [secret]\nwidget: {x: 1}\n---\n# M\n"
    )
    card = made(folder, tmp_path / "m.gguf", verify=False)
    assert card.data.to_dict() == {
        "license": "other", "license_name": "its-own", "license_link": "https://example.org/l",
        "language": ["en", "fr"], "datasets": ["a/b"], "base_model": "owner/origin",
        "base_model_relation": "quantized", "pipeline_tag": "text-generation", "tags": ["allotrope", "gguf", "q8"],
    }  # fmt: skip
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_a_model_of_16_bits_is_not_called_quantized(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "m", LLAMA)
    (folder / "README.md").write_text("---\nbase_model: owner/origin\n---\n")
    card = made(folder, tmp_path / "m.gguf", "f16", verify=False)
    assert "base_model_relation" not in card.data.to_dict()
    assert "no licence is known: the source names none" in card.text


def test_the_parity_table_and_the_spec_are_in_it(checkpoint: Path, tmp_path: Path, small: Spec) -> None:
    card = made(checkpoint, tmp_path / "m.gguf")
    for part in ("| check | status | measured | gate |", "| arithmetic | PASS |", "## Spec", "vocab_size: 96", "## Use",
                 "| level | q8 (8.50 bits/weight over all matrices) |", "Made with python"):  # fmt: skip
        assert part in card.text, part


@pytest.mark.parametrize("readme", [None, "no front matter", "---\n---\n", "---\n: [\n---\n"])
def test_a_source_that_says_nothing_still_has_a_card(checkpoint: Path, tmp_path: Path, readme: str | None) -> None:
    if readme is not None:
        (checkpoint / "README.md").write_text(readme)
    card = made(checkpoint, tmp_path / "m.gguf", verify=False)
    assert card.data.to_dict() == {"pipeline_tag": "text-generation", "tags": ["allotrope", "gguf", "q8"]}
