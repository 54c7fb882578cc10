"""MLX against the oracle: every feature at every level, in our own runtime and in mlx-lm's loader."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

pytest.importorskip("mlx.core")

import backends
from backends.base import QuantizedTensor, content_hash
from backends.mlx.levels import NATIVE, computes
from backends.mlx.support import support
from backends.numpy.model import Oracle
from convert import gates
from convert.verify.numeric import emulate_dtype
from parity_tests.artifacts import EXACT, check_graph, check_packing, chunked, opened, values, write
from parity_tests.cases import BASE, FEATURES, nmse, random_ids, random_specs, random_weights
from spec import Spec, parse
from spec.config import merge
from spec.params import params

OURS = {
    "head_bias", "local_theta", "learned", "learned_offset", "alibi", "alibi_odd_heads", "rms_eps", "no_final_norm",
    "norm_post", "norm_sandwich", "embed_norm", "qk_norm_head", "qk_norm_width", "qk_layernorm", "attn_softcap", "clip",
    "window", "sinks", "mlp_plain", "mlp_plain_bias", "gelu", "gelu_tanh", "quick_gelu", "relu2", "clamped_swiglu",
    "parallel", "parallel_shared", "logit_softcap", "gpt2", "gemma2", "qwen3", "neox",
    "moe_plain_scores", "moe_one", "moe_sigmoid", "moe_sinks", "moe_ungated",
}  # fmt: skip
"""Features that no architecture of mlx-lm computes exactly: they go with the bundled model.py."""

LONG = {
    name: parse(merge(BASE, {
        "context": 640, "depth": 3, "pattern": [{"attention": {"window": 64}}, {}], "block": {"attention": {
            **more, "position": {"kind": "rope", "scaling": {"kind": "yarn", "factor": 4.0, "original_context": 160}},
        }},
    }))
    for name, more in (("native", {}), ("bundled", {"softcap": 5.0, "sinks": True}))
}  # fmt: skip
"""Windows and a rope scaling whose boundaries lie far inside the context."""

PAIRS = [(level, compute) for level in ("f16", "bf16", "q8", "q4") for compute in computes(level)]
QUICK = ("tied", "odd_heads", "all_bias", "rope_longrope", "alibi", "qk_norm_width", "attn_softcap", "window_pattern",
         "sinks", "clamped_swiglu", "gpt2", "gemma2", "learned_offset", "uneven_width")  # fmt: skip
"""A choice that meets every code path; the others at every level take a minute."""
SLOW = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FEATURES]


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_exact_in_float32(name: str, tmp_path: Path) -> None:
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = write("mlx", spec, weights, tmp_path / "m")
    check_packing("mlx", path, spec, weights, "f32")
    check_graph("mlx", path)


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_the_sources_function(name: str, tmp_path: Path) -> None:
    """Nothing of the artifact's own: the source's spec and weights against the folder that runs."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path, ids = write("mlx", spec, weights, tmp_path / "m"), random_ids(spec, 1, spec.context - 1)
    with backends.load(path, exact=True) as runtime:
        assert nmse(runtime.logits(ids), Oracle(spec, weights).logits(ids)) <= EXACT


def test_features_keep_their_carrier() -> None:
    assert {n for n, s in FEATURES.items() if support(s, "f32").carrier == "model.py"} == OURS
    assert not [n for n, s in FEATURES.items() if not support(s, "q4").ok]


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize(("level", "compute"), PAIRS, ids=["-".join(p) for p in PAIRS])
def test_levels_are_packed_and_computed_within_the_gates(name: str, level: str, compute: str, tmp_path: Path) -> None:
    """Packing bit for bit, the graph in float32, and the stock arithmetic whole and in chunks."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = write("mlx", spec, weights, tmp_path / "m", level, compute=compute)
    check_packing("mlx", path, spec, weights, level)
    if compute == computes(level)[0]:
        check_graph("mlx", path, batches=(3,))
    check_arithmetic(path, compute)


def check_arithmetic(path: Path, compute: str) -> None:
    """Stock settings within the gate of verification, whole and in pieces; mixtures by the median token too, which no
    single token near a router's tie hides, and by it alone where rounding may turn experts."""
    artifact = opened("mlx", path)
    spec, ids = artifact.spec, random_ids(artifact.spec, 1, min(40, artifact.spec.context - 1))
    assert artifact.arithmetic.compute == artifact.arithmetic.cache == compute
    length = artifact.session or spec.context
    emulation = emulate_dtype(spec, values(artifact), ids, length, artifact.arithmetic)
    with backends.load(path) as runtime:
        whole = runtime.logits(ids)
        pieces, at = chunked(runtime, ids[0], [9, 1, 5, 1, ids.size - 16])
    emulations = [emulation]
    if emulation.certain and any(b.mlp.kind == "moe" for b in spec.layers):
        emulations.append(replace(emulation, certain=False))
    for e in emulations:
        gate = gates.gate("arithmetic", compute, e.control(ids.size), layers=spec.depth, positions=ids.size)
        assert gate.usable
        assert e.measure(whole, e.exact) <= gate.limit
        assert e.measure(pieces, e.exact[0, at]) <= gate.limit


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("name", ["tied", "gpt2", "uneven_width"])
def test_mlx_levels_are_what_mlx_quantizes(name: str, level: str, tmp_path: Path) -> None:
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = write("mlx", spec, weights, tmp_path / "m", level)
    check_packing("mlx", path, spec, weights, level)
    check_graph("mlx", path, batches=(1,))
    check_arithmetic(path, computes(level)[0])


@pytest.mark.parametrize("level", ["q8", "q4"])
def test_one_hash_whatever_the_compute_dtype_and_the_carrier(level: str, tmp_path: Path) -> None:
    """Codes and scales are the portable ones in every folder: native rows in another order too."""
    hashes = set()
    for name in ("rope_partial", "rope_partial_bundled"):
        spec = FEATURES["rope_partial"]
        if name.endswith("bundled"):
            spec = parse(merge(spec.model_dump(exclude_unset=True), {"head": {"softcap": 1e9}}))
        weights = random_weights(spec)
        for compute in computes(level):
            path = write("mlx", spec, weights, tmp_path / f"{name}-{compute}", level, compute=compute)
            artifact = opened("mlx", path)
            found = {p.name: artifact.rows(p.name, 0, p.shape[0]) for p in params(spec) if p.matrix}
            assert all(isinstance(x, QuantizedTensor) for x in found.values())
            hashes.add(tuple(content_hash([x]) for x in found.values()))
    assert len(hashes) == 1


@pytest.mark.parametrize("name", LONG)
def test_five_hundred_tokens_stay_exact(name: str, tmp_path: Path) -> None:
    """Past windows, past the rope scaling's boundary, past the runtime's own chunks; our runtime and mlx-lm."""
    spec = LONG[name]
    path = write("mlx", spec, random_weights(spec), tmp_path / "m")
    artifact = opened("mlx", path)
    ids = random_ids(spec, 1, 600)
    exact = Oracle(artifact.spec, values(artifact)).logits(ids)[0]
    beyond = 4 * nmse(Oracle(artifact.spec, values(artifact), np.float32).logits(ids)[0, 512:], exact[512:])
    with backends.load(path, exact=True) as runtime:
        runs = [runtime.logits(ids)[0]]
        stepped, at = chunked(runtime, ids[0], PIECES)
        runs.append(np.concatenate([runs[0][: at.start], stepped]))
    runs.append(in_mlx_lm(path, ids))
    for run in runs:
        assert nmse(run[:512], exact[:512]) <= EXACT
        assert nmse(run[512:], exact[512:]) <= beyond


PIECES = [63, 1, 1, 63, 64, 65, 255, 1, 87]


def in_mlx_lm(path: Path, ids: NDArray[Any]) -> NDArray[Any]:
    """mlx-lm's logits in pieces through its caches: [1, T] ids to [T, V]."""
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(path, trust_remote_code=(path / "model.py").exists())
    caches = make_prompt_cache(model)
    starts = np.cumsum([0, *PIECES]).tolist()
    return np.concatenate([
        np.array(model(mx.array(ids[:, a:b]), cache=caches))[0] for a, b in pairwise(starts)
    ])  # fmt: skip


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(spec=random_specs())
def test_any_combination_is_exact(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("m") / "m"
    weights: dict[str, NDArray[np.float32]] = random_weights(spec)
    write("mlx", spec, weights, path)
    check_packing("mlx", path, spec, weights, "f32")
    check_graph("mlx", path, length=31)
    mixture = any(b.mlp.kind == "moe" for b in spec.layers)
    for level in ("q4", "bf16"):
        compute = "f32" if mixture else computes(level)[0]  # 16 bits turn experts of some random router for certain
        quantized = write("mlx", spec, weights, path.with_name(level), level, compute=compute)
        check_packing("mlx", quantized, spec, weights, level)
        check_arithmetic(quantized, compute)
