"""The emulated roundings are ggml's own, byte for byte where the library can be asked."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from backends.numpy.model import Oracle
from convert.verify.emulate import EmulatedOps, Typed, activation_type, to_bf16, to_f16, to_q8_0, to_q8_k
from convert.verify.metrics import nmse
from parity_tests.cases import FEATURES, random_ids, random_weights


def _rows(n: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((6, n)) * rng.choice([1e-4, 1, 50], (6, n))).astype(np.float32)
    x[0] = 0
    x[1, : n // 2] = 0
    x[2] = np.rint(x[2])  # ties
    return x


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        pytest.skip("llama-cpp-python is not installed")
    libraries = sorted((Path(found.origin).parent / "lib").glob("libggml-cpu*"))
    if not libraries or not hasattr(ctypes.CDLL(str(libraries[0])), "quantize_row_q8_0"):
        pytest.skip("this build of ggml exports no row quantizers")
    return ctypes.CDLL(str(libraries[0]))


def _ask(ggml: ctypes.CDLL, function: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    out = np.zeros(x.size // dtype["qs"].shape[0], dtype)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, out)]
    getattr(ggml, function)(*pointers, ctypes.c_int64(x.size))
    return (out["qs"].astype(np.float32) * out["d"].astype(np.float32)[:, None]).reshape(x.shape)


def test_int8_blocks_of_32_are_ggmls(ggml: ctypes.CDLL) -> None:
    x = _rows(256)
    block = np.dtype([("d", "<f2"), ("qs", "i1", (32,))])
    np.testing.assert_array_equal(to_q8_0(x), _ask(ggml, "quantize_row_q8_0", x, block))


def test_int8_blocks_of_256_are_ggmls(ggml: ctypes.CDLL) -> None:
    x = _rows(512)
    block = np.dtype([("d", "<f4"), ("qs", "i1", (256,)), ("sums", "<i2", (16,))])
    np.testing.assert_array_equal(to_q8_k(x), _ask(ggml, "quantize_row_q8_K", x, block))


def test_bfloat16_rounds_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    x = _rows(256)
    np.testing.assert_array_equal(to_bf16(x), torch.from_numpy(x).bfloat16().float().numpy())


def test_float16_keeps_what_it_holds() -> None:
    x = np.array([1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65504, 2**-24], np.float32)
    np.testing.assert_array_equal(to_f16(x), np.array([1.0, 1.0, 1 + 2**-9, 65504, 2**-24], np.float32))


def test_every_weight_type_has_an_activation_type() -> None:
    assert [activation_type(t) for t in ("F32", "f16", "BF16", "Q4_0", "q8_0", "Q4_K", "iq4_xs", "IQ4_NL", "q6_k")] == [
        "f32", "f16", "bf16", "q8_0", "q8_0", "q8_k", "q8_k", "q8_0", "q8_k",
    ]  # fmt: skip


@pytest.mark.parametrize("feature", ["llama", "gemma2", "gpt2", "sinks", "tied"])
def test_only_the_chosen_batch_rows_are_rounded(feature: str) -> None:
    """One pass yields the oracle itself, to the last bit, and the emulated run beside it."""
    spec = FEATURES[feature]
    weights, ids = random_weights(spec), random_ids(spec, 1, 12)
    typed = {n: Typed(w, "f16") if w.ndim == 2 else w for n, w in weights.items()}
    both = Oracle(spec, typed, ops=EmulatedOps(rows=slice(1, 2))).logits(np.concatenate([ids, ids]))
    exact = Oracle(spec, weights).logits(ids)
    alone = Oracle(spec, typed, ops=EmulatedOps()).logits(ids)
    assert nmse(both[:1], exact) < 1e-28
    assert 1e-9 < nmse(both[1:], exact) < 1e-4
    assert nmse(both[1:], alone) < 1e-3 * nmse(both[1:], exact) + 1e-28


def test_the_gelu_table_is_a_rounding_of_its_own() -> None:
    spec = FEATURES["gelu_tanh"]
    weights, ids = random_weights(spec), random_ids(spec, 1, 12)
    exact = Oracle(spec, weights).logits(ids)
    table = Oracle(spec, weights, ops=EmulatedOps(linears=False, kv="f32")).logits(ids)
    assert 1e-10 < nmse(table, exact) < 1e-5


@pytest.mark.parametrize("feature", ["llama", "window", "alibi", "attn_softcap", "sinks", "mqa"])
def test_values_summed_key_by_key_are_the_same_sum(feature: str) -> None:
    """Only the accumulator's rounding tells the two apart, and it is float16's."""
    spec = FEATURES[feature]
    weights, ids = random_weights(spec), random_ids(spec, 1, 20)
    tiled, online = (
        Oracle(spec, weights, ops=EmulatedOps(linears=False, online=slice(0, n))).logits(ids) for n in (0, 1)
    )
    assert 1e-9 < nmse(online, tiled) < 3e-5
