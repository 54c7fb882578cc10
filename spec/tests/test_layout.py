"""Layouts: rules cover a spec exactly once, both directions come from the one table, row blocks equal the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec import Spec, params, parse
from spec.layout import (
    Add,
    Concat,
    ConcatGrouped,
    Interleave,
    Layout,
    RopeInterleave,
    Rule,
    Split,
    Stack,
    StackExperts,
    Transpose,
    rope_order,
)

Q, K, V = (f"layers.{{i}}.attn.{n}" for n in "qkv")


def spec(heads: int = 4, kv: int = 2, head_dim: int = 8, fraction: float = 1.0, **kw: Any) -> Spec:
    attention = {
        "heads": heads,
        "kv_heads": kv,
        "head_dim": head_dim,
        "bias": {"q": True, "k": True, "v": True},
        "position": {"kind": "rope", "fraction": fraction},
    }
    return parse(
        {
            "vocab_size": 24,
            "width": 12,
            "depth": 2,
            "context": 16,
            "block": {"attention": attention, "mlp": {"hidden": 20}},
            **kw,
        }
    )


def table(*attn: Rule) -> tuple[Rule, ...]:
    return (
        Rule("embed.weight", ("shard0", "shard1"), Split()),
        *attn,
        Rule("layers.{i}.attn.o.weight", "l.{i}.o", Transpose()),
        Rule(("layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight"), "l.{i}.gate_up", Interleave()),
        Rule("layers.{i}.mlp.down.weight", "l.{i}.down"),
        Rule(("layers.{i}.attn_norm.weight", "layers.{i}.mlp_norm.weight"), "l.{i}.norms", Stack()),
        Rule("final_norm.weight", "norm"),
        Rule("head.weight", "head", Transpose()),
    )


FUSED = {
    "concat": table(
        *(Rule((f"{Q}.{p}", f"{K}.{p}", f"{V}.{p}"), f"l.{{i}}.qkv.{p}", Concat()) for p in ("weight", "bias"))
    ),
    "concat-transposed": table(
        *(
            Rule((f"{Q}.{p}", f"{K}.{p}", f"{V}.{p}"), f"l.{{i}}.qkv.{p}", Concat(), Transpose())
            for p in ("weight", "bias")
        )
    ),
    "grouped": table(
        *(Rule((f"{Q}.{p}", f"{K}.{p}", f"{V}.{p}"), f"l.{{i}}.qkv.{p}", ConcatGrouped()) for p in ("weight", "bias"))
    ),
    "rope": table(
        *(Rule(f"{n}.{p}", f"l.{{i}}.{n[-1]}.{p}", RopeInterleave()) for p in ("weight", "bias") for n in (Q, K)),
        *(Rule(f"{V}.{p}", f"l.{{i}}.v.{p}") for p in ("weight", "bias")),
    ),
    "rope-grouped": table(
        *(
            Rule((f"{Q}.{p}", f"{K}.{p}", f"{V}.{p}"), f"l.{{i}}.qkv.{p}", RopeInterleave(), ConcatGrouped())
            for p in ("weight", "bias")
        )
    ),
}


def weights(s: Spec) -> dict[str, np.ndarray]:
    """Every value distinct, so that any misplaced row shows."""
    out, n = {}, 0
    for p in params(s):
        out[p.name] = np.arange(n, n + p.size, dtype=np.float32).reshape(p.shape)
        n += p.size
    return out


def outside(layout: Layout, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        n: v for b in layout.rules for n, v in zip(b.external, b.apply([w[p.name] for p in b.canonical]), strict=True)
    }


heads = st.sampled_from([(4, 4), (4, 2), (6, 3), (4, 1)])


@pytest.mark.parametrize("name", FUSED)
@given(h=heads, head_dim=st.sampled_from([4, 8, 12]), fraction=st.sampled_from([1.0, 0.5]))
@settings(max_examples=12, deadline=None)
def test_inverse_undoes_apply(name: str, h: tuple[int, int], head_dim: int, fraction: float) -> None:
    s = spec(*h, head_dim, fraction)
    layout, w = Layout(FUSED[name], s), weights(s)
    out = outside(layout, w)
    assert {n: v.shape for n, v in out.items()} == layout.external
    for b in layout.rules:
        for p, back in zip(b.canonical, b.inverse([out[n] for n in b.external]), strict=True):
            np.testing.assert_array_equal(back, w[p.name])


@pytest.mark.parametrize("name", FUSED)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_row_blocks_equal_the_whole_in_both_directions(name: str, data: st.DataObject) -> None:
    s = spec()
    layout, w = Layout(FUSED[name], s), weights(s)
    out = outside(layout, w)
    b = data.draw(st.sampled_from(layout.rules))
    p = data.draw(st.sampled_from(b.canonical))
    start = data.draw(st.integers(0, p.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, p.shape[0]))

    def fetch(n: str, a: int, z: int) -> np.ndarray:
        flat = out[n].reshape(-1, *out[n].shape[1:][-1:])
        assert 0 <= a < z <= len(flat)
        return flat[a:z]

    np.testing.assert_array_equal(layout.read(p.name, start, stop, fetch), w[p.name][start:stop])
    for run in layout.runs(p.name, start, stop):
        there = (out[run.tensor].T if b.transposed else out[run.tensor]).reshape(-1, *p.shape[1:])
        np.testing.assert_array_equal(there[run.start : run.start + len(run.take)], w[p.name][start:stop][run.take])


GATE, UP, DOWN = (f"layers.{{i}}.mlp.experts.{n}" for n in ("gate", "up", "down"))
EXPERTS: dict[str, tuple[Rule, ...]] = {
    "apart": tuple(
        Rule(f"{n}.{p}", f"l.{{i}}.experts.{{e}}.{n.split('.')[-1]}.{p}", Split())
        for n in (GATE, UP, DOWN)
        for p in ("weight", "bias")
    ),
    "stacked": tuple(
        rule
        for p in ("weight", "bias")
        for rule in (
            Rule((f"{GATE}.{p}", f"{UP}.{p}"), f"l.{{i}}.gate_up.{p}", StackExperts()),
            Rule(f"{DOWN}.{p}", f"l.{{i}}.down.{p}", StackExperts()),
        )
    ),
    "transposed": tuple(
        rule
        for p in ("weight", "bias")
        for rule in (
            Rule((f"{GATE}.{p}", f"{UP}.{p}"), f"l.{{i}}.gate_up.{p}", Interleave(), StackExperts(), Transpose()),
            Rule(f"{DOWN}.{p}", f"l.{{i}}.down.{p}", StackExperts(), Transpose()),
        )
    ),
}


def mixture(name: str, experts: int = 3) -> tuple[Layout, dict[str, np.ndarray]]:
    """Layers of which the first is dense, and their layout outside."""
    moe = {"kind": "moe", "experts": experts, "hidden": 5, "bias": True, "router": {"top_k": 1, "correction": True}}
    s = spec(
        block={"attention": {"heads": 4, "head_dim": 8}, "mlp": moe},
        overrides={"0": {"mlp": {"kind": "dense", "hidden": 20}}},
    )
    rules = table(
        *(Rule(f"{n}.weight", f"l.{{i}}.{n[-1]}") for n in (Q, K, V)),
        Rule("layers.{i}.mlp.router.weight", "l.{i}.router"),
        Rule("layers.{i}.mlp.router.correction", "l.{i}.correction", Stack()),
    )
    layout = Layout((*rules, *EXPERTS[name]), s)
    return layout, weights(s)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_lie_apart_stacked_or_transposed(name: str, experts: int) -> None:
    layout, w = mixture(name, experts)
    out = outside(layout, w)
    assert {n: v.shape for n, v in out.items()} == layout.external
    assert out["l.1.correction"].shape == (1, experts)
    gate, up, down = (w[f"layers.1.mlp.experts.{n}.weight"] for n in ("gate", "up", "down"))
    last = {n: v.reshape(experts, -1, v.shape[1])[-1] for n, v in (("gate", gate), ("up", up), ("down", down))}
    bias = w["layers.1.mlp.experts.up.bias"].reshape(experts, -1)[-1]
    if name == "apart":
        np.testing.assert_array_equal(out[f"l.1.experts.{experts - 1}.gate.weight"], last["gate"])
        np.testing.assert_array_equal(out[f"l.1.experts.{experts - 1}.up.bias"], bias)
    elif name == "stacked":
        np.testing.assert_array_equal(out["l.1.gate_up.weight"][-1], np.concatenate([last["gate"], last["up"]]))
        np.testing.assert_array_equal(out["l.1.down.weight"][-1], last["down"])
        np.testing.assert_array_equal(out["l.1.gate_up.bias"][-1, 5:], bias)
    else:
        np.testing.assert_array_equal(out["l.1.gate_up.weight"][-1][:, 0::2], last["gate"].T)
        np.testing.assert_array_equal(out["l.1.gate_up.weight"][-1][:, 1::2], last["up"].T)
        np.testing.assert_array_equal(out["l.1.down.weight"][-1], last["down"].T)
        np.testing.assert_array_equal(out["l.1.gate_up.bias"][-1, 1::2], bias)
    for b in layout.rules:
        for p, back in zip(b.canonical, b.inverse([out[n] for n in b.external]), strict=True):
            np.testing.assert_array_equal(back, w[p.name])


@pytest.mark.parametrize("name", EXPERTS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_row_blocks_of_experts_equal_the_whole(name: str, data: st.DataObject) -> None:
    layout, w = mixture(name)
    out = outside(layout, w)
    p = data.draw(st.sampled_from([p for b in layout.rules for p in b.canonical if ".mlp." in p.name]))
    start = data.draw(st.integers(0, p.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, p.shape[0]))

    def fetch(n: str, a: int, z: int) -> np.ndarray:
        flat = out[n].reshape(-1, *out[n].shape[1:][-1:])
        assert 0 <= a < z <= len(flat)
        return flat[a:z]

    np.testing.assert_array_equal(layout.read(p.name, start, stop, fetch), w[p.name][start:stop])


def test_rope_order_is_the_rotation_of_adjacent_pairs() -> None:
    # llama.cpp's convention: reshape(heads, 2, K/2).swapaxes(1, 2)
    x = np.arange(32)
    np.testing.assert_array_equal(x[rope_order(32, 8, 8)], x.reshape(4, 2, 4).swapaxes(1, 2).reshape(-1))
    assert rope_order(8, 8, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert rope_order(8, 8, 0).tolist() == list(range(8))


def test_grouped_rows_put_each_kv_head_behind_its_queries() -> None:
    s = spec(4, 2, 2)
    b = Layout(FUSED["grouped"], s).of["layers.0.attn.q.bias"]
    q, k, v = (np.array([f"{n}{r // 2}" for r in range(rows)]) for n, rows in (("q", 8), ("k", 4), ("v", 4)))
    assert b.apply([q, k, v])[0][::2].tolist() == ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]


def test_aligned_head_blocks_stay_consecutive() -> None:
    s = spec(4, 2, 8)
    layout = Layout(FUSED["rope"], s)
    assert [len(r.take) for r in layout.runs("layers.1.attn.q.weight", 8, 24)] == [16]


def test_rules_must_cover_every_parameter_once() -> None:
    s = spec()
    with pytest.raises(AssertionError, match="no rule for"):
        Layout(FUSED["concat"][:-1], s)
    with pytest.raises(AssertionError, match="claimed twice"):
        Layout((*FUSED["concat"], Rule("final_norm.weight", "again")), s)
    with pytest.raises(AssertionError, match="written twice"):
        Layout((*FUSED["concat"][:-1], Rule("head.weight", "norm")), s)


def test_an_added_constant_goes_out_and_does_not_come_back() -> None:
    s = spec()
    rules = (
        *(r for r in FUSED["concat"] if r.canonical != ("final_norm.weight",)),
        Rule("final_norm.weight", "norm", Add(1.0)),
    )
    b = Layout(rules, s).of["final_norm.weight"]
    np.testing.assert_array_equal(b.apply([np.zeros(12, np.float32)])[0], np.ones(12))
    with pytest.raises(AssertionError, match="does not come back"):
        b.inverse([np.ones(12, np.float32)])
