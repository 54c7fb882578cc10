"""Keys and values of our own runtime, with the face of mlx-lm's caches.

B batch, G kv-heads, S keys, T new, K head dim.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from backends.mlx.levels import Packing
from backends.mlx.model import Model, causal

STEP = 256
"""Buffers grow by this many slots at least."""


class Cache:
    """One layer's keys and values in the order of their slots; with a window, only those that a new token can see.

    A window's buffer holds window - 1 old keys and room for new ones. When that is full, the old keys that still
    matter move to its front, so its size depends on the window and the longest chunk and not on the session.

    With a packing (of keys, of values; none keeps floats) a buffer holds what `mx.quantize` makes of each key: codes,
    scales and biases. New tokens see their own keys as they come out of it too, so that a prompt gives what its tokens
    one by one give.
    """

    def __init__(
        self, window: int | None = None, packings: tuple[Packing | None, Packing | None] = (None, None)
    ) -> None:
        self.window, self.packings, self.offset = window, packings, 0
        self._buffers: list[tuple[mx.array, ...]] = [(), ()]
        self._end = 0

    @property
    def past(self) -> int:
        """Old keys that new tokens may see."""
        return self.offset if self.window is None else min(self.offset, self.window - 1)

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """[B, G, T, K] behind the others; returns all that the T new tokens can see, [B, G, S, K]."""
        past, t = self.past, k.shape[2]
        first = self._end - past
        new = [_packed(x, p) for x, p in zip((k, v), self.packings, strict=True)]
        if not self._buffers[0] or self._end + t > self._buffers[0][0].shape[2]:
            room = -(-t // STEP) * STEP if self.window is None else max(t, STEP)
            for n, parts in enumerate(new):
                old = self._buffers[n] or (None,) * len(parts)
                self._buffers[n] = tuple(_moved(o, x, first, past, room) for o, x in zip(old, parts, strict=True))
            first, self._end = 0, past
        for buffer, parts in zip(self._buffers, new, strict=True):
            for held, x in zip(buffer, parts, strict=True):
                held[:, :, self._end : self._end + t] = x
        self._end += t
        self.offset += t
        keys, values = (
            _unpacked(tree_map(lambda x: x[:, :, first : self._end], held), p)
            for held, p in zip(self._buffers, self.packings, strict=True)
        )
        return keys, values

    def make_mask(self, t: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of T tokens that come next."""
        return causal(t, self.past, window_size, return_array)

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return sum(x.nbytes for buffer in self._buffers for x in buffer)


def _packed(x: mx.array, p: Packing | None) -> tuple[mx.array, ...]:
    return (x,) if p is None else tuple(mx.quantize(x, group_size=p.group, bits=p.bits))


def _unpacked(parts: tuple[mx.array, ...], p: Packing | None) -> mx.array:
    return parts[0] if p is None else mx.dequantize(*parts, group_size=p.group, bits=p.bits)


def _moved(old: mx.array | None, new: mx.array, first: int, past: int, room: int) -> mx.array:
    """A buffer of `past + room` slots that begins with `past` slots of another."""
    b, g, _, k = new.shape
    free = mx.zeros((b, g, room, k), new.dtype)
    return free if old is None else mx.concatenate([old[:, :, first : first + past], free], 2)


def new_cache(model: Model, packings: tuple[Packing | None, Packing | None] = (None, None)) -> list[Cache]:
    """An empty cache, one entry a layer."""
    return [Cache(layer.attn.kind[0], packings) for layer in model.layers]
