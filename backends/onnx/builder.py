"""Nodes, constants and initializers of one graph under construction, each with a name that says where it belongs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from backends.onnx.layout import BITS, DATA, Stored

DTYPES = {
    "f32": ir.DataType.FLOAT, "f16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "i64": ir.DataType.INT64,
    "i32": ir.DataType.INT32, "i8": ir.DataType.INT8, "u8": ir.DataType.UINT8, "i4": ir.DataType.INT4,
    "bool": ir.DataType.BOOL, "e4m3": ir.DataType.FLOAT8E4M3FN, "e2m1": ir.DataType.FLOAT4E2M1,
}  # fmt: skip
"""ONNX's types by our names."""

CONTRIB = "com.microsoft"


class Builder:
    """Collects what a graph is made of. `scope` (`L3.`) leads the names of everything that is added."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.scope = ""
        self._used: Counter[str] = Counter()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._tapped: set[ir.Value] = set()
        self._named = True

    def __call__(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output, which is returned."""
        return self.several(kind, 1, *inputs, domain=domain, **attributes)[0]

    def several(
        self, kind: str, count: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Add a node with `count` outputs."""
        name = f"{self.scope}{kind}"
        self._used[name] += 1
        name = f"{name}.{self._used[name]}"
        given = {k: v for k, v in attributes.items() if v is not None}
        node = ir.Node(domain, kind, inputs, ir.convenience.convert_attributes(given), num_outputs=count, name=name)
        for i, out in enumerate(node.outputs):
            out.name = name if count == 1 else f"{name}:{i}"
        self.nodes.append(node)
        return tuple(node.outputs)

    def name(self, x: ir.Value, name: str) -> ir.Value:
        """Give a value and its node a canonical name; a value keeps the first that it gets."""
        if self._named and x.producer() is not None and x not in self._tapped:
            self._tapped.add(x)
            self.rename(x, f"{self.scope}{name}")
        return x

    @contextmanager
    def unnamed(self) -> Iterator[None]:
        """Values get no canonical names: what belongs to one expert, or to all of them at once, has none."""
        self._named = False
        try:
            yield
        finally:
            self._named = True

    def loop(
        self,
        count: ir.Value,
        carried: ir.Value,
        dtype: str,
        shape: Sequence[int | str],
        body: Callable[[ir.Value, ir.Value], ir.Value],
    ) -> ir.Value:
        """`carried = body(i, carried)` for i in 0 .. count - 1; `dtype` and `shape` are the carried value's."""

        def formal(name: str, kind: str, sizes: Sequence[int | str]) -> ir.Value:
            return ir.Value(name=f"{self.scope}loop.{name}", type=ir.TensorType(DTYPES[kind]), shape=ir.Shape(sizes))

        inputs = [formal("i", "i64", ()), formal("go", "bool", ()), formal("carried", dtype, shape)]
        outside, self.nodes = self.nodes, []
        try:
            with self.unnamed():
                result = body(inputs[0], inputs[2])
                outputs = [self("Identity", inputs[1]), result]
            for value, like in zip(outputs, inputs[1:], strict=True):
                value.type, value.shape = like.type, like.shape
            inner = ir.Graph(inputs, outputs, nodes=self.nodes, name=f"{self.scope}loop")
        finally:
            self.nodes = outside
        return self("Loop", count, self.constant(True, "bool"), carried, body=inner)

    def rename(self, x: ir.Value, name: str) -> None:
        """Another name for a value and for its node."""
        node = x.producer()
        assert node is not None, f"{x.name} comes from outside"
        x.name = name
        if len(node.outputs) == 1:
            node.name = name

    def constant(self, value: Any, dtype: str) -> ir.Value:
        """A small constant inside the model file: one initializer for each distinct value."""
        kind = DTYPES[dtype]
        array = np.asarray(value).astype(kind.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant.{len(self._constants)}"
            self._constants[key] = self._initializer(name, ir.Tensor(array, kind, name=name))
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A vector of int64."""
        return self.constant(values, "i64")

    def stored(self, t: Stored, view: tuple[str, str, tuple[int, ...]] | None = None) -> ir.Value:
        """A tensor of the data file; `view` (name, dtype, shape) reads the same bytes differently."""
        name, dtype, shape = view or (t.name, t.dtype, t.shape)
        if name not in self.initializers:
            nbytes = prod(shape) * BITS[dtype] // 8
            tensor = ir.ExternalTensor(DATA, t.offset, nbytes, DTYPES[dtype], shape=ir.Shape(shape), name=name)
            self._initializer(name, tensor)
        return self.initializers[name]

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers[name] = value
        return value
