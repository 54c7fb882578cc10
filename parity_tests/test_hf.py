"""transformers against the oracle: every feature that it carries, every architecture of the table, every level."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch

import backends
from backends.base import content_hash
from backends.hf.carriers import BY_ARCH, CARRIERS, Carrier
from backends.hf.fit import choose, examine
from backends.hf.runtime import load
from backends.hf.support import levels, support
from backends.numpy.model import Oracle
from convert import gates
from convert.stream import rounded
from convert.verify.artifact import planned
from parity_tests import artifacts
from parity_tests.cases import BASE, FEATURES, PATCHES, nmse, random_ids, random_weights
from parity_tests.hf_specs import CARRIED, spec_for, write_folder
from spec import Spec, UserError, parse
from spec.config import merge

torch.set_num_threads(1)

REFUSED = {
    "head_bias": ["head.bias"],
    "learned": ["embedding.positions"],
    "learned_offset": ["embedding.positions"],
    "alibi": ["block.attention.position"],
    "alibi_odd_heads": ["block.attention.position"],
    "rms_eps": ["final_norm.eps"],
    "no_final_norm": ["final_norm"],
    "norm_post": ["block.placement"],
    "embed_norm": ["embedding.norm"],
    "qk_norm_head": ["block.attention.qk_norm.eps"],
    "qk_norm_width": ["block.attention.qk_norm"],
    "qk_layernorm": ["block.attention.qk_norm"],
    "attn_softcap": ["block.attention.softcap"],
    "clip": ["block.attention.clip"],
    "clamped_swiglu": ["block.mlp.activation"],
    "parallel": ["block.parallel"],
    "parallel_shared": ["block.shared_norm"],
    "logit_softcap": ["head.softcap"],
    "gemma2": ["layers[0].attention.scale", "layers[1].attention.scale"],
    "qwen3": ["block.attention.qk_norm.eps"],
    "moe_plain_scores": ["block.mlp.kind"],
    "moe_one": ["block.mlp.kind"],
    "moe_sigmoid": ["layers[1].mlp.kind"],
    "moe_ungated": ["block.mlp.kind"],
}
"""Features that no architecture has beside the rest of their spec, and the fields that a user is told."""


def test_carried_features_keep_their_carrier() -> None:
    assert {n: choose(s).carrier.arch for n, s in FEATURES.items() if not choose(s).refusals} == CARRIED


def test_refused_features_stay_refused() -> None:
    found = {n: sorted({r.split(":")[0] for r in choose(s).refusals}) for n, s in FEATURES.items() if n not in CARRIED}
    assert found == REFUSED


PROVED = [pytest.param(n, marks=pytest.mark.slow) if n in ("f16", "q4") else n for n in levels()]
"""Two levels go through the whole verification in test_hf_proof.py."""


@pytest.mark.parametrize("level", PROVED)
@pytest.mark.parametrize("name", CARRIED)
def test_features_match_the_oracle_in_float32(name: str, level: str, tmp_path: Path) -> None:
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = artifacts.write("hf", spec, weights, tmp_path / "m", level)
    artifacts.check_packing("hf", path, spec, weights, level)
    artifacts.check_graph("hf", path)


def within(got: np.ndarray, exact: np.ndarray, control: np.ndarray, depth: int) -> bool:
    """Whether float32 logits [..., T, V] stand the gate that a conversion's graph check has."""
    gate = gates.gate("graph", "f32", nmse(control, exact), layers=depth, positions=got.shape[-2])
    return gate.usable and nmse(got, exact) <= gate.limit


def compare(path: Path, tokens: int, **options: Any) -> None:
    """Float32 arithmetic against the float32 oracle's own error: whole batches, and cached."""
    artifact = artifacts.opened("hf", path)
    spec, weights = artifact.spec, artifacts.values(artifact)
    ids = random_ids(spec, 3, tokens)
    with load(path, exact=True, threads=1, **options) as runtime:
        length = artifact.session or runtime.context
        exact = Oracle(spec, weights, length=length).logits(ids)
        control = Oracle(spec, weights, np.float32, length).logits(ids)
        got = runtime.logits(ids)
        assert within(got, exact, control, spec.depth)
        for chunks in ([9, 1, 5, 1, tokens - 16], [1] * tokens):
            pieces, at = artifacts.chunked(runtime, ids[0], chunks)
            assert within(pieces, exact[0, at], control[0, at], spec.depth)


SEEDS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 16))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda c: c.arch)
def test_every_architecture_computes_what_its_row_says(carrier: Any, seed: int, tmp_path: Path) -> None:
    spec = spec_for(carrier, seed)
    fit = examine(spec, carrier)
    assert fit.refusals == ()
    weights = random_weights(spec, seed)
    level = levels()[seed % 5]
    path = write_folder(spec, weights, tmp_path / "m", level, fit)
    artifacts.check_packing("hf", path, spec, weights, level)
    for attention in (None, "eager"):
        compare(path, 63, attention=attention)


def crossed(carrier: Carrier, seed: int) -> list[tuple[str, Spec]]:
    """An architecture's spec with every feature laid over it, where the language admits that."""
    out = []
    for name, patch in PATCHES.items():
        data = spec_for(carrier, seed).model_dump(mode="json", exclude_unset=True)
        try:
            out.append((name, parse(merge(data, patch), name)))
        except UserError:
            continue
    return out


@pytest.mark.slow
@pytest.mark.parametrize("carrier", CARRIERS, ids=lambda c: c.arch)
def test_any_feature_on_any_architecture_is_carried_exactly_or_refused(carrier: Carrier, tmp_path: Path) -> None:
    count = 0
    for n, (name, spec) in enumerate(crossed(carrier, 2)):
        level = levels()[n % 5]
        if support(spec, level).ok:
            count += 1
            weights = random_weights(spec)
            path = artifacts.write("hf", spec, weights, tmp_path / name, level)
            artifacts.check_packing("hf", path, spec, weights, level)
            compare(path, 31)
    assert count >= 3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float64_leaves_nothing_but_float32_tables_and_softmax(attention: str, tmp_path: Path) -> None:
    """transformers keeps softmax, RMSNorm and rotary tables in float32; LayerNorm and learned positions do not hide
    behind them: there the whole error is softmax's, and sdpa has none."""
    spec, weights = FEATURES["gpt2"], random_weights(FEATURES["gpt2"])
    path = artifacts.write("hf", spec, weights, tmp_path / "m")
    ids = random_ids(spec, 2, 40)
    with load(path, dtype="f64", attention=attention) as runtime:
        got = runtime.model(torch.from_numpy(ids)).logits.detach().numpy()
    assert nmse(got, Oracle(spec, weights).logits(ids)) < (1e-27 if attention == "sdpa" else 1e-13)


def test_long_sequences_stay_within_the_gate(tmp_path: Path) -> None:
    """512 tokens, past a window and past the original context, where one unit in a rotary table begins to show."""
    scaling = {"kind": "llama3", "factor": 8.0, "original_context": 128}
    patch = {
        "context": 1024, "width": 64, "depth": 3,
        "block": {"attention": {"heads": 4, "head_dim": 16, "position": {"kind": "rope", "theta": 5e5,
                                                                          "scaling": scaling}}},
        "pattern": [{"attention": {"window": 100}}, {}],
    }  # fmt: skip
    spec = parse(merge(BASE, patch))
    path = artifacts.write("hf", spec, random_weights(spec), tmp_path / "m")
    assert artifacts.opened("hf", path).spec.layers[0].attention.window == 100
    compare_whole(path, 512)


def compare_whole(path: Path, tokens: int) -> None:
    artifact = artifacts.opened("hf", path)
    spec, weights = artifact.spec, artifacts.values(artifact)
    ids = random_ids(spec, 1, tokens)
    exact, control = (Oracle(spec, weights, t).logits(ids) for t in (np.float64, np.float32))
    with load(path, exact=True) as runtime:
        assert within(runtime.logits(ids), exact, control, spec.depth)
        pieces, at = artifacts.chunked(runtime, ids[0], [130, 1, 1, 90, tokens - 222])
    assert within(pieces, exact[0, at], control[0, at], spec.depth)


LONG = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 3.0, 6.0, 9.0]}


def _scaled(scaling: dict[str, Any], context: int = 48) -> Spec:
    attention = {"position": {"kind": "rope", "scaling": scaling}}
    return parse(merge(BASE, {"context": context, "block": {"attention": attention}}))


def test_longrope_is_chosen_by_the_session_and_by_stock_clients_by_the_length(tmp_path: Path) -> None:
    spec = _scaled({"kind": "longrope", "original_context": 16, **LONG})
    weights = random_weights(spec)
    path = artifacts.write("hf", spec, weights, tmp_path / "m")
    ids = random_ids(spec, 1, 40)
    assert artifacts.opened("hf", path).session is None
    for context, tokens in ((16, 14), (48, 14), (48, 40)):
        with load(path, exact=True, context=context) as runtime:
            assert ("rope" in runtime.info()) == (context > 16)
            got = runtime.logits(ids[:, :tokens])
        assert nmse(got, Oracle(spec, weights, length=context).logits(ids[:, :tokens])) < 1e-11
    stock = _stock(path)
    for tokens in (14, 40):  # as a session of its own length
        got = stock(torch.from_numpy(ids[:, :tokens]), use_cache=False).logits.detach().numpy()
        assert nmse(got, Oracle(spec, weights, length=tokens).logits(ids[:, :tokens])) < 1e-11
    assert "mixes both" in " ".join(support(spec, "f32").notes)


@pytest.mark.parametrize("original", [16, 48, 96])
def test_dynamic_scaling_is_fixed_for_sessions_of_the_context(original: int, tmp_path: Path) -> None:
    spec = _scaled({"kind": "dynamic", "factor": 2.0, "original_context": original})
    weights = random_weights(spec)
    path = artifacts.write("hf", spec, weights, tmp_path / "m")
    artifact = artifacts.opened("hf", path)
    assert artifact.session == (48 if original == 16 else None)
    assert any("session of 48 tokens" in n for n in support(spec, "f32").notes) == (original == 16)
    stock, ids = _stock(path), random_ids(spec, 1, 47)
    for tokens in (10, 47):
        got = stock(torch.from_numpy(ids[:, :tokens]), use_cache=False).logits.detach().numpy()
        assert nmse(got, Oracle(spec, weights, length=48).logits(ids[:, :tokens])) < 1e-11


def _stock(path: Path) -> Any:
    """What a user of transformers does."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoModelForCausalLM.from_pretrained(path).eval()


@pytest.mark.parametrize("level", ["f32", "q8", "q4"])
@pytest.mark.parametrize("name", ["llama", "tied", "window_pattern", "gpt2", "sinks", "norm_sandwich"])
def test_stock_generation_continues_as_the_oracle_does(name: str, level: str, tmp_path: Path) -> None:
    """transformers' own `generate`, greedy: the logits it chooses from are the oracle's, and it takes the largest."""
    spec = FEATURES[name]
    path = artifacts.write("hf", spec, random_weights(spec), tmp_path / "m", level)
    artifact = artifacts.opened("hf", path)
    prompt = torch.from_numpy(random_ids(spec, 1, 9))
    out = _stock(path).generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False,
                                pad_token_id=0, output_logits=True, return_dict_in_generate=True)  # fmt: skip
    ids, got = out.sequences.numpy(), torch.cat(out.logits).numpy()
    weights = artifacts.values(artifact)
    exact, control = (Oracle(spec, weights, t).logits(ids)[0, 8:-1] for t in (np.float64, np.float32))
    assert ids.shape == (1, 39) and np.array_equal(ids[0, 9:], got.argmax(-1))
    assert within(got, exact, control, spec.depth)


@pytest.mark.parametrize("level", ["q8", "q4"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "rope_partial", "neox"])
def test_codes_and_scales_come_back_under_one_hash(name: str, level: str, tmp_path: Path) -> None:
    """However they are stored: packed, widened beside a wider neighbour, or as floats."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = artifacts.write("hf", spec, weights, tmp_path / "m", level)
    artifact = artifacts.opened("hf", path)
    for p in planned(backends.get("hf"), spec, level):
        if p.level in ("q8", "q4"):
            want = rounded(p.name, p.level, 0, weights[p.name])
            blocks = [artifact.rows(p.name, a, min(a + 10, p.shape[0])) for a in range(0, p.shape[0], 10)]
            assert content_hash(blocks) == content_hash([want]), p.name


def test_each_architecture_is_the_choice_for_some_spec() -> None:
    """None is idle: among specs that use what its code has, it comes first for some; ERNIE computes nothing that Llama
    does not, nor Helium what Seed-OSS, nor Solar what GLM-4-MoE does not: they are there to be read."""
    assert len(BY_ARCH) >= 30
    alone = {c.arch for c in CARRIERS if any(choose(spec_for(c, s)).carrier is c for s in range(24))}
    assert alone == set(BY_ARCH) - {"ernie4_5", "helium", "solar_open"}


def test_every_parameter_of_a_loaded_model_comes_from_the_folder(tmp_path: Path) -> None:
    """Nothing is initialised afresh, nothing is left over."""
    from transformers import AutoModelForCausalLM

    for n, carrier in enumerate(CARRIERS):
        spec = spec_for(carrier, 1)
        path = write_folder(spec, random_weights(spec), tmp_path / str(n), "f32", examine(spec, carrier))
        auto: Any = AutoModelForCausalLM
        _, report = auto.from_pretrained(path, output_loading_info=True)
        assert not any(report.values()), carrier.arch
