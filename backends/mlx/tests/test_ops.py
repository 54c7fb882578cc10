"""The operations: fused ones equal their defaults, and both ways of computing agree."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx

from backends.mlx import layers, ops
from backends.mlx.bundle import arguments
from backends.mlx.model import DTYPES, Model, Place, Table, causal
from backends.mlx.ops import MLXOps, composed
from backends.numpy.ops import NumpyOps
from convert.gates import RATIO
from parity_tests.artifacts import EXACT
from parity_tests.cases import FEATURES, random_ids, random_weights
from spec.config import MLP, Attention
from spec.ops import Ops, Step
from spec.rope import RopeTable


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Compiled kernels would need a C++ compiler here. Every test draws the same numbers, alone or among others."""
    global RNG
    RNG = np.random.default_rng(0)
    mx.disable_compile()
    yield
    mx.enable_compile()


RNG = np.random.default_rng(0)
KIND = "kind"


def normal(*shape: int, dtype: Any = mx.float32) -> mx.array:
    return mx.array(RNG.standard_normal(shape).astype(np.float32)).astype(dtype)


def error(x: mx.array, y: Any) -> float:
    a, b = (np.array(t.astype(mx.float32) if isinstance(t, mx.array) else t, np.float64) for t in (x, y))
    return float(np.square(a - b).sum() / np.square(b).sum())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "clamped_swiglu"])
def test_glu_equals_its_default(activation: Any) -> None:
    m = MLP(hidden=32, activation=activation, limit=0.8)
    run = MLXOps(mx.float32, {})
    gate, up = normal(2, 5, 32), normal(2, 5, 32)
    assert error(run.glu(gate, up, m), Ops.glu(run, gate, up, m)) < 1e-13
    exact = NumpyOps().glu(np.array(gate, np.float64), np.array(up, np.float64), m)
    assert error(run.glu(gate, up, m), exact) < 1e-12
    half = run.glu(gate.astype(mx.float16), up.astype(mx.float16), m)
    # two inputs, one activation (which may double its input's error, in power four times) and one product are rounded,
    # each with a mean square of at most u^2 / 3
    assert half.dtype == mx.float16 and error(half, exact) < (1 + 4 + 1 + 1) * 2.0**-22 / 3


@pytest.mark.parametrize("heads", [(4, 4), (6, 3), (5, 1)])
@pytest.mark.parametrize(("window", "sinks"), [(None, False), (4, False), (None, True), (3, True)])
@pytest.mark.parametrize("past", [0, 7])
def test_the_fused_attention_equals_the_composed_one(
    heads: tuple[int, int], window: int | None, sinks: bool, past: int
) -> None:
    h, g = heads
    a = Attention(heads=h, kv_heads=g, head_dim=12, scale=0.3, window=window)
    q, k, v = normal(2, h, 9, 12), normal(2, g, 9 + past, 12), normal(2, g, 9 + past, 12)
    sink = normal(h) if sinks else None
    array, short = causal(9, past, window, True), causal(9, past, window, False)
    w: Any = SimpleNamespace(kind=KIND, slopes=None, get=lambda _: sink)
    step: Any = Place(mx.arange(9)[None])
    fused = MLXOps(mx.float32, {KIND: short}).mix(q, k, v, step, None, a, w)
    assert error(fused, composed(q, k, v, a, array, sink, None)) < 1e-12


def test_a_mask_per_row_is_taken_by_both(monkeypatch: pytest.MonkeyPatch) -> None:
    a = Attention(heads=4, kv_heads=2, head_dim=8, scale=0.3)
    q, k, v = normal(3, 4, 5, 8), normal(3, 2, 5, 8), normal(3, 2, 5, 8)
    pads = mx.array([0, 2, 1])
    mask = causal(5, 0, None, True) & (pads[:, None, None, None] <= mx.arange(5))
    w: Any = SimpleNamespace(kind=KIND, slopes=None, get=lambda _: None)
    fused = MLXOps(mx.float32, {KIND: mask}).mix(q, k, v, Place(mx.arange(5)[None]), None, a, w)  # type: ignore[arg-type]
    other = composed(q, k, v, a, mask, None, None)
    for row, pad in enumerate([0, 2, 1]):
        assert error(fused[row, :, pad:], other[row, :, pad:]) < 1e-12


@pytest.mark.parametrize("start", [0, 500, 4000])
@pytest.mark.parametrize("dim", [12, 6])
def test_rotations_follow_the_table(start: int, dim: int) -> None:
    freq = (100.0 ** -(np.arange(0, dim, 2) / dim)).astype(np.float32)
    positions = np.arange(start, start + 7)[None]
    x = normal(2, 3, 7, 12)
    oracle = NumpyOps()
    exact = oracle.rope(
        np.array(x, np.float64), oracle.rotation(RopeTable(freq, 1.0), Step("causal", positions, positions))
    )
    run = MLXOps(mx.float32, {})
    got = run.rope(x, run.rotation(Table(mx.array(freq), 1.0), Place(mx.array(positions))))  # type: ignore[arg-type]
    assert error(got, exact) < 1e-13 + 2 * (start * 2.0**-24) ** 2


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_fused_rotation_is_as_good_in_16_bits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, on the CPU's kernel, which rounds cosines and sines too."""
    dtype = getattr(mx, kind)
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[kind]
    table = Table(mx.array((10000.0 ** -(np.arange(0, 8, 2) / 8)).astype(np.float32)), 1.0)
    x = normal(2, 3, 7, 12).astype(dtype)
    run, step = MLXOps(dtype, {}), Place(mx.arange(100, 107)[None])
    plain = run.rope(x, run.rotation(table, step))  # type: ignore[arg-type]
    monkeypatch.setattr(ops, "wide", lambda: False)
    fused = run.rope(x, run.rotation(table, step))  # type: ignore[arg-type]
    assert fused.dtype == plain.dtype == dtype
    assert 0 < error(fused, plain) < 4 * unit**2


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_gpus_path_computes_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that only devices with float32 accumulation run, here on kernels that round more."""
    dtype = getattr(mx, kind)
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[kind]
    linear = layers.Linear(64, 24, True)
    linear.weight, linear.bias = normal(24, 64) / 8, normal(24)
    modules: list[Any] = [linear, linear.to_quantized(32, 4), layers.Norm(SimpleNamespace(
        kind="layernorm", eps=1e-5, weight=True, bias=True), 64)]  # fmt: skip
    for m in modules:
        m.apply(lambda t: t.astype(dtype) if mx.issubdtype(t.dtype, mx.floating) else t)
        x = normal(3, 64).astype(dtype)
        here = m(x)
        with monkeypatch.context() as patch:
            patch.setattr(layers, "wide", lambda: False)
            there = m(x)
        assert there.dtype == here.dtype == dtype
        # a sum of n terms in 16 bits: the k-th partial sum has k terms' power and a rounding of u^2 / 3 of it, so the
        # whole has (n + 1) u^2 / 6 times the terms' power; then three roundings of the result
        assert error(there, here) < (power_of_terms(m) * (64 + 1) / 6 + 1) * unit**2


def power_of_terms(m: Any) -> float:
    """What a kernel sums, over what comes out: codes are unsigned, so their part and the biases' cancel each other."""
    if not isinstance(m, layers.QuantizedLinear):
        return 1.0
    dense = np.array(mx.dequantize(m.weight, m.scales, m.biases, 32, 4).astype(mx.float32))
    assert m.biases is not None
    biases = np.repeat(np.array(m.biases.astype(mx.float32)), 32, -1)
    return float((np.square(dense - biases).sum() + np.square(biases).sum()) / np.square(dense).sum())


def test_wide_products_are_summed_in_blocks() -> None:
    """As exact at 4096 columns as at 256: a plain sum has ten times the error."""
    linear = layers.Linear(4096, 64, False)
    linear.weight = normal(64, 4096) / 64
    x = normal(4, 4096)
    exact = np.array(x, np.float64) @ np.array(linear.weight, np.float64).T
    assert error(linear(x), exact) < 2e-13
    packed = linear.to_quantized(32, 4)
    dense = mx.dequantize(packed.weight, packed.scales, packed.biases, 32, 4)
    assert error(packed(x), np.array(x, np.float64) @ np.array(dense, np.float64).T) < 2e-13


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_quantized_rows_and_products_agree(mode: str) -> None:
    table = layers.Embedding(40, 64)
    packed = table.to_quantized(mode=mode, group_size=None, bits=None)
    rows = packed(mx.arange(40))
    assert rows.dtype == mx.float32
    x = normal(5, 64)
    assert error(packed.as_linear(x), np.array(x, np.float64) @ np.array(rows, np.float64).T) < 1e-12


@pytest.mark.parametrize("name", ["tied", "learned_offset", "alibi", "window_pattern", "sinks"])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_rows_padded_on_the_left_are_as_if_alone(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx-lm's batch caches, with the kernels of a GPU in 16 bits: positions before 0 are padding."""
    caches = pytest.importorskip("mlx_lm.models.cache")
    spec = FEATURES[name]
    model = Model(arguments(spec, kind))
    weights = {n: mx.array(x).astype(DTYPES[kind]) for n, x in random_weights(spec).items()}
    model.load_weights(list(weights.items()))
    if kind == "f16":
        monkeypatch.setattr(ops, "wide", lambda: False)
    ids = random_ids(spec, 1, 12)[0]
    alone = model(mx.array(ids)[None])[0]
    pads = [3, 0]
    batch = np.stack([np.concatenate([np.zeros(3, int), ids[:9]]), ids])
    kinds = [layer.attn.kind for layer in model.layers]
    held = [
        caches.BatchRotatingKVCache(w, pads) if w is not None and not alibi else caches.BatchKVCache(pads)
        for w, _, alibi in kinds
    ]
    parts = [model(mx.array(batch[:, a:b]), held) for a, b in ((0, 5), (5, 6), (6, 11), (11, 12))]
    got = mx.concatenate(parts, 1)
    limit = EXACT
    if kind == "f16":  # two runs, each with the roundings of one: twice the root of its error
        model.apply(lambda x: x.astype(mx.float32))
        full = Model(arguments(spec, "f32"))
        full.update(model.parameters())
        limit = RATIO["graph"] * error(alone, full(mx.array(ids)[None])[0])
        assert limit <= 1e-4
    assert error(got[0, 3:], alone[:9]) <= limit
    assert error(got[1], alone) <= limit
