"""MIL's rules for types: which operands of an operation have one type, and what its result has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.coreml.mil.program import Function, Instruction, Ref
from backends.coreml.mil.weights import Blob
from spec.errors import UserError

_PAIRS = ("add", "sub", "mul", "real_div", "floor_div", "mod", "pow", "maximum", "minimum", "matmul", "equal",
          "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and", "logical_or")  # fmt: skip
OPERANDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_PAIRS, ("x", "y")),
    **dict.fromkeys(("rsqrt", "inverse", "log"), ("x", "epsilon")),
    "clip": ("x", "alpha", "beta"),
    "select": ("a", "b"),
    "layer_norm": ("x", "gamma", "beta", "epsilon"),
    "linear": ("x", "weight", "bias"),
    "scaled_dot_product_attention": ("query", "key", "value"),
    "slice_update": ("x", "update"),
    "concat": ("values",),
    "stack": ("values",),
    "range_1d": ("start", "end", "step"),
    "fill": ("value",),
    "read_state": ("input",),
    "write_state": ("input", "data"),
    "const": ("val",),
    "constexpr_blockwise_shift_scale": ("scale",),
    "constexpr_lut_to_dense": ("lut",),
}
"""Operands of one type, which is the result's too; of an operation that is not here, `x`."""
RESULTS: dict[str, str] = {
    **dict.fromkeys(("equal", "not_equal", "less", "less_equal", "greater", "greater_equal", "logical_and",
                     "logical_or", "logical_not"), "BOOL"),
    "shape": "INT32",
}  # fmt: skip
"""Operations whose result has a type of its own."""
CASTS = {"cast": "dtype", "constexpr_cast": "output_dtype"}
"""Operations that name their result's type, and the argument that does."""
NAMED = {"fp16": "FLOAT16", "fp32": "FLOAT32", "int32": "INT32", "int16": "INT16", "uint16": "UINT16", "int8": "INT8",
         "uint8": "UINT8", "bool": "BOOL"}  # fmt: skip
_ARRAYS = {"float32": "FLOAT32", "float16": "FLOAT16", "int64": "INT64"} | {
    k: v for k, v in NAMED.items() if k[0] != "f"
}


def dtype_of(value: Any) -> str:
    """The type of a constant, as the program writes it."""
    if isinstance(value, Blob):
        return value.dtype
    return "STRING" if isinstance(value, str) else _ARRAYS[str(value.dtype)]


def check(f: Function) -> None:
    """Whether operands and results have the types that the rules ask for. Raises `UserError` at the first that has
    not."""
    types = {i.name: i.dtype for i in (*f.inputs, *f.states)}
    texts: dict[str, str] = {}
    for i in f.body:
        found = [_type(a, types) for key in OPERANDS.get(i.type, ("x",)) for a in _several(i.args.get(key, []))]
        if len(set(found)) > 1:
            raise UserError(f"{_place(f, i)}: {i.type} of {' and '.join(found)}, which MIL does not mix")
        want = RESULTS.get(i.type) or _cast(i, texts) or found[0]
        for n, o in enumerate(i.outputs):
            want = "INT32" if i.type == "topk" and n else want
            if o.dtype != want:
                raise UserError(f"{_place(f, i)}: {i.type} gives {want}, and {o.dtype} is declared")
            types[o.name] = o.dtype
        if i.type == "const" and isinstance(i.args["val"], str):
            texts[i.outputs[0].name] = i.args["val"]


def _cast(i: Instruction, texts: Mapping[str, str]) -> str | None:
    to = i.args.get(CASTS.get(i.type, ""))
    return None if to is None else NAMED[texts[to.name] if isinstance(to, Ref) else to]


def _several(argument: Any) -> list[Any]:
    return argument if isinstance(argument, list) else [argument]


def _type(argument: Any, types: Mapping[str, str]) -> str:
    return types[argument.name] if isinstance(argument, Ref) else dtype_of(argument)


def _place(f: Function, i: Instruction) -> str:
    return f"{f.name}, {i.outputs[0].name if i.outputs else i.type}"
