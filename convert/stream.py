"""The pipe: rows are read in one thread, rounded in several, and handed on in order, with few blocks in flight."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from backends.base import ContentHash, Planned, QuantizedTensor, Values
from convert.levels import CODES, GROUPS, LEVELS, takes
from convert.quantize import TooLarge, quantize, round_floats
from convert.sources import Source
from spec.errors import UserError

T = TypeVar("T")

READ_AHEAD = 2
"""Blocks that wait between the reader and the workers."""


@dataclass(frozen=True)
class Block:
    """Rows start... of a canonical tensor, rounded to its level."""

    name: str
    start: int
    values: Values
    weights: int


def rounded(name: str, level: str, start: int, rows: Values) -> Values:
    """Rows at a portable level; native levels pass as float32, their backend rounds. Codes and scales stay what they
    are at a level that takes them so. Raises `UserError`."""
    try:
        if isinstance(rows, QuantizedTensor):
            if takes(level, rows.bits, rows.group):
                return replace(rows.grouped(GROUPS[level]), bits=CODES[level])
            rows = rows.dequantize()
        chosen = LEVELS.get(level)
        if chosen is None:
            return rows
        return round_floats(rows, level) if chosen.group is None else quantize(rows, chosen.bits, chosen.group)
    except TooLarge as e:
        raise UserError(e.at(name, start)) from None


class Stream:
    """Every block of a source at its planned level, in canonical order. `hashes` has each tensor's source hash once
    its last block was handed on."""

    def __init__(self, source: Source, planned: Iterable[Planned], threads: int) -> None:
        self.source, self.threads = source, max(1, threads)
        self.levels = {p.name: p.level for p in planned}
        self.hashes: dict[str, str] = {}

    def __iter__(self) -> Iterator[Block]:
        """Blocks in order. Errors of the reader and of the workers are raised here; leaving early stops both."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="round")
        waiting: deque[tuple[str, int, int, Future[Values]]] = deque()
        reader = ReadAhead(self._read(), READ_AHEAD)
        try:
            for name, start, rows in reader:
                weights = rows.shape[0] * (rows.shape[1] if len(rows.shape) > 1 else 1)
                waiting.append((name, start, weights, pool.submit(rounded, name, self.levels[name], start, rows)))
                del rows  # the worker's now
                while len(waiting) > self.threads:
                    yield _finished(waiting)
            while waiting:
                yield _finished(waiting)
        finally:
            reader.stop()
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self) -> Iterator[tuple[str, int, Values]]:
        for name in self.source.names():
            calibrated = self.source.rounding if name in (self.source.rounding or ()) else None
            digest = ContentHash()
            for start, rows in self.source.values(name):
                dense = calibrated is None and isinstance(rows, QuantizedTensor)
                digest.update(rows.dequantize() if dense else rows)
                yield name, start, rows
            self.hashes[name] = digest.hexdigest()
            if calibrated is not None:
                if self.hashes[name] != calibrated.hashes[name]:
                    raise UserError(f"{calibrated.folder}: the codes of {name} are damaged: delete the folder and "
                                    "calibrate again")  # fmt: skip
                self.hashes[name] = calibrated.source_hashes[name]


def _finished(waiting: deque[tuple[str, int, int, Future[Values]]]) -> Block:
    name, start, weights, future = waiting.popleft()
    return Block(name, start, future.result(), weights)


class ReadAhead(Generic[T]):
    """An iterator that another thread runs up to `depth` items ahead."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put((item,)):
                    return
                del item
            self._put(None)
        except BaseException as e:  # raised again where the items are read
            self._put(e)

    def _put(self, item: tuple[T] | BaseException | None) -> bool:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False

    def __iter__(self) -> Iterator[T]:
        while (got := self._queue.get()) is not None:
            if isinstance(got, BaseException):
                raise got
            yield got[0]
            del got

    def stop(self) -> None:
        """End the thread, whatever is left."""
        self._stopped.set()
        self._thread.join()
