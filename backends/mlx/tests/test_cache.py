"""Our caches: bounded by the window, right at every boundary."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx

from backends.mlx.cache import STEP, Cache
from backends.mlx.model import causal


def tokens(first: int, count: int) -> mx.array:
    """[1, 1, T, 1]: each key is its own slot."""
    return mx.arange(first, first + count).astype(mx.float32)[None, None, :, None]


def seen(cache: Cache, first: int, count: int, window: int | None) -> list[list[int]]:
    """The slots that each new token sees, by the mask and the keys that come back."""
    mask = cache.make_mask(count, return_array=True, window_size=window)
    keys, _ = cache.update_and_fetch(tokens(first, count), tokens(first, count))
    slots = np.array(keys[0, 0, :, 0]).astype(int)
    rows = np.ones((count, len(slots)), bool) if mask is None else np.array(mask)
    return [slots[row].tolist() for row in rows]


@pytest.mark.parametrize("window", [None, 1, 2, 5, 64, 300])
@pytest.mark.parametrize(
    "chunks", [[1] * 40, [7] * 9, [5, 1, 4, 1, 1, 300, 1, 64, 63, 65, 1], [512, 1, 1, 255, 256, 257]]
)
def test_every_token_sees_its_window(window: int | None, chunks: list[int]) -> None:
    cache, at = Cache(window), 0
    for n in chunks:
        want = [list(range(0 if window is None else max(0, i - window + 1), i + 1)) for i in range(at, at + n)]
        assert seen(cache, at, n, window) == want
        at += n
    assert cache.offset == at


def test_a_window_bounds_the_memory() -> None:
    whole, windowed = Cache(), Cache(32)
    for i in range(1500):
        for cache in (whole, windowed):
            cache.update_and_fetch(tokens(i, 1), tokens(i, 1))
    assert windowed.nbytes <= 2 * 4 * (32 + STEP)
    assert whole.nbytes >= 2 * 4 * 1500


def test_masks_are_arrays_only_where_they_must_be() -> None:
    assert causal(1, 9, None, False) is None
    assert causal(5, 9, None, False) == "causal"
    assert causal(5, 3, 8, False) == "causal"
    assert causal(5, 4, 8, False).shape == (5, 9)
    assert causal(5, 0, None, True).dtype == mx.bool_
