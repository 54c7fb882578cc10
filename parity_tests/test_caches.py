"""Caches of fewer bits: they cost the rounding of keys and values, are smaller, and pieces give the whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import backends
from backends.numpy.model import Oracle
from backends.numpy.ops import NumpyOps
from parity_tests.artifacts import chunked, opened, values, write
from parity_tests.cases import nmse, random_ids, random_weights
from spec import Spec
from spec.errors import UserError

BACKENDS = {"gguf": "llama_cpp", "mlx": "mlx.core"}
CODES = {"q8": 127, "q6": 31, "q5": 15, "q4": 7}
"""Largest symmetric codes."""


def spec(head_dim: int = 64, **attention: Any) -> Spec:
    return Spec.model_validate({
        "vocab_size": 97, "width": 96, "depth": 3, "context": 96,
        "block": {"attention": {"heads": 4, "kv_heads": 2, "head_dim": head_dim, **attention}, "mlp": {"hidden": 128}},
    })  # fmt: skip


class Rounded(NumpyOps):
    """The oracle with keys and values in blocks of 32 symmetric codes up to `most`."""

    def __init__(self, keys: int, vals: int) -> None:
        super().__init__(np.float64)
        self.most = keys, vals

    def mix(self, q: Any, k: Any, v: Any, step: Any, key_slots: Any, a: Any, w: Any) -> Any:
        keys, vals = (blocks(x, most) for x, most in zip((k, v), self.most, strict=True))
        return super().mix(q, keys, vals, step, key_slots, a, w)


def blocks(x: NDArray[Any], most: int) -> NDArray[Any]:
    b = x.reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(b).max(-1, keepdims=True).clip(1e-30) / most
    return (np.rint(b / scale) * scale).reshape(x.shape)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By backend and head_dim, made once: float32 in llama.cpp and MLX, so that little else is rounded."""
    root, made = tmp_path_factory.mktemp("caches"), {}

    def one(backend: str, head_dim: int = 64, **attention: Any) -> Path:
        key = (backend, head_dim, *attention)
        if key not in made:
            s, b = spec(head_dim, **attention), backends.get(backend)
            made[key] = write(backend, s, random_weights(s), root / f"{len(made)}{b.suffix}", "f32")
        return made[key]

    return one


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(BACKENDS[request.param])
    return request.param


def run(path: Path, ids: NDArray[Any], **options: Any) -> tuple[NDArray[Any], NDArray[Any], int, str]:
    """[T] ids: logits of all at once, and from a prefill of 31 and pieces; bytes of the cache; its kind."""
    with backends.load(path, threads=1, **options) as runtime:
        whole: Any = runtime
        logits = runtime.logits(ids[None])[0]
        pieces, at = chunked(runtime, ids, [31, 1, 1, 5, 1, len(ids) - 39])
        assert at == slice(30, len(ids))
        return logits, pieces, whole.cache_bytes(), runtime.info()["cache"]


def rounding(backend: str, path: Path, ids: NDArray[Any], *most: int) -> float:
    """What symmetric codes of keys and values cost."""
    oracle = partial(Oracle, spec(), values(opened(backend, path)))
    return nmse(oracle(ops=Rounded(*most)).logits(ids[None]), oracle().logits(ids[None]))


@pytest.mark.parametrize("kinds", ["q8", "q5", "q4", "q8/q4"])
def test_a_cache_costs_the_rounding_of_keys_and_values(kinds: str, backend: str, artifacts: Any) -> None:
    path = artifacts(backend)
    ids = random_ids(spec(), 1, 60, 3)[0]
    plain, _, large, _ = run(path, ids)
    got, pieces, small, name = run(path, ids, cache=kinds)
    keys, _, vals = kinds.partition("/")
    control = rounding(backend, path, ids, CODES[keys], CODES[vals or keys])
    assert 0.1 * control <= nmse(got, plain) <= 2 * control
    assert nmse(pieces, got[30:]) <= 0.02 * control
    bits = [int(k[1]) for k in (keys, vals or keys)]
    assert name.count("/") == kinds.count("/") and all(f"q{b}" in name for b in bits)
    floats, scale, slots = (16, 16 / 32, len(ids)) if backend == "gguf" else (32, 64 / 64, 256)  # bits; a group's; room
    elements = slots * 3 * 2 * 64  # of keys, and of values
    assert large - small == sum(elements * (floats - b - scale) / 8 for b in bits)
    assert large == pytest.approx(2 * elements * floats / 8, rel=0.02)


def test_windows_keep_their_place_in_a_packed_cache(backend: str, artifacts: Any) -> None:
    """Old keys move to the front of a window's buffer as they are, not rounded again."""
    path = artifacts(backend, window=9)
    ids = random_ids(spec(), 1, 80, 4)[0]
    got, pieces, _, _ = run(path, ids, cache="q8")
    plain = run(path, ids)[0]
    assert 0 < nmse(got, plain) < 1e-3
    assert nmse(pieces, got[30:]) <= 0.02 * nmse(got, plain)


def test_floats_are_the_stock_cache(artifacts: Any) -> None:
    for backend, kind in (("gguf", "f16"), ("mlx", "f32")):
        pytest.importorskip(BACKENDS[backend])
        ids = random_ids(spec(), 1, 40)[0]
        stock, named = run(artifacts(backend), ids), run(artifacts(backend), ids, cache=kind)
        assert np.array_equal(stock[0], named[0]) and stock[2:] == named[2:] and named[3] == kind


@pytest.mark.parametrize(
    ("kind", "most"),
    [("f32", 127), ("bf16", 127), ("q8_0", 127), ("q5_1", 15), ("q5_0", 15), ("q4_1", 7), ("q4_0", 7), ("iq4_nl", 7)],
)
def test_llama_cpp_takes_each_of_its_types(kind: str, most: int, artifacts: Any) -> None:
    pytest.importorskip("llama_cpp")
    path, ids = artifacts("gguf"), random_ids(spec(), 1, 50)[0]
    got, _, _, name = run(path, ids, cache=kind)
    assert name == kind and nmse(got, run(path, ids)[0]) <= 2 * rounding("gguf", path, ids, most, most)


@pytest.mark.parametrize("kind", [f"q{bits}{group}" for bits in (8, 6, 5, 4, 3, 2) for group in ("-g32", "-g64")])
def test_mlx_takes_every_width_and_group(kind: str, artifacts: Any) -> None:
    pytest.importorskip("mlx.core")
    ids = random_ids(spec(), 1, 50)[0]
    got, _, _, name = run(artifacts("mlx"), ids, cache=kind)
    step = 2.0 ** -int(kind[1])
    assert name == kind and nmse(got, run(artifacts("mlx"), ids)[0]) < 20 * step**2


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as e:
        backends.load(path, threads=1, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_heads_that_are_no_whole_blocks_are_refused(backend: str, artifacts: Any) -> None:
    told = refused(artifacts(backend, 40), cache="q8")
    assert told.startswith("cache='q8': heads of 40 dimensions are no whole ") and "32" in told
    with backends.load(artifacts(backend, 40), threads=1) as runtime:
        assert runtime.prefill(np.arange(4)).shape == (97,)


def test_what_no_cache_can_be_is_refused(backend: str, artifacts: Any) -> None:
    path = artifacts(backend)
    assert "q9 is no type of cache here" in refused(path, cache="q9")
    assert "nothing is no type" in refused(path, cache="")
    assert "more than two types" in refused(path, cache="q8/q4/q4")
    assert "exact is float32 throughout" in refused(path, cache="q8", exact=True)
    if backend == "mlx":
        assert "in f32, in which it computes" in refused(path, cache="bf16")
        assert "no whole groups of 128 (try q8-g64)" in refused(path, cache="q8-g128")


@pytest.mark.parametrize("name", ["torch", "onnx", "tensorrt", "coreml", "hf"])
def test_the_others_say_who_has_it(name: str) -> None:
    with pytest.raises(UserError) as e:
        backends.check_options(backends.get(name), {"cache": "q8"})
    assert str(e.value) == (
        f"cache='q8': {name} keeps keys and values in the type that it computes in "
        "(leave it out; gguf and mlx have other types)"
    )
