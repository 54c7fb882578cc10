"""The position of a call, from the state that counts tokens, and the masks that follow from it.

Shapes: T new tokens, S keys (past and new).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from backends.coreml.emitter import Emitter, Var
from backends.coreml.support import COUNTER


class Clock:
    """Reads the position state, advances it by the tokens of the call, and keeps what layers share.

    ids: int32 [1, T]. position: the state, float16 [1] (exact to 2048) or [2]: tokens % COUNTER and tokens // COUNTER.
    """

    def __init__(self, emit: Emitter, ids: Var, position: Var) -> None:
        self._emit = emit
        self._masks: dict[Any, Var] = {}
        emit.scope = "position_"
        op = emit.op
        count = op("slice_by_index", x=op("shape", x=ids), begin=[1], end=[2])
        past = op("cast", x=op("read_state", input=position), dtype="int32")
        two = position.sym_type.wrapped_type().get_shape()[0] == 2
        if two:
            past = op("mul", x=past, y=np.array([1, COUNTER], np.int32))
            past = op("reduce_sum", x=past, axes=[0], keep_dims=True)
        now = end = op("add", x=past, y=count)
        if two:
            parts = [op(kind, x=end, y=np.int32(COUNTER)) for kind in ("mod", "floor_div")]
            now = op("concat", values=parts, axis=0)
        op("coreml_update_state", state=position, value=op("cast", x=now, dtype="fp16"))
        self.past, self.end = past, end
        """Tokens before the call and after it, int32 [1]."""
        self.queries = op("expand_dims", x=op("add", x=self._range(count), y=past), axes=[0])
        """Positions of the new tokens, [1, T]."""
        self.keys = self._range(end)
        """Positions of the keys, [S]."""
        emit.scope = ""

    def _range(self, length: Var) -> Var:
        end = self._emit.op("squeeze", x=length)
        return self._emit.op("range_1d", start=np.int32(0), end=end, step=np.int32(1))

    def distance(self, wide: bool = False) -> Var:
        """How far each key lies before each query, int32 or float32 [1, 1, T, S]."""
        op = self._emit.op
        if "distance" not in self._masks:
            query = op("expand_dims", x=self.queries, axes=[1, 3])
            key = op("expand_dims", x=self.keys, axes=[0, 1, 2])
            self._masks["distance"] = op("sub", x=query, y=key)
        if wide and "wide" not in self._masks:
            self._masks["wide"] = op("cast", x=self._masks["distance"], dtype="fp32")
        return self._masks["wide" if wide else "distance"]

    def mask(self, window: int | None, repeat: int = 1) -> Var:
        """What each query sees, the queries `repeat` times one after another: bool [1, 1, repeat * T, S]."""
        op, key = self._emit.op, (window, repeat)
        if key not in self._masks and repeat > 1:
            self._masks[key] = op("tile", x=self.mask(window), reps=[1, 1, repeat, 1])
        elif key not in self._masks:
            seen = op("greater_equal", x=self.distance(), y=np.int32(0))
            if window is not None:
                near = op("less", x=self.distance(), y=np.int32(window))
                seen = op("logical_and", x=seen, y=near)
            self._masks[key] = seen
        return self._masks[key]
