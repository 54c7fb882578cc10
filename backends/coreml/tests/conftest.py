"""Quicker tests: coremltools collects garbage in every conversion."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def small_collections() -> Iterator[None]:
    """What was imported before need not be searched each time."""
    gc.freeze()
    yield
    gc.unfreeze()
