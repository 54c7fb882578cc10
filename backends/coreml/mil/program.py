"""A saved program as plain data: functions, and their operations in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.coreml.mil.weights import Array, Blob, decode

Value = Array | Blob | str
"""A constant: an array, a tensor of the weight file, or text."""

FLOATS = ("FLOAT16", "FLOAT32")
_PLAIN: dict[str, Any] = {"FLOAT32": np.float32, "INT32": np.int32, "BOOL": np.bool_, "INT64": np.int64}


@dataclass(frozen=True)
class Ref:
    """An argument that is another operation's result."""

    name: str


@dataclass(frozen=True)
class Output:
    """A result and its type, or what a function takes."""

    name: str
    dtype: str
    """`FLOAT16`, `INT32`, ... as in the program."""
    shape: tuple[int | None, ...]
    """None where it varies."""


@dataclass(frozen=True)
class Instruction:
    """One operation. An argument is one value or reference, or several."""

    type: str
    args: Mapping[str, Any]
    outputs: tuple[Output, ...]

    def refs(self) -> list[str]:
        """Names of the results that it reads."""
        flat = [a for arg in self.args.values() for a in (arg if isinstance(arg, list) else [arg])]
        return [a.name for a in flat if isinstance(a, Ref)]


@dataclass(frozen=True)
class Function:
    """Operations in order, constants included."""

    name: str
    inputs: tuple[Output, ...]
    states: tuple[Output, ...]
    body: tuple[Instruction, ...]
    outputs: tuple[str, ...]


def functions(model: Any, weights: Path) -> dict[str, Function]:
    """The functions of a parsed model (`Model_pb2.Model`) whose weight files lie in the folder `weights`."""
    return {name: _function(name, f, weights) for name, f in model.mlProgram.functions.items()}


def default_function(model: Any) -> str:
    """The function that runs where a client names none."""
    return model.description.defaultFunctionName or "main"


def _function(name: str, proto: Any, weights: Path) -> Function:
    block = proto.block_specializations[proto.opset]
    inputs, states = [], []
    for i in proto.inputs:
        kind = i.type.WhichOneof("type")
        if kind == "stateType":
            states.append(_output(i.name, i.type.stateType.wrappedType))
        else:
            inputs.append(_output(i.name, i.type))
    body = tuple(_instruction(op, weights) for op in block.operations)
    return Function(name, tuple(inputs), tuple(states), body, tuple(block.outputs))


def _output(name: str, kind: Any) -> Output:
    tensor = kind.tensorType
    sizes = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    return Output(name, _dtype(tensor), sizes)


def _dtype(tensor: Any) -> str:
    return tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number[tensor.dataType].name


def _instruction(op: Any, weights: Path) -> Instruction:
    assert not op.blocks, f"{op.type}: control flow is none of ours"
    args: dict[str, Any] = {}
    for key, argument in op.inputs.items():
        found = [Ref(b.name) if b.WhichOneof("binding") == "name" else _value(b.value, weights)
                 for b in argument.arguments]  # fmt: skip
        args[key] = found if len(found) != 1 or key == "values" else found[0]
    if op.type == "const":
        args["val"] = _value(op.attributes["val"], weights)
    return Instruction(op.type, args, tuple(_output(o.name, o.type) for o in op.outputs))


def _value(value: Any, weights: Path) -> Value:
    tensor = value.type.tensorType
    shape = tuple(d.constant.size for d in tensor.dimensions)
    dtype = _dtype(tensor)
    if value.WhichOneof("value") == "blobFileValue":
        return Blob(weights / value.blobFileValue.fileName.rsplit("/", 1)[-1], value.blobFileValue.offset, dtype, shape)
    held = value.immediateValue.tensor
    kind = held.WhichOneof("value")
    content: Sequence[Any] | bytes = getattr(held, kind).values if kind else b""
    if dtype == "STRING":
        return str(content[0])
    if kind == "bytes":
        assert isinstance(content, bytes)
        return decode(content, dtype, shape)
    return np.array(content, _PLAIN[dtype]).reshape(shape)
