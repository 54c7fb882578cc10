"""Sessions of a package in the interpreter: bounds, messages, the decode function, counts beyond float16."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

import backends
from backends.coreml.read import open_artifact
from backends.coreml.runtime import CHUNK, load
from backends.coreml.support import cache_shape
from backends.numpy.model import Oracle
from parity_tests import artifacts
from parity_tests.cases import BASE, FEATURES, nmse, random_ids, random_weights
from spec import Spec, parse
from spec.config import merge
from spec.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="the stock runtime is Apple's there")


def made(path: Path, spec: Spec, level: str = "f32", **options: Any) -> Path:
    return artifacts.write("coreml", spec, random_weights(spec), path / "m.mlpackage", level, **options)


def test_a_session_keeps_its_bounds(tmp_path: Path) -> None:
    path = made(tmp_path, FEATURES["llama"])
    with backends.load(path, context=16) as runtime:
        assert runtime.context == 16
        with pytest.raises(UserError, match="no sequence to continue"):
            runtime.step(np.array([1]))
        with pytest.raises(UserError, match="17 tokens exceed the session's context of 16"):
            runtime.logits(np.zeros((1, 17), int))
        with pytest.raises(UserError, match="beyond the vocabulary of 97"):
            runtime.prefill(np.array([97]))
        with pytest.raises(UserError, match=r"\[T\] is needed"):
            runtime.prefill(np.array([], int))
        runtime.prefill(np.zeros(10, int))
        with pytest.raises(UserError, match="17 tokens exceed"):
            runtime.step(np.zeros(7, int))
        assert runtime.step(np.zeros(6, int)).shape == (6, 97)
        runtime.logits(np.zeros((2, 3), int))
        with pytest.raises(UserError, match="no sequence to continue"):
            runtime.step(np.array([1]))
    for context, threads in ((49, 1), (0, 1), (48, 0)):
        with pytest.raises(UserError, match="must be"):
            load(path, context=context, threads=threads)


def test_the_runtime_says_that_it_is_emulated(tmp_path: Path) -> None:
    path = made(tmp_path, FEATURES["llama"], "q4")
    with load(path) as runtime:
        info = runtime.info()
        assert info["device"] == "interpreter (emulated)" and info["precision"] == "f16, states f16"
    assert open_artifact(path).arithmetic.emulated


def test_a_prefill_starts_over(tmp_path: Path) -> None:
    ids = random_ids(FEATURES["window"], 1, 20)[0]
    with load(made(tmp_path, FEATURES["window"]), exact=True) as runtime:
        first = runtime.prefill(ids)
        runtime.step(ids[:5])
        assert np.array_equal(runtime.prefill(ids), first)


def test_two_functions_share_weights_and_states(tmp_path: Path) -> None:
    """Prefill, then one token at a time: decode continues prefill's states, and the weights lie in the file once."""
    spec = FEATURES["gemma2"]
    one = artifacts.write("coreml", spec, random_weights(spec), tmp_path / "one.mlpackage", "q4")
    two = artifacts.write("coreml", spec, random_weights(spec), tmp_path / "two.mlpackage", "q4", functions="two")
    sizes = [(p / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size for p in (one, two)]
    assert sizes[0] == sizes[1]
    found = open_artifact(two).functions
    assert sorted(found) == ["decode", "prefill"] and open_artifact(two).default == "prefill"
    assert found["decode"].inputs[0].shape == (1, 1) and found["prefill"].inputs[0].shape == (1, None)
    assert found["decode"].states == found["prefill"].states
    ids = random_ids(spec, 1, 30)[0]
    with load(one) as a, load(two) as b:
        assert np.array_equal(a.prefill(ids[:11]), b.prefill(ids[:11]))
        for i in range(11, 28):
            assert np.array_equal(a.step(ids[i : i + 1]), b.step(ids[i : i + 1]))
        assert np.array_equal(a.step(ids[28:]), b.step(ids[28:]))
    artifacts.check_graph("coreml", two)


def test_positions_are_exact_beyond_what_float16_counts(tmp_path: Path) -> None:
    """Past 2048 tokens, where a single float16 counter would stand still at every odd one."""
    spec = parse(merge(BASE, {"name": "long", "context": 4096, "depth": 1, "block": {"attention": {"window": 40}}}))
    weights = random_weights(spec)
    path = artifacts.write("coreml", spec, weights, tmp_path / "m.mlpackage", "f32")
    ids = random_ids(spec, 1, 2060)
    exact = Oracle(spec, weights).logits(ids)[0]
    with load(path, exact=False) as runtime:
        states = {s.name: s.shape for s in runtime.artifact.functions["main"].states}
        assert states["position"] == (2,)
        parts = [runtime.prefill(ids[0, :1020])[None]]
        parts += [runtime.step(ids[0, i : i + 1]) for i in range(1020, 1030)]  # the second counter begins
        parts += [runtime.step(ids[0, 1030:2041])]
        parts += [runtime.step(ids[0, i : i + 1]) for i in range(2041, 2060)]
    run = np.concatenate(parts)
    assert nmse(run, exact[1019:]) < 1e-6  # float16 states
    assert nmse(run[-19:], exact[-19:]) < 1e-6
    assert CHUNK < 1020  # a prefill took several calls


def test_layers_of_different_heads_share_padded_states(tmp_path: Path) -> None:
    spec = parse(merge(BASE, {
        "name": "mixed", "depth": 3, "context": 64,
        "overrides": {
            "1": {"attention": {"heads": 3, "kv_heads": 1, "head_dim": 12}},
            "2": {"attention": {"heads": 2, "kv_heads": 2, "head_dim": 6, "softcap": 5.0}},
        },
    }))  # fmt: skip
    path = made(tmp_path, spec)
    assert cache_shape(spec) == (3, 1, 2, 64, 12)
    artifacts.check_graph("coreml", path, length=60)


@pytest.mark.parametrize("compute", ["f16", "f32"])
def test_large_activations_do_not_overflow(compute: str, tmp_path: Path) -> None:
    """Residuals in the thousands, whose squares float16 does not hold: norms are finite and as exact as elsewhere."""
    from convert.verify.numeric import emulate_dtype

    for name in ("llama", "layernorm_bias", "qk_norm_head"):
        spec = FEATURES[name]
        weights = random_weights(spec)
        weights["embed.weight"] = weights["embed.weight"] * np.float32(3000)
        assert np.square(np.abs(weights["embed.weight"]).max().astype(np.float64)) > 65504 * 100
        path = artifacts.write("coreml", spec, weights, tmp_path / f"{name}.mlpackage", "f16", compute=compute)
        artifact, ids = open_artifact(path), random_ids(spec, 1, 40)
        with load(path) as runtime:
            got = runtime.logits(ids)
        emulation = emulate_dtype(spec, artifacts.values(artifact), ids, artifact.session, artifact.arithmetic)
        assert np.isfinite(got).all()
        assert nmse(got, emulation.exact) <= 3 * nmse(emulation.tiled, emulation.exact)
