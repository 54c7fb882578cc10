"""Plans: every parameter once, the q4 budget held, and what gets int8 first."""

from __future__ import annotations

from typing import Any

import pytest

from convert import recipe
from convert.levels import LEVELS, check
from spec import Spec, load, params, parse, presets
from spec.errors import UserError


def spec(**kw: Any) -> Spec:
    data: dict[str, Any] = {
        "vocab_size": 512, "width": 256, "depth": 12, "context": 64,
        "block": {"attention": {"heads": 8, "kv_heads": 2, "bias": True}, "mlp": {"hidden": 704}},
    }  # fmt: skip
    return parse({**data, **kw})


@pytest.mark.parametrize("level", LEVELS)
def test_a_plan_names_every_parameter_once_in_canonical_order(level: str) -> None:
    s = spec()
    planned = recipe.plan(s, level)
    assert [(p.name, p.shape) for p in planned] == [(p.name, p.shape) for p in params(s)]
    assert {p.level for p in planned if len(p.shape) == 1} == {"f32"}


@pytest.mark.parametrize("name", presets())
def test_q4_stays_within_its_budget_and_uses_it(name: str) -> None:
    s = load(name)
    planned = recipe.plan(s, "q4")
    bits = recipe.bits_per_weight(planned)
    assert bits <= recipe.BUDGET or any(p.level == "f16" for p in planned)
    assert bits > 4.6


def test_head_and_embedding_come_first_then_values_of_the_outer_layers() -> None:
    s = spec(vocab_size=256)
    levels = {p.name: p.level for p in recipe.plan(s, "q4")}
    assert levels["head.weight"] == levels["embed.weight"] == "q8"
    assert all(levels[f"layers.{i}.attn.v.weight"] == "q8" for i in range(12))
    down = [i for i in range(12) if levels[f"layers.{i}.mlp.down.weight"] == "q8"]
    assert down and set(down) <= {0, 11, 3, 6, 9}


def test_a_tied_matrix_counts_once() -> None:
    s = spec(head={"tied": True}, vocab_size=1024)
    planned = recipe.plan(s, "q4")
    assert {p.name: p.level for p in planned}["embed.weight"] == "q8"
    assert "head.weight" not in {p.name for p in planned}
    assert recipe.bits_per_weight(planned) <= recipe.BUDGET


def test_odd_widths_stay_f16_and_are_named() -> None:
    s = spec(block={"attention": {"heads": 8, "kv_heads": 2}, "mlp": {"hidden": 700}})
    planned = recipe.plan(s, "q4")
    assert {p.level for p in planned if "mlp.down" in p.name} == {"f16"}
    assert {p.level for p in planned if "mlp.up" in p.name} == {"q4"}
    notes = list(recipe.notes(s, planned, "q4"))
    assert "layers.0.mlp.down.weight [256, 700], layers.1" in notes[0] and "and 9 more" in notes[0]
    assert "more than 4.95" in notes[1]


def test_an_unknown_level_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--quant q4_k_n: no such level \(did you mean q4_k_m\?"):
        check("q4_k_n", (*LEVELS, "q4_k_m", "q6_k"))
    assert check("Q4", tuple(LEVELS)) == "q4"
