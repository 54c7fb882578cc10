"""The shipped graph without its roundings, in memory: float32 throughout, on the same data file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from backends.onnx.layout import MODEL

FULL = 1
"""MatMulNBits' accuracy level for float32 arithmetic."""
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def exact_model(folder: Path, compute: str) -> bytes:
    """The serialized model of a folder: products with codes at accuracy level 1, 16-bit compute widened to float32."""
    made = ir.load(folder / MODEL)
    for node in made.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FULL)
    if compute != "f32":
        _widen(made.graph)
    return ir.to_proto(made).SerializeToString()


def _widen(graph: ir.Graph) -> None:
    """Every 16-bit value becomes float32: inputs, outputs, constants, casts; stored weights behind a cast."""
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype in NARROW:
            value.dtype = ir.DataType.FLOAT
    for node in graph:
        to = node.attributes.get("to")
        if to is not None and to.as_int() in NARROW:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    first = next(iter(graph))
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in NARROW:
            continue
        if isinstance(tensor, ir.ExternalTensor):
            cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"{name}.widened")
            cast.outputs[0].name = f"{name}.widened"
            users = [(node, i) for node, i in value.uses() if node is not cast]
            for node, i in users:
                node.replace_input_with(i, cast.outputs[0])
            graph.insert_before(first, cast)
        else:
            value.const_value = ir.Tensor(tensor.numpy().astype(np.float32), name=name)
            value.dtype = ir.DataType.FLOAT
