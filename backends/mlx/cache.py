"""Keys and values of our own runtime, with the face of mlx-lm's caches.

B batch, G kv-heads, S keys, T new, K head dim.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from backends.mlx.model import Model, causal

STEP = 256
"""Buffers grow by this many slots at least."""


class Cache:
    """One layer's keys and values in the order of their slots; with a window, only those that a new token can see.

    A window's buffer holds window - 1 old keys and room for new ones. When that is full, the old keys that still
    matter move to its front, so its size depends on the window and the longest chunk and not on the session.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window, self.offset = window, 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._end = 0

    @property
    def past(self) -> int:
        """Old keys that new tokens may see."""
        return self.offset if self.window is None else min(self.offset, self.window - 1)

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """[B, G, T, K] behind the others; returns all that the T new tokens can see, [B, G, S, K]."""
        past, t = self.past, k.shape[2]
        first = self._end - past
        if self.keys is None or self.values is None or self._end + t > self.keys.shape[2]:
            room = -(-t // STEP) * STEP if self.window is None else max(t, STEP)
            self.keys, self.values = (
                _moved(old, new, first, past, room) for old, new in ((self.keys, k), (self.values, v))
            )
            first, self._end = 0, past
        self.keys[:, :, self._end : self._end + t] = k
        self.values[:, :, self._end : self._end + t] = v
        self._end += t
        self.offset += t
        return self.keys[:, :, first : self._end], self.values[:, :, first : self._end]

    def make_mask(self, t: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """The mask of T tokens that come next."""
        return causal(t, self.past, window_size, return_array)

    @property
    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes


def _moved(old: mx.array | None, new: mx.array, first: int, past: int, room: int) -> mx.array:
    """A buffer of `past + room` slots that begins with `past` slots of another."""
    b, g, _, k = new.shape
    free = mx.zeros((b, g, room, k), new.dtype)
    return free if old is None else mx.concatenate([old[:, :, first : first + past], free], 2)


def new_cache(model: Model) -> list[Cache]:
    """An empty cache, one entry a layer."""
    return [Cache(layer.attn.kind[0]) for layer in model.layers]
