"""The JSON Schema accepts what the parser accepts."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
from hypothesis import given
from jsonschema import Draft202012Validator

from spec import parse, presets
from spec.load import read_yaml
from spec.schema import json_schema
from spec.tests.strategies import specs
from spec.tests.test_load import SMALL

VALIDATOR = Draft202012Validator(json_schema())


def test_it_is_a_valid_schema() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("name", presets())
def test_presets_fit(name: str) -> None:
    file = resources.files("spec") / "presets" / f"{name}.yaml"
    VALIDATOR.validate(read_yaml(file.read_text(encoding="utf-8"), name))


@given(specs())
def test_whatever_parses_fits(data: dict[str, Any]) -> None:
    parse(data)
    VALIDATOR.validate(data)


@pytest.mark.parametrize(
    "change",
    [
        {"widht": 1},
        {"width": 0},
        {"version": 2},
        {"block": {"attention": {"heads": 4}}},
        {"pattern": [{"attention": {"head": 2}}]},
        {"overrides": {"0": {"mlp": {"activation": "swish"}}}},
        {"block": {"attention": {"heads": 4, "position": {"kind": "rotary"}}, "mlp": {"hidden": 8}}},
    ],
)
def test_mistakes_do_not_fit(change: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid({**SMALL, **change})


def test_every_field_is_described() -> None:
    undescribed = [
        f"{model}.{field}"
        for model, definition in json_schema()["$defs"].items()
        for field, body in definition.get("properties", {}).items()
        if "description" not in body and "$ref" not in body and field not in PLAIN
    ]
    assert undescribed == []


PLAIN = {"kind", "q", "k", "v", "o", "gate", "up", "down"}
"""Fields whose names say it."""
