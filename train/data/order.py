"""Small helpers of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def batched(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
