"""Steps of a chain computed ahead of their use, in one thread.

Every step begins where the one before it ended, so what has been computed ahead changes nothing: whoever takes a step
says where it stands, and what was computed from elsewhere is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Place = TypeVar("Place", bound=Hashable)
Kind = TypeVar("Kind", bound=Hashable)
Made = TypeVar("Made")


class Ahead(Generic[Place, Kind, Made]):
    """`make(place, kind)` -> (what was made, the next place), for `depth` steps ahead of the one that is taken.

    `device` is the CUDA device that `make` pins memory for.
    """

    def __init__(
        self,
        make: Callable[[Place, Kind], tuple[Made, Place]],
        depth: int,
        device: torch.device | None = None,
    ) -> None:
        self._make, self._depth, self._device = make, depth, device
        self._steps: deque[Future[tuple[Made, Place]]] = deque()
        self._next: tuple[Place, Kind] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def take(self, place: Place, kind: Kind) -> tuple[Made, Place]:
        """The step from here. Raises what `make` raised in it."""
        if not self._depth:
            return self._make(place, kind)
        if self._next != (place, kind):
            self._drop()
        if not self._steps:
            self._submit(place, kind)
        try:
            made, after = self._steps[0].result()
        except BaseException:
            self._drop()
            raise
        self._steps.popleft()
        self._next = after, kind
        while len(self._steps) < self._depth:
            self._submit(after, kind)
        return made, after

    def _submit(self, place: Place, kind: Kind) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "batches", self._begin)
        before = self._steps[-1] if self._steps else None

        def work() -> tuple[Made, Place]:
            return self._make(place if before is None else before.result()[1], kind)  # the thread made it already

        self._steps.append(self._thread.submit(work))

    def _begin(self) -> None:
        if self._device is not None:  # of this thread; pinning would otherwise open a context on the first GPU
            torch.cuda.set_device(self._device)

    def _drop(self) -> None:
        for step in self._steps:
            step.cancel()
        self._steps.clear()
        self._next = None

    def close(self) -> None:
        """Stop working ahead; the step under way is waited for."""
        self._drop()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
