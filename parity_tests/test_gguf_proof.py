"""Every spec feature that llama.cpp carries, at every kind of level, through the checks that guard a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")

from backends.gguf.support import support
from convert.pipeline import convert
from convert.sources import open_source
from convert.verify.gguf import Door
from convert.verify.report import Status
from convert.verify.run import Session
from parity_tests.cases import BASE, FEATURES, PATCHES
from parity_tests.checkpoints import llama, write_checkpoint
from spec import Spec, parse
from spec.config import merge

LEVELS = ("f32", "f16", "q8", "q4", "q4_k_m")


def _moe(experts: int, **router: Any) -> dict[str, Any]:
    return {"kind": "moe", "experts": experts, "hidden": 256, "router": {"top_k": 2, **router}}


WIDE: dict[str, Spec] = {
    "wide": llama(),
    "wide_gelu": llama(block={"mlp": {"activation": "gelu_tanh", "gated": False}}),
    "wide_moe": llama(block={"mlp": _moe(8)}),
    "wide_moe_sigmoid": llama(
        depth=3,
        block={"mlp": _moe(6, score="sigmoid", correction=True, scale=2.5) | {"shared": {"hidden": 256}}},
        overrides={"0": {"mlp": {"kind": "dense", "hidden": 512}}},
    ),
    "wide_moe_oai": llama(
        block={
            "attention": {"sinks": True, "bias": True},
            "mlp": _moe(4, bias=True) | {"activation": "clamped_swiglu", "bias": True},
        },
        pattern=[{"attention": {"window": 9}}, {}],
    ),
}
"""Wide enough for blocks of 256."""


def _rope(scaling: dict[str, Any], context: int = 1024) -> Spec:
    attention = {"position": {"kind": "rope", "scaling": scaling}}
    return parse(merge(BASE, {"context": context, "block": {"attention": attention}}))


FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 2.0, 4.0, 7.5]}
ODD: dict[str, Spec] = {
    "dynamic_fixed": _rope({"kind": "dynamic", "factor": 4.0, "original_context": 256}),
    "longrope_fixed": _rope({"kind": "longrope", "original_context": 500, **FACTORS}),
    "longrope_chosen": _rope({"kind": "longrope", "original_context": 512, **FACTORS}),
    "deep": parse(
        merge(
            BASE,
            {
                "depth": 64,
                "head": {"tied": True, "scale": 0.25},
                "final_norm": {"kind": "layernorm"},
                "block": {"norm": {"kind": "layernorm"}, "parallel": True, "shared_norm": True},
            },
        )
    ),
}
"""Rotary tables that are fixed in the file for sessions longer than the check's; a graph that another carrier would
compute at the twin's depth."""
SPECS = {**FEATURES, **WIDE, **ODD}


def carried() -> list[object]:
    """Every pair of feature and level that llama.cpp takes."""
    out: list[object] = []
    for name, spec in SPECS.items():
        for level in LEVELS:
            if support(spec, level).ok:
                out.append(pytest.param(name, level, id=f"{name}-gguf-{level}"))
    return out


@pytest.mark.parametrize(("feature", "level"), carried())
def test_the_artifact_is_proved(feature: str, level: str, tmp_path: Path) -> None:
    spec = SPECS[feature]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", spec, tokenizer=False)
    convert(checkpoint, "gguf", level, tmp_path / "out.gguf", verify=False)
    source = open_source(checkpoint)
    session = Session(source, Door().open_artifact(tmp_path / "out.gguf", spec, level, 1), level)
    for check in (session.packing(), session.graph(), session.arithmetic(), session.invariants()):
        assert check.status is Status.PASS, check
    graph = session.graph()
    assert graph.gate is not None and graph.gate < 1e-8, "a gate that sees every structural bug"


def test_most_features_are_carried() -> None:
    """The proof above is empty for what is refused; a regression that refuses everything must show."""
    assert sum(support(FEATURES[n], "q4").ok for n in PATCHES) >= 36
