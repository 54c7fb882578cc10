"""The key/value cache: one fixed buffer a layer. B batch, G kv-heads, S slots, K head dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spec.errors import UserError


def visible(start: int, tokens: int, window: int | None) -> range:
    """The slots that queries start .. start + tokens - 1 can see between them."""
    return range(0 if window is None else max(0, start - window + 1), start + tokens)


class LayerCache:
    """Keys and values of one layer, [B, G, capacity, K], allocated when the first ones arrive (their dtype, device and
    head count may be a shard's)."""

    def __init__(self, capacity: int, window: int | None) -> None:
        self.capacity, self.window, self.length = capacity, window, 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append T keys and values [B, G, T, K]; returns all that the new queries can see, and their slots [S]."""
        if self.k is None or self.v is None:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        start, tokens = self.length, k.shape[2]
        if start + tokens > self.capacity:
            raise full(start, tokens, self.capacity)
        self.k[:, :, start : start + tokens] = k
        self.v[:, :, start : start + tokens] = v
        self.length = start + tokens
        seen = visible(start, tokens, self.window)
        slots = torch.arange(seen.start, seen.stop, device=k.device)
        return self.k[:, :, seen.start : seen.stop], self.v[:, :, seen.start : seen.stop], slots


class Cache(Sequence[LayerCache]):
    """A sequence's cache, one entry a layer, made by `Decoder.new_cache`. No list: FSDP copies those."""

    def __init__(self, batch: int, capacity: int, windows: list[int | None]) -> None:
        self._layers = [LayerCache(capacity, w) for w in windows]
        self.batch, self.capacity = batch, capacity

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, i: Any) -> Any:
        return self._layers[i]

    @property
    def length(self) -> int:
        """Tokens stored so far."""
        return self[0].length

    def truncate(self, length: int) -> None:
        """Forget everything from slot `length` on."""
        for layer in self:
            layer.length = min(layer.length, length)


def full(start: int, tokens: int, capacity: int) -> UserError:
    """What is raised instead of writing past the buffer's end."""
    return UserError(
        f"cache: {start} + {tokens} tokens do not fit in its {capacity} slots (make a longer one, up to the context)"
    )
