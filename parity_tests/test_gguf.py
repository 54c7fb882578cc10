"""llama.cpp against the oracle: every feature that it carries, every architecture of the table, every kind of level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.gguf.carriers import CARRIERS
from backends.gguf.fit import choose, examine
from backends.gguf.read import Artifact
from backends.gguf.runtime import load
from backends.gguf.support import support
from backends.gguf.twin import twin, twin_spec
from backends.numpy.model import Oracle
from backends.numpy.ops import NumpyOps
from convert import gates
from convert.verify.emulate import EmulatedOps, Typed, activation_type
from convert.verify.metrics import typical
from parity_tests.cases import BASE, FEATURES, PATCHES, nmse, random_ids, random_weights
from parity_tests.gguf_specs import spec_for, write_file
from spec import Spec, parse
from spec.config import merge

CARRIED = {
    "llama": "llama", "tied": "llama", "head_bias": "qwen2", "mha": "llama", "mqa": "llama", "odd_heads": "llama",
    "head_dim_free": "llama", "uneven_width": "llama", "qkv_bias": "llama", "all_bias": "llama",
    "rope_theta": "llama", "rope_partial": "llama", "rope_linear": "llama", "rope_dynamic": "llama",
    "rope_llama3": "llama", "rope_yarn": "llama", "rope_longrope": "llama", "rope_longrope_short": "llama",
    "local_theta": "step35", "nope_per_layer": "granite_swa", "alibi": "refact", "alibi_odd_heads": "refact",
    "rms_offset": "llama", "rms_no_weight": "llama", "layernorm": "stablelm", "layernorm_bias": "stablelm",
    "layernorm_no_weight": "stablelm", "norm_sandwich": "glm4", "attn_scale": "granite", "window": "granite_swa",
    "window_pattern": "granite_swa", "sinks": "granite_swa", "relu2": "arcee", "embed_scale": "granite",
    "residual_scale": "granite", "logit_scale": "granite", "gpt2": "gpt2", "olmo2": "olmo2",
    "moe": "llama", "moe_plain_scores": "step35", "moe_one": "step35", "moe_sigmoid": "step35",
    "moe_shared_gate": "qwen2moe",
}  # fmt: skip
"""Features that llama.cpp computes, and the architecture that does."""

RATIO = 2.0
"""Allowed over the float32 oracle's own error (measured: 0.4 to 0.9)."""
RATIO_OF_MIXTURES = gates.RATIO["graph"]
"""The same where there are experts, as verification allows it: single tokens near a router's tie amplify noise by
chance (measured: up to 2.7, and the median token's within RATIO)."""
TABLE_SHARE = 0.1
"""Where GELU is a float16 table: allowed share of what the table costs. Float32 noise sends an input now and then to
the other of two float16 neighbours, which moves one output by as much as the table's rounding does."""


def table_ops(dtype: Any = np.float64) -> NumpyOps:
    """The oracle with llama.cpp's float16 GELU table and nothing else."""
    return EmulatedOps(dtype, linears=False, kv="f32", tables=True)


def compare(spec: Spec, weights: Any, path: Path, ids: np.ndarray, graph: Spec | None = None) -> None:
    """Stock llama.cpp within RATIO of the float32 oracle's error, every position and batch row."""
    with load(path, exact=True, threads=1) as runtime:
        got = runtime.logits(ids)
    exact = Oracle(graph or spec, weights, ops=table_ops()).logits(ids)
    control = Oracle(graph or spec, weights, dtype=np.float32, ops=table_ops(np.float32)).logits(ids)
    mixture = any(b.mlp.kind == "moe" for b in spec.layers)
    ratio = RATIO
    if mixture:
        ratio = RATIO_OF_MIXTURES
        assert typical(got, exact) <= max(RATIO * typical(control, exact), 1e-13)
    allowed = max(ratio * nmse(control, exact), 1e-13)
    if any(b.mlp.activation == "gelu_tanh" for b in spec.layers):
        allowed = max(allowed, TABLE_SHARE * nmse(exact, Oracle(graph or spec, weights).logits(ids)))
    for row in range(len(ids)):
        assert nmse(got[row], exact[row]) <= allowed
    last = nmse(got[:, -4:], exact[:, -4:])  # where windows and long rotations show
    assert last <= 3 * allowed


@pytest.mark.parametrize("name", CARRIED)
def test_features_match_the_oracle_in_float32(name: str, tmp_path: Path) -> None:
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = write_file(spec, weights, tmp_path / "m.gguf")
    compare(spec, weights, path, random_ids(spec, 2, 47))


SEEDS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda c: c.arch)
def test_every_architecture_computes_what_its_row_says(carrier: Any, seed: int, tmp_path: Path) -> None:
    spec = spec_for(carrier, seed)
    fit = examine(spec, carrier)
    assert fit.refusals == ()
    weights = random_weights(spec, seed)
    for name, x in weights.items():  # no expert is chosen whose score is near nothing (see the floor below)
        weights[name] = x / np.float32(64) if name.endswith("router.correction") else x
    path = write_file(spec, weights, tmp_path / "m.gguf", fit=fit)
    compare(spec, weights, path, random_ids(spec, 2, 60, seed))


def test_the_floor_under_the_sum_of_weights_is_announced_and_fails_where_it_is_met(tmp_path: Path) -> None:
    """llama.cpp divides by at least 2^-14: experts that a correction alone chooses count for less than they should."""
    patch = {"score": "sigmoid", "correction": True}
    spec = parse(merge(merge(BASE, PATCHES["moe"]), {"block": {"mlp": {"router": patch}}}))
    assert any("2^-14" in note for note in support(spec, "f32").notes)
    weights = random_weights(spec)
    for name, x in weights.items():
        weights[name] = x + np.array([9, 8, 0, 0, 0], np.float32) if name.endswith("router.correction") else x
    path, ids = write_file(spec, weights, tmp_path / "m.gguf"), random_ids(spec, 1, 40)

    def error() -> float:
        with load(path, exact=True, threads=1) as runtime:
            return nmse(runtime.logits(ids), Oracle(spec, weights).logits(ids))

    assert error() < 1e-11
    for name, x in weights.items():
        weights[name] = x * 16 if name.endswith("router.weight") else x
    write_file(spec, weights, path)
    assert error() > 1e-4


@pytest.mark.parametrize("level", ["f16", "bf16", "q8", "q4", "q4_k_m", "q6_k", "q5_0", "iq4_xs"])
@pytest.mark.parametrize(
    "name", ["llama", "tied", "qkv_bias", "rope_partial", "window_pattern", "gpt2", "moe", "moe_sigmoid"]
)
def test_levels_match_the_oracle_on_dequantized_weights(name: str, level: str, tmp_path: Path) -> None:
    """Shipped arithmetic: the remaining error is small against what the runtime's own rounding of activations costs."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = write_file(spec, weights, tmp_path / "m.gguf", level)
    artifact = Artifact(path)
    ids = random_ids(spec, 1, 40)
    with load(path, exact=True, threads=1) as runtime:
        got = runtime.logits(ids)

    def typed(weight: str) -> Any:
        return Typed(artifact.weights(weight), activation_type(artifact.type(weight)))

    exact = Oracle(artifact.spec, artifact.weights).logits(ids)
    emulated = Oracle(artifact.spec, typed, ops=EmulatedOps(kv="f32")).logits(ids)
    rounding = nmse(emulated, exact)
    assert nmse(got, emulated) <= max(0.25 * rounding, 1e-12)
    assert nmse(got, exact) <= 2 * rounding + 1e-12


@pytest.mark.parametrize("level", ["f16", "q8", "q4", "q4_k_m"])
@pytest.mark.parametrize("name", ["rms_offset", "window_pattern", "local_theta", "gpt2_offset"])
def test_a_twin_computes_the_shipped_graph_without_rounding(name: str, level: str, tmp_path: Path) -> None:
    gpt2 = next(c for c in CARRIERS if c.arch == "gpt2")
    spec = spec_for(gpt2, 2) if name == "gpt2_offset" else FEATURES[name]
    write_file(spec, random_weights(spec), tmp_path / "m.gguf", level)
    path = twin(tmp_path / "m.gguf", tmp_path / "twin.gguf")
    small = Artifact(path, twin_spec(spec))
    assert {b.model_dump_json() for b in small.source.layers} == {b.model_dump_json() for b in spec.layers}
    compare(small.spec, small.weights, path, random_ids(small.source, 1, 47))


def test_a_cached_sequence_equals_one_pass(tmp_path: Path) -> None:
    spec = FEATURES["window_pattern"]
    path = write_file(spec, random_weights(spec), tmp_path / "m.gguf")
    ids = random_ids(spec, 1, 40)[0]
    with load(path, exact=True, threads=1) as runtime:
        whole = runtime.logits(ids[None])[0]
        first = runtime.prefill(ids[:9])
        rest = np.concatenate([runtime.step(ids[9:10]), runtime.step(ids[10:33]), runtime.step(ids[33:])])
    assert nmse(first, whole[8]) < 1e-12
    assert nmse(rest, whole[9:]) < 1e-12


def test_the_longrope_table_is_chosen_by_the_session(tmp_path: Path) -> None:
    """With an original context that is a multiple of 256, llama.cpp chooses as the oracle does."""
    half = 4
    spec = Spec.model_validate({
        "vocab_size": 64, "width": 32, "depth": 2, "context": 1024,
        "block": {
            "attention": {"heads": 4, "kv_heads": 2, "position": {"kind": "rope", "scaling": {
                "kind": "longrope", "original_context": 256,
                "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 3.0, 6.0, 9.0],
            }}},
            "mlp": {"hidden": 64},
        },
    })  # fmt: skip
    assert half * 2 == spec.layers[0].attention.head_dim
    weights, ids = random_weights(spec), random_ids(spec, 1, 120)
    path = write_file(spec, weights, tmp_path / "m.gguf")
    for context in (256, 512):
        with load(path, exact=True, threads=1, context=context) as runtime:
            got = runtime.logits(ids)
        assert nmse(got, Oracle(spec, weights, length=context).logits(ids)) < 1e-11
        other = Oracle(spec, weights, length=768 - context).logits(ids)
        assert nmse(got, other) > 1e-4


@pytest.mark.parametrize("arch", ["olmo2", "mellum"])
def test_yarn_of_whole_layers_does_not_reach_those_with_a_window(arch: str, tmp_path: Path) -> None:
    """OLMo 3's: where a graph says that layers with a window rotate plainly, the others' attention factor is theirs."""
    norm, mixture = {"over": "width"}, {"kind": "moe", "experts": 5, "hidden": 32, "router": {"top_k": 2}}
    block = {"placement": "post", "attention": {"qk_norm": norm}} if arch == "olmo2" else {
        "attention": {"qk_norm": {}}, "mlp": mixture,
    }  # fmt: skip
    yarn = {"position": {"kind": "rope", "scaling": {"kind": "yarn", "factor": 8.0, "original_context": 16}}}
    pattern = [{"attention": {"window": 6}}, {"attention": yarn}]
    spec = parse(merge(BASE, {"block": block, "pattern": pattern, "depth": 4, "head": {"tied": False}}))
    fit = examine(spec, next(c for c in CARRIERS if c.arch == arch))
    assert fit.refusals == ()
    weights = random_weights(spec)
    path = write_file(spec, weights, tmp_path / "m.gguf", fit=fit)
    compare(spec, weights, path, random_ids(spec, 2, 47))


def test_refused_features_stay_refused() -> None:
    others = {n: choose(s).refusals for n, s in FEATURES.items() if n not in CARRIED}
    refused = {n: sorted({r.split(":")[0] for r in found}) for n, found in others.items()}
    assert refused == {
        "learned": ["embedding.positions"],
        "learned_offset": ["embedding.positions"],
        "rms_eps": ["final_norm.eps"],
        "no_final_norm": ["final_norm"],
        "norm_post": ["block.placement"],
        "embed_norm": ["embedding.norm"],
        "qk_norm_head": ["block.attention.qk_norm.eps"],
        "qk_norm_width": ["block.attention.qk_norm"],
        "qk_layernorm": ["block.attention.qk_norm"],
        "attn_softcap": ["block.attention.softcap"],
        "clip": ["block.attention.clip"],
        "mlp_plain": ["block.mlp.activation"],
        "mlp_plain_bias": ["block.mlp.activation"],
        "gelu": ["block.mlp.activation"],
        "gelu_tanh": ["block.mlp.activation"],
        "quick_gelu": ["block.mlp.activation"],
        "clamped_swiglu": ["block.mlp.activation"],
        "parallel": ["block.parallel"],
        "parallel_shared": ["block.shared_norm"],
        "logit_softcap": ["head.softcap"],
        "gemma2": ["layers[0].attention.scale", "layers[1].attention.scale"],
        "qwen3": ["block.attention.qk_norm.eps"],
        "neox": ["block.mlp.activation"],
        "moe_sinks": ["layers[0].mlp.limit", "layers[1].mlp.limit"],
        "moe_ungated": ["block.mlp.activation"],
    }


def test_carried_features_keep_their_carrier() -> None:
    assert {n: choose(FEATURES[n]).carrier.arch for n in CARRIED} == CARRIED
