"""Random specs as plain data: every field of the language, in any combination that holds."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Data = dict[str, Any]
Strategy = st.SearchStrategy[Data]

positive = st.floats(min_value=1e-7, max_value=1e6, allow_nan=False)
probability = st.floats(min_value=0, max_value=0.9)


NAME = r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]{1,20}"
"""What a spec may be called."""


def some(**fields: st.SearchStrategy[Any]) -> Strategy:
    """Any subset of the fields."""
    return st.fixed_dictionaries({}, optional=fields)


def norms(**more: st.SearchStrategy[Any]) -> Strategy:
    """Weight and offset are both said, or neither, so that one patch laid over another still holds."""
    gain = st.sampled_from([{"weight": True, "offset": 1.0}, {"weight": False, "offset": 0}, {}])
    rest = some(kind=st.sampled_from(["rmsnorm", "layernorm"]), eps=positive, bias=st.booleans(), **more)
    return st.builds(lambda a, b: {**a, **b}, rest, gain)


def scalings(pairs: int) -> Strategy:
    factor = st.floats(min_value=1, max_value=64)
    divisors = st.lists(positive, min_size=pairs, max_size=pairs)
    kind = {name: st.just(name) for name in ("linear", "dynamic", "llama3", "yarn", "longrope")}
    options = [
        st.fixed_dictionaries({"kind": kind["linear"], "factor": factor}),
        st.fixed_dictionaries(
            {"kind": kind["llama3"], "factor": factor},
            optional={
                "low_freq_factor": st.just(1),
                "high_freq_factor": st.just(4.0),
                "original_context": st.just(512),
            },
        ),
        st.fixed_dictionaries(
            {"kind": kind["yarn"], "factor": factor},
            optional={"original_context": st.just(64), "attention_factor": positive, "truncate": st.booleans()},
        ),
        st.fixed_dictionaries(
            {
                "kind": kind["longrope"],
                "short_factor": divisors,
                "long_factor": divisors,
                "original_context": st.just(32),
            },
            optional={"attention_factor": positive},
        ),
    ]
    if pairs > 1:
        options.append(st.fixed_dictionaries({"kind": kind["dynamic"], "factor": factor}))
    return st.one_of(options)


def positions(head_dim: int) -> Strategy:
    rope = st.fixed_dictionaries(
        {"kind": st.just("rope"), "fraction": st.just(1.0)},
        optional={"theta": st.floats(min_value=2, max_value=1e7), "scaling": st.none() | scalings(head_dim // 2)},
    )
    half = st.just({"kind": "rope", "fraction": 0.5, "scaling": None})
    alibi = st.fixed_dictionaries({"kind": st.just("alibi")}, optional={"max_bias": positive})
    none = st.just({"kind": "none"})
    return st.one_of(rope, alibi, none, *([half] if head_dim % 4 == 0 else []))


def biases(*names: str) -> st.SearchStrategy[Any]:
    return st.booleans() | some(**{n: st.booleans() for n in names})


def attentions(head_dim: int) -> Strategy:
    return some(
        window=st.none() | st.integers(1, 64),
        scale=positive,
        softcap=positive,
        clip=positive,
        sinks=st.booleans(),
        dropout=probability,
        position=positions(head_dim),
        bias=biases("q", "k", "v", "o"),
        qk_norm=st.none() | norms(over=st.sampled_from(["head", "width"])),
    )


def mlps() -> Strategy:
    plain = st.fixed_dictionaries(
        {"gated": st.booleans(), "activation": st.sampled_from(["silu", "gelu", "gelu_tanh", "relu2"])},
        optional={"bias": biases("gate", "up", "down"), "dropout": probability, "hidden": st.integers(1, 64)},
    )
    clamped = st.fixed_dictionaries(
        {"activation": st.just("clamped_swiglu"), "gated": st.just(True)},
        optional={"alpha": positive, "limit": positive},
    )
    return plain | clamped


def mixtures() -> Strategy:
    router = st.fixed_dictionaries(
        {"top_k": st.integers(1, 3)},
        optional={"score": st.sampled_from(["softmax", "sigmoid"]), "renormalise": st.booleans(), "scale": positive,
                  "bias": st.booleans(), "correction": st.booleans()},
    )  # fmt: skip
    shared = st.none() | st.fixed_dictionaries({"hidden": st.integers(1, 64)}, optional={"gate": st.booleans()})
    return st.fixed_dictionaries(
        {"kind": st.just("moe"), "hidden": st.integers(1, 64), "experts": st.integers(3, 9), "router": router},
        optional={"shared": shared, "gated": st.booleans(), "bias": biases("gate", "up", "down")},
    )


@st.composite
def patches(draw: st.DrawFn, head_dim: int) -> Data:
    """Part of a block, as `pattern` and `overrides` hold it."""
    return draw(some(
        attention=attentions(head_dim), mlp=mlps() | mixtures(), norm=norms(), residual_scale=st.floats(-2, 2),
        dropout=probability, placement=st.sampled_from(["pre", "post", "sandwich"]),
    ))  # fmt: skip


@st.composite
def specs(draw: st.DrawFn) -> Data:
    """A spec that holds, as a YAML file would say it."""
    kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6, 8]))
    depth = draw(st.integers(1, 5))
    block = draw(patches(head_dim))
    attention = {"heads": kv_heads * group, "kv_heads": kv_heads, "head_dim": head_dim}
    block["attention"] = {**block.get("attention", {}), **attention}
    block["mlp"] = {"hidden": 8, **block.get("mlp", {})}
    parallel = draw(st.sampled_from([{}, {"parallel": True}, {"parallel": True, "shared_norm": True}]))
    if parallel.get("shared_norm"):
        block["placement"] = "pre"
    data: Data = {
        "vocab_size": draw(st.integers(1, 100)), "width": draw(st.integers(1, 64)), "depth": depth,
        "context": draw(st.integers(2, 128)), "block": {**block, **parallel},
    }  # fmt: skip
    if not parallel.get("shared_norm"):
        data |= draw(some(pattern=st.lists(patches(head_dim), min_size=1, max_size=depth)))
        layers = st.sampled_from([str(depth - 1), "-1", f"0..{depth - 1}"])
        data |= draw(some(overrides=st.dictionaries(layers, patches(head_dim), max_size=2)))
    position_table = some(offset=st.integers(0, 3))
    data |= draw(some(
        name=st.from_regex(NAME, fullmatch=True),
        embedding=some(
            scale=positive, positions=st.none() | position_table, norm=st.none() | norms(), dropout=probability
        ),
        final_norm=st.none() | norms(),
        head=some(tied=st.booleans(), bias=st.booleans(), scale=positive, softcap=positive),
        init=some(std=positive, embed_std=positive, depth_scaled=st.booleans()),
    ))  # fmt: skip
    return data
