"""Every operation of the interpreter against coremltools' own value inference, or plain NumPy where it has none."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from backends.coreml.library import coremltools
from backends.coreml.mil.ops import OPS

RNG = np.random.default_rng(0)


def floats(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    return RNG.uniform(low, high, shape).astype(np.float32)


def ints(*shape: int, high: int = 9) -> np.ndarray:
    return RNG.integers(1, high, shape).astype(np.int32)


def bools(*shape: int) -> np.ndarray:
    return RNG.random(shape) < 0.5


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


X, Y = floats(2, 3, 4), floats(3, 4)
P = floats(2, 3, 4, low=0.1, high=3.0)
Q, K = floats(1, 2, 3, 4), floats(1, 2, 5, 4)
MASKS = {"begin_mask": np.array([False, True, False]), "end_mask": np.array([True, False, False])}

INFERRED: list[tuple[str, dict[str, Any]]] = [
    *[(kind, {"x": X, "y": Y}) for kind in ("add", "sub", "mul", "maximum", "minimum")],
    *[(kind, {"x": ints(4), "y": ints(4)}) for kind in ("add", "sub", "mul", "floor_div", "mod")],
    ("real_div", {"x": X, "y": P}),
    ("floor_div", {"x": i32(-7, 7, 9), "y": i32(2, 2, -4)}),
    ("mod", {"x": i32(-7, 7, 9), "y": i32(4, 4, 4)}),
    ("pow", {"x": P, "y": Y}),
    *[(kind, {"x": X}) for kind in ("abs", "square", "exp", "sin", "cos", "tanh", "erf", "sigmoid", "relu")],
    ("sqrt", {"x": P}),
    ("rsqrt", {"x": P, "epsilon": np.float32(1e-2)}),
    ("inverse", {"x": P, "epsilon": np.float32(1e-2)}),
    ("log", {"x": P, "epsilon": np.float32(1e-2)}),
    ("gelu", {"x": X, "mode": "EXACT"}),
    ("gelu", {"x": X, "mode": "TANH_APPROXIMATION"}),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}),
    ("clip", {"x": X, "alpha": np.float32(-0.5), "beta": np.float32(1.0)}),
    *[("cast", {"x": X, "dtype": kind}) for kind in ("int32", "bool", "fp32")],
    ("cast", {"x": ints(4), "dtype": "fp32"}),
    ("cast", {"x": bools(4), "dtype": "int32"}),
    *[
        (kind, {"x": ints(3, 4, high=4), "y": ints(4, high=4)})
        for kind in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
    ],
    *[(kind, {"x": bools(3, 4), "y": bools(4)}) for kind in ("logical_and", "logical_or")],
    ("logical_not", {"x": bools(3, 4)}),
    ("select", {"cond": bools(2, 3, 4), "a": X, "b": floats(2, 3, 4)}),
    *[
        (kind, {"x": X, "axes": i32(-1), "keep_dims": keep})
        for kind in ("reduce_sum", "reduce_mean", "reduce_max", "reduce_min")
        for keep in (True, False)
    ],
    ("reduce_sum", {"x": ints(2, 3), "axes": i32(0), "keep_dims": True}),
    ("softmax", {"x": X, "axis": -1}),
    ("softmax", {"x": X, "axis": 1}),
    ("layer_norm", {"x": X, "axes": i32(-1), "gamma": floats(4), "beta": floats(4), "epsilon": np.float32(1e-5)}),
    ("linear", {"x": X, "weight": floats(5, 4), "bias": floats(5)}),
    ("matmul", {"x": floats(2, 3, 4), "y": floats(2, 4, 5)}),
    ("matmul", {"x": floats(2, 4, 3), "y": floats(1, 5, 4), "transpose_x": True, "transpose_y": True}),
    ("scaled_dot_product_attention", {"query": Q, "key": K, "value": floats(1, 2, 5, 6)}),
    ("scaled_dot_product_attention", {"query": Q, "key": K, "value": K, "attn_mask": np.tri(3, 5, 2, bool)[None]}),
    ("scaled_dot_product_attention", {"query": Q, "key": K, "value": K, "attn_mask": floats(1, 1, 3, 5)}),
    ("identity", {"x": X}),
    ("gather", {"x": floats(7, 3), "indices": i32(4, 0, 6), "axis": 0}),
    ("gather", {"x": floats(2, 7), "indices": i32(1, 3).reshape(1, 2), "axis": 1}),
    ("gather_along_axis", {"x": X, "indices": ints(2, 3, 5, high=4), "axis": -1}),
    ("topk", {"x": X, "k": 3, "axis": -1}),
    ("topk", {"x": X, "k": 1, "axis": 1}),
    ("slice_by_index", {"x": X, "begin": i32(0, 1, 1), "end": i32(2, 3, 3)}),
    ("slice_by_index", {"x": X, "begin": i32(1, 7, 1), "end": i32(9, 2, 4), **MASKS}),
    ("slice_by_index", {"x": X, "begin": i32(1, 0, 0), "end": i32(2, 3, 4), "stride": i32(1, 2, 3),
                        "squeeze_mask": np.array([True, False, False])}),
    ("slice_by_index", {"x": X, "begin": i32(0, -1, 0), "end": i32(0, 0, 0),
                        "begin_mask": np.array([True, False, True]), "end_mask": np.array([True, True, True])}),
    ("slice_update", {"x": X, "update": floats(2, 2, 2), "begin": i32(0, 1, 1), "end": i32(2, 3, 3)}),
    ("concat", {"values": [i32(1, 2), i32(3), i32(4, 5)], "axis": 0}),
    ("concat", {"values": [X, X], "axis": -1}),
    ("stack", {"values": [X, X], "axis": 1}),
    ("split", {"x": X, "num_splits": 2, "axis": -1}),
    ("split", {"x": X, "split_sizes": i32(1, 3), "axis": -1}),
    ("tile", {"x": X, "reps": i32(1, 2, 3)}),
    ("tile", {"x": bools(2, 3), "reps": i32(2, 1)}),
    ("reshape", {"x": X, "shape": i32(4, -1)}),
    ("reshape", {"x": X, "shape": i32(0, 4, 3)}),
    ("transpose", {"x": X, "perm": i32(2, 0, 1)}),
    ("squeeze", {"x": floats(1, 3, 1), "axes": i32(0)}),
    ("expand_dims", {"x": X, "axes": i32(0, 2)}),
    ("fill", {"shape": i32(2, 3), "value": np.float32(1.5)}),
    ("shape", {"x": X}),
    ("range_1d", {"start": np.int32(0), "end": np.int32(7), "step": np.int32(1)}),
    ("range_1d", {"start": np.int32(2), "end": np.int32(9), "step": np.int32(3)}),
]  # fmt: skip


def build(kind: str, args: dict[str, Any]) -> Any:
    """The operation on constants, as coremltools builds it; returns its results."""
    ct = coremltools()
    from coremltools.converters.mil import Builder as Imported

    Builder: Any = Imported  # its operations are attributes that are set when it is imported
    held: list[Any] = []

    def body(unused: Any) -> Any:
        held.append(getattr(Builder, kind)(**args, name="tested"))
        return Builder.identity(x=unused, name="out")

    spec = [Builder.TensorSpec((1,))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 2.4 deprecates what coremltools 9 does with its scalars
        Builder.program(input_specs=spec, opset_version=ct.target.iOS18)(body)
    return held[0] if isinstance(held[0], list | tuple) else [held[0]]


@pytest.mark.parametrize(("kind", "args"), INFERRED, ids=[f"{i}-{k}" for i, (k, _) in enumerate(INFERRED)])
def test_an_operation_gives_what_coremltools_infers(kind: str, args: dict[str, Any]) -> None:
    expected = build(kind, args)
    found = OPS[kind].run(**args)
    found = found if isinstance(found, list) else [found]
    assert len(found) == len(expected)
    for got, var in zip(found, expected, strict=True):
        want = np.asarray(var.val)
        assert np.shape(got) == want.shape
        assert np.allclose(got, want.astype(np.float64), rtol=2e-6, atol=2e-6 if want.dtype.kind == "f" else 0)


INT8 = RNG.integers(-128, 128, (4, 64)).astype(np.int8)
INDICES = RNG.integers(0, 16, (4, 6)).astype(np.uint8)


def test_blocks_dequantize_as_coremltools_materialises_them() -> None:
    coremltools()
    from coremltools.converters.mil.mil import types

    for codes in (INT8, (INT8 // 16).astype(types.np_int4_dtype)):
        for blocks in ((4, 2), (1, 64), (2, 1)):
            scale = floats(*blocks, low=0.1)
            (var,) = build("constexpr_blockwise_shift_scale", {"data": codes, "scale": scale})
            want = var.op.materialized_val_inference()
            got = OPS["constexpr_blockwise_shift_scale"].run(np.asarray(codes, np.int8), scale)
            assert np.array_equal(got, want)
    offset = RNG.integers(-9, 9, (4, 2)).astype(np.int8)
    args = {"data": INT8, "scale": floats(4, 2, low=0.1), "offset": offset}
    (var,) = build("constexpr_blockwise_shift_scale", args)
    assert np.array_equal(OPS["constexpr_blockwise_shift_scale"].run(**args), var.op.materialized_val_inference())


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 1), (1, 3)])
def test_palettes_expand_as_coremltools_materialises_them(groups: tuple[int, int]) -> None:
    coremltools()
    from coremltools.converters.mil.mil import types

    lut = floats(*groups, 16, 1)
    (var,) = build("constexpr_lut_to_dense", {"indices": INDICES.astype(types.np_uint4_dtype), "lut": lut})
    assert np.array_equal(OPS["constexpr_lut_to_dense"].run(INDICES, lut), var.op.materialized_val_inference())


def test_a_cast_constant_is_what_coremltools_materialises() -> None:
    half = floats(3, 4).astype(np.float16)
    (var,) = build("constexpr_cast", {"source_val": half, "output_dtype": "fp32"})
    assert np.array_equal(OPS["constexpr_cast"].run(half, "fp32"), var.op.materialized_val_inference())


def test_silu_which_coremltools_does_not_infer() -> None:
    x = np.linspace(-90, 90, 181)
    assert np.allclose(OPS["silu"].run(x), [v / (1 + math.exp(-v)) for v in x], rtol=1e-14)


def test_slice_update_copies_unless_told() -> None:
    x, update = floats(4), floats(2)
    y = OPS["slice_update"].run(x, update, i32(1), i32(3))
    assert not np.shares_memory(x, y) and np.array_equal(y[1:3], update)
    assert OPS["slice_update"].run(x, update, i32(1), i32(3), in_place=True) is x


def test_every_operation_is_tested() -> None:
    tested = {kind for kind, _ in INFERRED} | {"silu", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense",
                                              "constexpr_cast"}  # fmt: skip
    assert set(OPS) == tested
