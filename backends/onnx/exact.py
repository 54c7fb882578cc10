"""The shipped graph without its roundings, in memory: float32 throughout, on the same data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from backends.onnx.builder import CONTRIB
from backends.onnx.layout import MODEL

FULL = 1
"""MatMulNBits' and QMoE's accuracy level for float32 arithmetic."""
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
UNSIGNED = {8: ir.DataType.UINT8, 4: ir.DataType.UINT4}
SHARED = ("k", "activation_type", "activation_alpha", "activation_beta", "swiglu_fusion", "swiglu_limit")
"""Attributes that QMoE has in common with MoE."""


def exact_model(folder: Path, compute: str) -> bytes:
    """The serialized model of a folder: products with codes at accuracy level 1, 16-bit compute widened to float32."""
    made = ir.load(folder / MODEL)
    for node in list(made.graph.all_nodes()):
        if node.op_type == "QMoE" and 8 in _bits(node):
            _dequantize(made.graph, node)
        elif "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", FULL)
    if compute != "f32":
        _widen(made.graph)
    return ir.to_proto(made).SerializeToString()


def _bits(node: ir.Node) -> tuple[int, int]:
    """Of QMoE's codes: in its first and in its second matrix."""
    first, second = (node.attributes[n].as_int() for n in ("expert_weight_bits", "fc2_expert_weight_bits"))
    return first, second


def _dequantize(graph: ir.Graph, node: ir.Node) -> None:
    """QMoE has no float32 kernel for codes of 8 bits; MoE has. It takes what it finds for logits of a softmax, so that
    weights come out divided by their sum."""
    x, share, *held = node.inputs[:8]
    assert x is not None and share is not None
    new: list[ir.Node] = []

    def add(kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        made = ir.Node(domain, kind, inputs, ir.convenience.convert_attributes(attributes))
        made.name = made.outputs[0].name = f"{node.name}.{kind}.{len(new)}"
        new.append(made)
        return made.outputs[0]

    def constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        graph.register_initializer(value)
        return value

    matrices: list[ir.Value | None] = []
    group = node.attributes["block_size"].as_int()
    for (codes, scales, bias), bits in zip((held[:3], held[3:]), _bits(node), strict=True):
        assert codes is not None and scales is not None and isinstance(codes.const_value, ir.ExternalTensor)
        t, groups = codes.const_value, scales.const_value.shape.numpy()  # type: ignore[union-attr]
        kind, shape = UNSIGNED[bits], ir.Shape((*groups[:2], groups[2] * group))
        name = f"{codes.name}.exact"
        table = constant(name, ir.ExternalTensor(t.location, t.offset, t.length, kind, shape=shape, name=name))
        middle = np.full(groups, 1 << (bits - 1), kind.numpy())
        zero = constant(f"{name}.zero", ir.Tensor(middle, kind, name=f"{name}.zero"))
        matrices += [add("DequantizeLinear", table, scales, zero, axis=2, block_size=group), bias]
    attributes = {n: node.attributes[n].value for n in SHARED if n in node.attributes}
    y = add("MoE", x, add("Log", share), *matrices, domain=CONTRIB, **attributes)
    if not node.attributes["normalize_routing_weights"].as_int():
        axis = constant(f"{node.name}.axis", ir.Tensor(np.array([-1]), name=f"{node.name}.axis"))
        sizes = constant(f"{node.name}.sizes", ir.Tensor(np.array([-1, _width(node)]), name=f"{node.name}.sizes"))
        y = add("Mul", add("Reshape", y, sizes), add("ReduceSum", share, axis))
        y = add("Reshape", y, add("Shape", x))
    node.outputs[0].replace_all_uses_with(y)
    graph.insert_before(node, new)
    graph.remove(node)


def _width(node: ir.Node) -> int:
    """Width of QMoE's result."""
    codes = node.inputs[5]
    assert codes is not None and codes.shape is not None
    return int(codes.shape.numpy()[1])


def _widen(graph: ir.Graph) -> None:
    """Every 16-bit value becomes float32: inputs, outputs, constants, casts; stored weights behind a cast."""
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype in NARROW:
            value.dtype = ir.DataType.FLOAT
    for node in graph.all_nodes():
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
