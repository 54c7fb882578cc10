"""Resolving layers: pattern, overrides and merging; and the text of every error."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from spec import SpecError, parse
from spec.config import LongRopeScaling, NoPosition, Rope, merge
from spec.tests.test_load import SMALL


def small(**changes: Any) -> dict[str, Any]:
    return merge(copy.deepcopy(SMALL), changes)


def test_pattern_repeats_and_overrides_come_last() -> None:
    spec = parse(small(
        depth=5,
        block={"attention": {"window": 8}},
        pattern=[{}, {"attention": {"window": None}}],
        overrides={"-1": {"attention": {"window": 3}}, "0..1": {"mlp": {"hidden": 16}}},
    ))  # fmt: skip
    assert [b.attention.window for b in spec.layers] == [8, None, 8, None, 3]
    assert [b.mlp.hidden for b in spec.layers] == [16, 16, 64, 64, 64]


def test_later_overrides_win_and_keep_what_they_do_not_name() -> None:
    spec = parse(
        small(overrides={"0..3": {"attention": {"window": 2, "softcap": 5}}, "2": {"attention": {"window": 9}}})
    )
    assert [(b.attention.window, b.attention.softcap) for b in spec.layers] == [(2, 5), (2, 5), (9, 5), (2, 5)]


def test_a_position_of_another_kind_is_replaced_and_of_the_same_kind_merged() -> None:
    spec = parse(small(
        block={"attention": {"position": {"kind": "rope", "theta": 5e5, "scaling": {"kind": "linear", "factor": 2}}}},
        overrides={
            "0": {"attention": {"position": {"kind": "none"}}},
            "1": {"attention": {"position": {"theta": 100}}},
            "2": {"attention": {"position": {"scaling": {"kind": "yarn", "factor": 4}}}},
            "3": {"attention": {"position": {"scaling": None}}},
        },
    ))  # fmt: skip
    none, local, yarn, plain = (b.attention.position for b in spec.layers)
    assert none == NoPosition(kind="none")
    assert isinstance(local, Rope)
    assert (local.theta, local.scaling and local.scaling.kind) == (100, "linear")
    assert isinstance(yarn, Rope)
    assert (yarn.theta, yarn.scaling and yarn.scaling.model_dump(include={"kind", "factor", "original_context"})) == (
        5e5, {"kind": "yarn", "factor": 4, "original_context": 16},
    )  # fmt: skip
    assert isinstance(plain, Rope)
    assert (plain.theta, plain.scaling) == (5e5, None)


def test_merge_leaves_its_arguments_alone() -> None:
    base, patch = {"a": {"b": [1]}, "c": 1}, {"a": {"d": [2]}}
    out = merge(base, patch)
    out["a"]["b"].append(9)
    out["a"]["d"].append(9)
    assert (base, patch) == ({"a": {"b": [1]}, "c": 1}, {"a": {"d": [2]}})


def test_equal_layers_are_one_object() -> None:
    layers = parse(small(pattern=[{}, {"attention": {"window": 4}}])).layers
    assert layers[0] is layers[2]
    assert layers[1] is layers[3]
    assert layers[0] is not layers[1]


def test_bias_true_stands_for_all() -> None:
    spec = parse(small(block={"attention": {"bias": True}, "mlp": {"bias": True, "gated": False}}))
    assert set(spec.layers[0].attention.bias.model_dump().values()) == {True}
    assert spec.layers[0].mlp.bias.model_dump() == {"gate": False, "up": True, "down": True}


def test_longrope_fills_in_its_attention_factor() -> None:
    scaling = {"kind": "longrope", "short_factor": [1] * 4, "long_factor": [2] * 4, "original_context": 4}
    spec = parse(small(block={"attention": {"position": {"kind": "rope", "scaling": scaling}}}))
    position = spec.layers[0].attention.position
    assert isinstance(position, Rope)
    assert isinstance(position.scaling, LongRopeScaling)
    assert position.scaling.attention_factor == pytest.approx(2**0.5)  # sqrt(1 + ln 4 / ln 4)


ERRORS = {
    "unknown-field": ({"widht": 3}, ["widht: is not a field (did you mean width?)"]),
    "unknown-nested-field": (
        {"block": {"attention": {"head": 4}}},
        ["block.attention.head: is not a field (did you mean heads?)"],
    ),
    "not-a-number": (
        {"width": "wide"},
        ["width: 'wide' input should be a valid integer"],
    ),
    "no-number-either": ({"width": True}, ["width: True input should be a valid integer"]),
    "too-deep": ({"depth": 20_000_000}, ["depth: 20000000 input should be less than or equal to 4096"]),
    "too-small": ({"depth": 0}, ["depth: 0 input should be greater than or equal to 1"]),
    "not-finite": ({"head": {"scale": float("inf")}}, ["head.scale: inf input should be a finite number"]),
    "kv-heads": (
        {"block": {"attention": {"heads": 8, "kv_heads": 6}}},
        ["block.attention.kv_heads: 6 does not divide heads=8 (try 4 or 8)"],
    ),
    "head-dim": (
        {"block": {"attention": {"heads": 5}}},
        ["block.attention.heads: 5 does not divide width=32 (set attention.head_dim)"],
    ),
    "odd-rotation": (
        {"block": {"attention": {"head_dim": 7}}},
        [
            "block.attention.position.fraction: 1.0 rotates 7 of head_dim=7 dimensions, and rotation works on pairs "
            "(choose a fraction and head_dim that give an even number of at least 2)"
        ],
    ),
    "position-kind": (
        {"block": {"attention": {"position": {"kind": "rotary"}}}},
        ["block.attention.position.kind: 'rotary' is no kind (one of 'rope', 'alibi', 'none')"],
    ),
    "position-without-kind": (
        {"block": {"attention": {"position": {"theta": 2}}}},
        ["block.attention.position.kind: is missing (say which kind this is)"],
    ),
    "longrope-divisors": (
        {"block": {"attention": {"position": {"kind": "rope", "scaling": {
            "kind": "longrope", "short_factor": [1, 1], "long_factor": [1] * 4, "original_context": 8}}}}},
        [
            "block.attention.position.scaling.short_factor: '2 values' needs rotary_dim / 2 = 4 values "
            "(one divisor for each frequency)"
        ],
    ),
    "scaling-beyond-numbers": (
        {"block": {"attention": {"position": {"kind": "rope", "scaling": {"kind": "yarn", "factor": 1e299}}}}},
        ["block.attention.position.scaling.factor: 1e+299 input should be less than or equal to 1000000"],
    ),
    "llama3-order": (
        {"block": {"attention": {"position": {"kind": "rope", "scaling": {
            "kind": "llama3", "factor": 8, "high_freq_factor": 1}}}}},
        ["block.attention.position.scaling: high_freq_factor must exceed low_freq_factor"],
    ),
    "norm-offset": (
        {"final_norm": {"weight": False, "offset": 1}},
        ["final_norm: offset needs a learned gain (set weight: true, or offset: 0)"],
    ),
    "clamped-needs-gate": (
        {"block": {"mlp": {"activation": "clamped_swiglu", "gated": False}}},
        ["block.mlp: activation clamped_swiglu needs gated: true"],
    ),
    "shared-norm": ({"block": {"shared_norm": True}}, ["block: shared_norm needs parallel: true"]),
    "pattern-too-long": (
        {"pattern": [{}] * 5},
        ["pattern: '5 entries' is longer than depth=4 (drop the entries that no layer reaches)"],
    ),
    "in-a-pattern": (
        {"pattern": [{}, {"attention": {"kv_heads": 3}}]},
        ["pattern[1].attention.kv_heads: 3 does not divide heads=4 (try 2 or 4)"],
    ),
    "unknown-field-in-an-override": (
        {"overrides": {"1": {"mpl": {}}}},
        ["overrides['1'].mpl: is not a field (did you mean mlp?)"],
    ),
    "override-outside": (
        {"overrides": {"4": {}}},
        ["overrides['4']: '4' is outside 0..3 (name layers that exist)"],
    ),
    "override-no-layer": (
        {"overrides": {"first": {}}},
        ["overrides['first']: 'first' is no layer (write '3', '-1' or '0..3')"],
    ),
    "position-rows": (
        {"embedding": {"positions": {"rows": 8, "offset": 2}}},
        ["embedding.positions.rows: 8 is fewer than context + offset = 18 (leave rows out, or lower context)"],
    ),
    "several-at-once": (
        {"vocab_size": 0, "hed": {}, "block": {"mlp": {"activation": "swish"}}},
        [
            "vocab_size: 0 input should be greater than or equal to 1",
            "block.mlp.activation: 'swish' input should be 'silu', 'gelu', 'gelu_tanh', 'quick_gelu', 'relu', 'relu2' "
            "or 'clamped_swiglu'",
            "hed: is not a field (did you mean head?)",
        ],
    ),
    "several-in-the-layers": (
        {"pattern": [{"attention": {"kv_heads": 3}}, {"attention": {"head_dim": 3}}], "overrides": {"9": {}}},
        [
            "overrides['9']: '9' is outside 0..3 (name layers that exist)",
            "pattern[0].attention.kv_heads: 3 does not divide heads=4 (try 2 or 4)",
            "pattern[1].attention.position.fraction: 1.0 rotates 3 of head_dim=3 dimensions, and rotation works on "
            "pairs (choose a fraction and head_dim that give an even number of at least 2)",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ERRORS))
def test_error_text(case: str) -> None:
    changes, lines = ERRORS[case]
    with pytest.raises(SpecError) as e:
        parse(small(**changes), "m.yaml")
    assert str(e.value).splitlines() == [f"m.yaml: {line}" for line in lines]


def test_missing_fields_are_all_named() -> None:
    with pytest.raises(SpecError) as e:
        parse({"block": {"attention": {}}})
    assert [p.path for p in e.value.problems] == [
        "vocab_size", "width", "depth", "context", "block.attention.heads", "block.mlp",
    ]  # fmt: skip
