"""Plans: every parameter once, the q4 budget held, and what gets int8 first."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import pytest

from backends.base import Planned
from convert import recipe
from convert.levels import LEVELS, check
from convert.recipe import Held, Recipe
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


def levels_of(planned: list[Planned]) -> dict[str, str]:
    return {p.name: p.level for p in planned}


def test_the_last_override_that_matches_a_matrix_holds() -> None:
    asked = Recipe("q4", (("layers.*.attn.*", "q8"), ("layers.0.*", "f16"), ("head.weight", "bf16")))
    found = levels_of(recipe.plan(spec(), asked))
    assert found["layers.0.attn.v.weight"] == found["layers.0.mlp.up.weight"] == "f16"
    assert found["layers.1.attn.q.weight"] == "q8"
    assert found["head.weight"] == "bf16"
    assert found["layers.0.attn.q.bias"] == found["layers.0.attn_norm.weight"] == "f32"  # vectors that a glob takes in


def test_overrides_are_not_upgraded_and_count_in_the_budget() -> None:
    plain = levels_of(recipe.plan(spec(), "q4"))
    held = [n for n, level in plain.items() if level == "q8" and "mlp.down" in n]
    found = recipe.plan(spec(), Recipe("q4", (("layers.*.mlp.down", "q4"),)))
    assert held and all(levels_of(found)[n] == "q4" for n in held)
    assert recipe.bits_per_weight(found) <= recipe.BUDGET
    heavy = recipe.plan(spec(), Recipe("q4", (("layers.*.mlp.*", "f16"),)))
    assert "q8" not in levels_of(heavy).values()
    assert "because of the overrides" in next(
        iter(recipe.notes(spec(), heavy, Recipe("q4", (("layers.*.mlp.*", "f16"),))))
    )


@pytest.mark.parametrize(
    ("glob", "level", "message"),
    [
        ("haed", "q8", r"--override haed=q8: matches no tensor \(did you mean head\?\)"),
        ("layers.*.attn.w", "q8", r"matches no tensor \(did you mean layers\.\*\.attn\."),
        ("head", "q9", r"--override head=q9: no such level \(did you mean q4\?|\(known:"),
        ("final_norm", "q8", "final_norm.weight is a vector, which stays f32"),
        ("layers.*.attn.q.bias", "f16", "layers.0.attn.q.bias is a vector"),
        ("layers.*.mlp.down", "q4-g128", "layers.0.mlp.down.weight: 704 columns are no multiple of 128"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(glob: str, level: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe.plan(spec(), Recipe("q4", ((glob, level),)))


def test_an_override_of_a_tied_head_names_the_embedding_and_every_bad_override_its_own_line() -> None:
    tied = spec(head={"tied": True})
    with pytest.raises(UserError, match=r"the head is tied to the embedding \(use embed=q8\)"):
        recipe.plan(tied, Recipe("q4", (("head", "q8"),)))
    with pytest.raises(UserError) as e:
        recipe.plan(tied, Recipe("q4", (("head", "q8"), ("final_norm", "q8"))))
    assert len(str(e.value).splitlines()) == 2


def test_what_an_override_cannot_round_of_what_it_names_stays_f16_and_is_noted() -> None:
    asked = Recipe("f32", (("layers.*.mlp.*", "q4-g128"),))
    planned = recipe.plan(spec(), asked)
    assert levels_of(planned)["layers.0.mlp.up.weight"] == "q4-g128"
    assert levels_of(planned)["layers.0.mlp.down.weight"] == "f16"
    assert "width no multiple of 128): layers.0.mlp.down.weight [256, 704]" in next(
        iter(recipe.notes(spec(), planned, asked))
    )


@pytest.mark.parametrize("bits", [4.5, 4.51, 4.8, 6.0, 8.5])
def test_a_budget_of_bits_is_spent_and_kept(bits: float) -> None:
    planned = recipe.plan(spec(), Recipe("q4", bits=bits))
    smallest = min(p.size for p in params(spec()) if p.matrix)
    total = sum(p.size for p in params(spec()) if p.matrix)
    spent = recipe.bits_per_weight(planned)
    assert spent <= bits + 1e-9
    assert bits - spent < 4 * smallest / total or set(levels_of(planned).values()) == {"f32", "q8"}


def test_a_budget_out_of_reach_says_what_is_reachable() -> None:
    with pytest.raises(UserError, match=r"--bits 4\.3: at least 4\.50 are reachable \(--quant q4-g128 takes less\)"):
        recipe.plan(spec(), Recipe("q4", bits=4.3))
    with pytest.raises(UserError, match=r"--bits 9: at most 8\.50 are reachable.*--quant q8 or f16"):
        recipe.plan(spec(), Recipe("q4", bits=9))
    with pytest.raises(UserError, match="fewer or smaller overrides take less"):
        recipe.plan(spec(), Recipe("q4", (("head", "f16"),), bits=4.5))
    with pytest.raises(UserError, match=r"--bits: a budget is spent on int8 beside 4 bits, and q8 has one width"):
        recipe.plan(spec(), Recipe("q8", bits=9))


def test_gains_decide_what_becomes_int8() -> None:
    s = spec()
    gains = {p.name: 1e-6 for p in params(s) if p.matrix} | {
        "layers.5.attn.q.weight": 1.0,
        "layers.7.mlp.gate.weight": 0.9,
    }
    found = levels_of(recipe.plan(s, Recipe("q4", bits=4.7), gains=gains))
    assert found["layers.5.attn.q.weight"] == found["layers.7.mlp.gate.weight"] == "q8"
    by_order = levels_of(recipe.plan(s, Recipe("q4", bits=4.7)))
    assert by_order["layers.5.attn.q.weight"] == by_order["layers.7.mlp.gate.weight"] == "q4"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_a_budget_of_bytes_is_the_largest_artifact_that_fits(share: float) -> None:
    s = spec()

    def sized(planned: Sequence[Planned]) -> int:
        weights = {p.name: prod(p.shape) for p in planned}
        return 5000 + sum(int(weights[p.name] * LEVELS[p.level].stored / 8) for p in planned)

    least, most = (sized(recipe.plan(s, Recipe("q4", bits=b))) for b in (4.5, 8.5))
    size = int(least + share * (most - least))
    found = sized(recipe.plan(s, Recipe("q4", size=size), sized=sized))
    assert found <= size
    assert size - found < 0.02 * (most - least) + 1
    for wrong, message in ((least - 1, "at least"), (most + 1, "at most")):
        with pytest.raises(UserError, match=f"--size .*MB: {message} .*MB are reachable"):
            recipe.plan(s, Recipe("q4", size=wrong), sized=sized)


def test_what_a_checkpoint_was_trained_for_stays_as_it_is() -> None:
    s = spec()
    trained = levels_of(recipe.plan(s, Recipe("q4", bits=4.6)))
    held = Held({n: x for n, x in trained.items() if x in ("q4", "q8")}, recipe=Recipe("q4", bits=4.6))
    assert levels_of(recipe.plan(s, "q4", held)) == trained
    assert levels_of(recipe.plan(s, Recipe("q4", bits=4.6), held)) == trained
    other = levels_of(recipe.plan(s, Recipe("q4", (("head", "f16"),)), held))
    assert other == trained | {"head.weight": "f16"}
    assert not list(recipe.notes(s, recipe.plan(s, "q4", held), "q4", None, held))
    wider = recipe.plan(s, "q8", held)
    assert set(levels_of(wider).values()) == {"f32", "q8"}
    assert "trained for q4: at q8 its weights are rounded anew" in next(recipe.notes(s, wider, "q8", None, held))
