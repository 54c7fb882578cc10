"""ONNX Runtime against the oracle: every feature of the language, both profiles, every level and kind of cache."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import backends
from backends.base import NotComparable, QuantizedTensor, content_hash
from backends.numpy.model import Oracle
from backends.onnx.kernels import Kernel, kernel
from backends.onnx.support import levels, support
from convert.quantize import quantize
from parity_tests.artifacts import EXACT, check_graph, check_packing, opened, write
from parity_tests.cases import BASE, FEATURES, PATCHES, nmse, random_ids, random_specs, random_weights
from parity_tests.checkpoints import llama
from spec import Spec, parse
from spec.config import merge
from spec.errors import SpecError

PROFILES = ("ort", "portable")


def wide(name: str, head_dim: int) -> Spec:
    """A feature with heads that GroupQueryAttention takes."""
    patch = merge(merge(merge(BASE, {"name": name}), PATCHES[name]), {"block": {"attention": {"head_dim": head_dim}}})
    scaling = (patch["block"]["attention"].get("position") or {}).get("scaling") or {}
    if scaling.get("kind") == "longrope":
        half = range(head_dim // 2)
        scaling |= {"short_factor": [1 + 0.1 * i for i in half], "long_factor": [1 + 0.9 * i for i in half]}
    return parse(patch, name)


def proved(spec: Spec, path: Path, level: str = "f32", **options: Any) -> None:
    """Packing and graph of a spec with random weights."""
    weights = random_weights(spec)
    write("onnx", spec, weights, path, level, **options)
    check_packing("onnx", path, spec, weights, level)
    check_graph("onnx", path, threads=1)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_matches_the_oracle(name: str, profile: str, tmp_path: Path) -> None:
    proved(FEATURES[name], tmp_path / "m", profile=profile)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_the_sources_function(name: str, profile: str, tmp_path: Path) -> None:
    """Nothing of the artifact's own: the source's spec and weights against the folder that runs."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path, ids = (
        write("onnx", spec, weights, tmp_path / "m", profile=profile),
        random_ids(spec, 1, spec.context - 1),
    )
    with backends.load(path, exact=True, threads=1) as runtime:
        assert nmse(runtime.logits(ids), Oracle(spec, weights).logits(ids)) <= EXACT


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_matches_the_oracle_in_the_fused_attention(name: str, tmp_path: Path) -> None:
    spec = wide(name, 32)
    kinds = {kernel(b.attention, "ort") for b in spec.layers}
    assert kinds == ({Kernel.DECOMPOSED} if "alibi" in name else {Kernel.GROUPED})
    proved(spec, tmp_path / "m")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("level", ["bf16", "f16", "q8", "q4"])
@pytest.mark.parametrize("name", ["llama", "tied", "all_bias", "gpt2", "gemma2", "uneven_width", "odd_heads"])
def test_levels_match_the_oracle_on_dequantized_weights(name: str, level: str, profile: str, tmp_path: Path) -> None:
    proved(FEATURES[name], tmp_path / "m", level, profile=profile)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(("level", "compute"), [("f16", "f16"), ("q4", "f16"), ("bf16", "bf16"), ("q8", "bf16")])
@pytest.mark.parametrize("name", ["gemma2", "clamped_swiglu", "alibi", "sinks", "qwen3", "layernorm_bias", "odd_heads"])
def test_graphs_of_16_bits_are_exact_in_float32(
    name: str, level: str, compute: str, profile: str, tmp_path: Path
) -> None:
    proved(FEATURES[name], tmp_path / "m", level, profile=profile, compute=compute)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "patch", [{}, {"window": 100}, {"softcap": 5.0, "sinks": True}, {"position": {"kind": "alibi"}}]
)
def test_long_sequences_match_the_oracle(patch: dict[str, Any], profile: str, tmp_path: Path) -> None:
    """Past the window, over a chunk's end, and past where the caches grow."""
    spec = llama(context=600, depth=1, block={"attention": patch})
    weights, ids = random_weights(spec), random_ids(spec, 2, 590)
    write("onnx", spec, weights, tmp_path / "m", profile=profile)
    with backends.load(tmp_path / "m", "onnx", exact=True, threads=1) as runtime:
        whole = runtime.logits(ids)
        runtime.prefill(ids[0, :250])
        chunk, one = runtime.step(ids[0, 250:589]), runtime.step(ids[0, 589:])
    exact = Oracle(spec, weights).logits(ids)
    for got, want in (
        (whole, exact),
        (whole[:, -4:], exact[:, -4:]),
        (chunk, exact[0, 250:589]),
        (one, exact[0, 589:]),
    ):
        assert nmse(got, want) <= EXACT


@pytest.mark.parametrize("level", ["q8", "q4"])
def test_codes_and_scales_are_the_canonical_ones_in_every_container(level: str, tmp_path: Path) -> None:
    spec = FEATURES["tied"]
    weights = random_weights(spec)
    for profile in PROFILES:
        write("onnx", spec, weights, tmp_path / profile, level, profile=profile)
    for name in ("embed.weight", "layers.1.mlp.down.weight", "layers.0.attn.q.weight"):
        got = [opened("onnx", tmp_path / p).rows(name, 0, len(weights[name])) for p in PROFILES]
        assert all(isinstance(q, QuantizedTensor) for q in got)
        bits = {q.bits for q in got if isinstance(q, QuantizedTensor)}.pop()
        assert {content_hash([q]) for q in got} == {content_hash([quantize(weights[name], bits)])}


def test_a_session_of_fixed_rotary_tables_says_so(tmp_path: Path) -> None:
    for name in ("rope_dynamic", "rope_longrope"):
        write("onnx", FEATURES[name], random_weights(FEATURES[name]), tmp_path / name)
        assert opened("onnx", tmp_path / name).session == 48
        assert any("session of 48" in note for note in support(FEATURES[name], "f32").notes)
    write("onnx", FEATURES["rope_yarn"], random_weights(FEATURES["rope_yarn"]), tmp_path / "yarn")
    assert opened("onnx", tmp_path / "yarn").session is None


def test_a_graph_that_computes_in_bfloat16_is_not_comparable_on_a_cpu(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    write("onnx", spec, random_weights(spec), tmp_path / "m", "q4", compute="bf16")
    with pytest.raises(NotComparable, match="needs CUDA"):
        backends.load(tmp_path / "m")


def test_nothing_is_refused_but_a_second_rounding() -> None:
    refused = {
        (level, compute)
        for level in levels()
        for compute in ("f32", "f16", "bf16")
        for profile in PROFILES
        if any(not support(spec, level, profile=profile, compute=compute).ok for spec in FEATURES.values())
    }
    assert refused == {("f32", "f16"), ("f32", "bf16"), ("bf16", "f16"), ("f16", "bf16")}


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    random_specs(),
    st.sampled_from(PROFILES),
    st.sampled_from(["f32", "bf16", "f16", "q8", "q4"]),
    st.sampled_from(["f32", "f16", "bf16"]),
    st.sampled_from([None, 16, 32]),
)
def test_random_specs_match_the_oracle(
    spec: Spec, profile: str, level: str, compute: str, head_dim: int | None
) -> None:
    if head_dim is not None:
        data = spec.model_dump(mode="json", exclude_unset=True)
        with contextlib.suppress(SpecError):  # longrope's factors go with their own head_dim
            spec = parse(merge(data, {"block": {"attention": {"head_dim": head_dim}}}))
    if support(spec, level, profile=profile, compute=compute).ok:
        with tempfile.TemporaryDirectory() as folder:
            proved(spec, Path(folder) / "m", level, profile=profile, compute=compute)


def test_rows_of_a_batch_do_not_touch_each_other(tmp_path: Path) -> None:
    spec = wide("window", 16)
    write("onnx", spec, random_weights(spec), tmp_path / "m")
    ids = random_ids(spec, 3, 30)
    with backends.load(tmp_path / "m", exact=True, threads=1) as runtime:
        together = runtime.logits(ids)
        alone = np.concatenate([runtime.logits(row[None]) for row in ids])
    assert nmse(together, alone) < 1e-12
