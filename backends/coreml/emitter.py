"""What a MIL program is made of: named operations, constants that are there once, and changes of dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.base import Floats, QuantizedTensor
from backends.coreml.library import coremltools
from backends.coreml.names import mil_name
from backends.coreml.palettes import Palette

Var = Any
"""A value of the program (coremltools' `Var`)."""


@dataclass(frozen=True, eq=False)
class Half:
    """Rows stored as float16."""

    values: Any


Tensor = Floats | Half | QuantizedTensor | Palette
"""A weight as it will be stored."""


class Emitter:
    """Emits the operations of one function.

    tensors: every canonical tensor as stored, and the spec's constants by their own names. compute: `f16` or `f32`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], compute: str) -> None:
        coremltools()
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import types

        self._mb: Any = Builder  # its operations are attributes that are set when it is imported
        self._types = types
        self.tensors, self.half = tensors, compute == "f16"
        self._constants: dict[str, Var] = {}
        self.scope, self._count = "", 0

    def op(self, kind: str, **args: Any) -> Var:
        """One operation, with a name of its own that `rename` may replace."""
        self._count += 1
        return getattr(self._mb, kind)(**args, name=f"{self.scope}{kind}_{self._count}")

    def rename(self, x: Var, name: str) -> Var:
        """Call an operation by the tap that its result is."""
        name = mil_name(self.scope + name)
        x.set_name(name)
        x.op.name = name
        return x

    # Dtypes

    def is_half(self, x: Var) -> bool:
        """Whether a value is float16."""
        return x.dtype is self._types.fp16

    def wide(self, x: Var) -> Var:
        """As float32."""
        return self.op("cast", x=x, dtype="fp32") if self.is_half(x) else x

    def narrow(self, x: Var) -> Var:
        """As the compute dtype: where an operation of the forward pass is rounded."""
        return self.op("cast", x=x, dtype="fp16") if self.half else x

    def island(self, run: Callable[[Var], Var], x: Var) -> Var:
        """Several steps in float32, rounded once."""
        return self.narrow(run(self.wide(x)))

    # Constants

    def constant(self, name: str, value: Any) -> Var:
        """An array, in the program once."""
        if name not in self._constants:
            self._constants[name] = self._mb.const(val=value, name=name)
        return self._constants[name]

    def array(self, name: str) -> Any:
        """A float32 tensor that is no matrix of weights."""
        t = self.tensors[name]
        assert isinstance(t, np.ndarray), f"{name} is not stored as float32"
        return t

    def is_float32(self, canonical: str) -> bool:
        """Whether a tensor is stored as float32."""
        return isinstance(self.tensors[canonical], np.ndarray)

    def vector(self, canonical: str, wide: bool = True, shape: tuple[int, ...] = (-1,)) -> Var:
        """A vector: float32 inside norms and attention, in the compute dtype as a bias."""
        t = self.array(canonical).reshape(shape)
        return self.constant(mil_name(canonical), t if wide or not self.half else t.astype(np.float16))

    def matrix(self, canonical: str, experts: int = 0) -> Var:
        """A weight in the compute dtype, compressed where it is stored so: [N, K], or of experts, whose rows lie one
        below the other, [E, N, K]."""
        name = mil_name(canonical)
        if name not in self._constants:
            self._constants[name] = self._stored(name, self.tensors[canonical], (experts, -1) if experts else (-1,))
        return self._constants[name]

    def _stored(self, name: str, t: Tensor, rows: tuple[int, ...]) -> Var:
        dtype = np.float16 if self.half else np.float32

        def shaped(x: Any) -> Any:
            return x.reshape(*rows, x.shape[-1])

        match t:
            case QuantizedTensor():
                kind = self._types.np_int4_dtype if t.bits == 4 else np.int8
                data, scale = shaped(t.codes.view(kind)), shaped(t.scales.astype(dtype))
                return self._mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=name)
            case Palette():
                kind = {4: self._types.np_uint4_dtype, 6: self._types.np_uint6_dtype, 8: np.uint8}[t.bits]
                lut = shaped(t.tables.astype(dtype))[..., None, :, None]
                return self._mb.constexpr_lut_to_dense(indices=shaped(t.indices.view(kind)), lut=lut, name=name)
            case Half() if not self.half:
                return self._mb.constexpr_cast(source_val=shaped(t.values), output_dtype="fp32", name=name)
            case Half():
                return self._mb.const(val=shaped(t.values), name=name)
            case _:
                assert not self.half, f"{name}: float32 weights in a float16 program"
                return self._mb.const(val=shaped(t), name=name)
