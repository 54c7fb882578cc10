"""MIL operations in NumPy, by name; parameters are called as in coremltools' definitions.

Floats come and go in the machine's dtype; whether a result is then rounded to float16 is the table's `rounds`: moving
numbers about rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_erf: Callable[[Array], Any] = np.frompyfunc(math.erf, 1, 1)


@dataclass(frozen=True)
class Op:
    """An operation; `rounds` where its float results are new numbers."""

    run: Callable[..., Any]
    rounds: bool = True


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """By erf, by tanh, or x sigmoid(1.702 x)."""
    if mode == "EXACT":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)).astype(x.dtype))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return x * sigmoid(1.702 * x)


def softmax(x: Array, axis: int = -1) -> Array:
    """exp(x) over its sum along an axis."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(q k^T / sqrt(K), masked) v; a boolean mask says what is seen, a float one is added."""
    scores = query @ key.swapaxes(-1, -2) * query.dtype.type(query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    return softmax(scores) @ value


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x weight^T + bias."""
    y = x @ weight.T
    return y if bias is None else y + bias


def matmul(x: Array, y: Array, transpose_x: bool = False, transpose_y: bool = False) -> Array:
    """Matrix product over the last two axes."""
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def layer_norm(
    x: Array, axes: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """(x - mean) / sqrt(var + epsilon) * gamma + beta over `axes`."""
    over = tuple(int(a) for a in np.atleast_1d(axes))
    centred = x - x.mean(over, keepdims=True)
    y = centred / np.sqrt(np.square(centred).mean(over, keepdims=True) + epsilon)
    y = y if gamma is None else y * gamma
    return y if beta is None else y + beta


def reduced(how: Callable[..., Any]) -> Callable[..., Array]:
    """A reduction over `axes` (all, where there are none)."""

    def run(x: Array, axes: Array | None = None, keep_dims: bool = False) -> Array:
        return np.asarray(how(x, None if axes is None else tuple(int(a) for a in axes), keepdims=bool(keep_dims)))

    return run


def gather(x: Array, indices: Array, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Array:
    """Slices of x along an axis; negative indices count from the end. Raises IndexError beyond them."""
    assert int(batch_dims) == 0, "gather: batch_dims"
    return np.take(x, indices.astype(np.int64), axis=int(axis))


def _window(
    shape: Sequence[int],
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    """The NumPy index of a slice; a mask's True means from the very beginning, or to the very end."""
    out: list[slice | int] = []
    for i in range(len(shape)):
        if squeeze_mask is not None and squeeze_mask[i]:
            out.append(int(begin[i]))
            continue
        lo = None if begin_mask is not None and begin_mask[i] else int(begin[i])
        hi = None if end_mask is not None and end_mask[i] else int(end[i])
        out.append(slice(lo, hi, 1 if stride is None else int(stride[i])))
    return tuple(out)


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """x[begin:end:stride] along every axis."""
    return x[_window(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
    *,
    in_place: bool = False,
) -> Array:
    """x with x[begin:end:stride] replaced by `update`."""
    out = x if in_place else x.copy()
    at = _window(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    assert out[at].shape == update.shape, f"slice_update: {update.shape} into {out[at].shape}"
    out[at] = update
    return out


def reshape(x: Array, shape: Array) -> Array:
    """-1 stands for what is left, 0 for the size that x has there."""
    sizes = [x.shape[i] if n == 0 else int(n) for i, n in enumerate(np.atleast_1d(shape))]
    return x.reshape(sizes)


def split(x: Array, axis: int, num_splits: int | None = None, split_sizes: Array | None = None) -> list[Array]:
    """Pieces along an axis, equal or of given sizes."""
    if split_sizes is None:
        assert num_splits is not None
        return np.split(x, int(num_splits), int(axis))
    return np.split(x, np.cumsum(split_sizes)[:-1].tolist(), int(axis))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Without axes of size 1."""
    return np.squeeze(x, None if axes is None else tuple(int(a) for a in axes))


def cast(x: Array, dtype: str) -> Array:
    """To another kind of number: floats to integers toward zero. Between floats the machine rounds."""
    if dtype in ("fp16", "fp32"):
        return x.astype(np.float64) if x.dtype.kind in "iub" else x
    kinds = {"int32": np.int32, "int16": np.int16, "uint16": np.uint16, "int8": np.int8, "uint8": np.uint8}
    return x.astype(np.bool_ if dtype == "bool" else kinds[dtype])


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), one scale for a block along every axis."""
    blocked = [n for d, s in zip(data.shape, scale.shape, strict=True) for n in (s, d // s)]
    apart = [n for s in scale.shape for n in (s, 1)]
    x = data.reshape(blocked).astype(scale.dtype)
    if offset is not None:
        x = x - offset.reshape(apart).astype(scale.dtype)
    return (x * scale.reshape(apart)).reshape(data.shape)


def lut_to_dense(indices: Array, lut: Array, vector_axis: Any = None) -> Array:
    """Values by index, one table [2^bits, 1] for a block along every axis."""
    assert lut.shape[-1] == 1, "constexpr_lut_to_dense: vectors"
    tables = lut.reshape(-1, lut.shape[-2])
    number = np.arange(len(tables)).reshape(lut.shape[:-2])
    for axis, (n, groups) in enumerate(zip(indices.shape, number.shape, strict=True)):
        number = np.repeat(number, n // groups, axis)
    return tables[number, indices.astype(np.intp)]


def topk(
    x: Array,
    k: int,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> list[Array]:
    """The k largest along an axis (the lower number first among equals), and their numbers."""
    assert sort and return_indices and not ascending, "topk: descending, with indices"
    chosen = np.argsort(-x, int(axis), kind="stable").take(np.arange(int(k)), int(axis))
    return [np.take_along_axis(x, chosen, int(axis)), chosen]


def gather_along_axis(x: Array, indices: Array, axis: int = 0, validate_indices: bool = False) -> Array:
    """x at indices of its own rank along an axis."""
    return np.take_along_axis(x, indices.astype(np.int64), int(axis))


def _axes(axes: Any) -> tuple[int, ...]:
    return tuple(int(a) for a in np.atleast_1d(axes))


def _moves(run: Callable[..., Any]) -> Op:
    return Op(run, rounds=False)


OPS: dict[str, Op] = {
    # element by element
    "add": Op(lambda x, y: x + y),
    "sub": Op(lambda x, y: x - y),
    "mul": Op(lambda x, y: x * y),
    "real_div": Op(lambda x, y: x / y),
    "floor_div": Op(lambda x, y: x // y),
    "mod": Op(lambda x, y: x % y),
    "pow": Op(lambda x, y: x**y),
    "maximum": Op(lambda x, y: np.maximum(x, y)),
    "minimum": Op(lambda x, y: np.minimum(x, y)),
    "abs": Op(lambda x: np.abs(x)),
    "square": Op(lambda x: np.square(x)),
    "sqrt": Op(lambda x: np.sqrt(x)),
    "rsqrt": Op(lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon)),
    "inverse": Op(lambda x, epsilon=1e-4: 1 / (x + epsilon)),
    "exp": Op(lambda x: np.exp(x)),
    "log": Op(lambda x, epsilon=1e-45: np.log(x + epsilon)),
    "sin": Op(lambda x: np.sin(x)),
    "cos": Op(lambda x: np.cos(x)),
    "tanh": Op(lambda x: np.tanh(x)),
    "erf": Op(lambda x: _erf(x).astype(x.dtype)),
    "sigmoid": Op(lambda x: sigmoid(x)),
    "silu": Op(lambda x: x * sigmoid(x)),
    "gelu": Op(gelu),
    "relu": Op(lambda x: np.maximum(x, 0)),
    "clip": Op(lambda x, alpha, beta: np.clip(x, alpha, beta)),
    "cast": Op(cast),
    # comparisons and choice
    "equal": _moves(lambda x, y: x == y),
    "not_equal": _moves(lambda x, y: x != y),
    "less": _moves(lambda x, y: x < y),
    "less_equal": _moves(lambda x, y: x <= y),
    "greater": _moves(lambda x, y: x > y),
    "greater_equal": _moves(lambda x, y: x >= y),
    "logical_and": _moves(lambda x, y: np.logical_and(x, y)),
    "logical_or": _moves(lambda x, y: np.logical_or(x, y)),
    "logical_not": _moves(lambda x: np.logical_not(x)),
    "select": _moves(lambda cond, a, b: np.where(cond, a, b)),
    # reductions and products
    "reduce_sum": Op(reduced(np.sum)),
    "reduce_mean": Op(reduced(np.mean)),
    "reduce_max": Op(reduced(np.max)),
    "reduce_min": Op(reduced(np.min)),
    "softmax": Op(lambda x, axis=-1: softmax(x, int(axis))),
    "layer_norm": Op(layer_norm),
    "linear": Op(linear),
    "matmul": Op(matmul),
    "scaled_dot_product_attention": Op(attention),
    # moving
    "identity": _moves(lambda x: x),
    "gather": _moves(gather),
    "gather_along_axis": _moves(gather_along_axis),
    "topk": _moves(topk),
    "slice_by_index": _moves(slice_by_index),
    "slice_update": _moves(slice_update),
    "concat": _moves(lambda values, axis, interleave=False: np.concatenate(values, int(axis))),
    "stack": _moves(lambda values, axis: np.stack(values, int(axis))),
    "split": _moves(split),
    "tile": _moves(lambda x, reps: np.tile(x, _axes(reps))),
    "reshape": _moves(reshape),
    "transpose": _moves(lambda x, perm: x.transpose(_axes(perm))),
    "squeeze": _moves(squeeze),
    "expand_dims": _moves(lambda x, axes: np.expand_dims(x, _axes(axes))),
    "fill": _moves(lambda shape, value=0.0: np.full(_axes(shape), value)),
    "shape": _moves(lambda x: np.array(x.shape, np.int32)),
    "range_1d": _moves(lambda start, end, step: np.arange(start, end, step)),
    # compressed constants
    "constexpr_blockwise_shift_scale": Op(blockwise_shift_scale),
    "constexpr_lut_to_dense": _moves(lut_to_dense),
    "constexpr_cast": _moves(lambda source_val, output_dtype: source_val),
}
"""`const`, `read_state` and `write_state` are the machine's own."""
