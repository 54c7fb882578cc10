"""The residual stream between two layers, on disk: rows of float32, read and written a few windows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats
from convert.calibrate.store import PARTIAL, publish
from convert.sources.store import pread
from spec.errors import UserError


class Boundary:
    """[windows, tokens, width] in a file. Raises `UserError` where the disk refuses."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape

    @property
    def row(self) -> int:
        """Bytes of a window."""
        return self.shape[1] * self.shape[2] * 4

    @property
    def whole(self) -> bool:
        """Whether it was written to its end."""
        return self.path.is_file()

    def read(self, start: int, stop: int) -> Floats:
        """Windows start..stop."""
        out = np.empty((stop - start, *self.shape[1:]), np.float32)
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError as e:
            raise UserError(f"{self.path}: {e.strerror}") from None
        try:
            pread(fd, start * self.row, out, self.path)
        finally:
            os.close(fd)
        return out

    @contextmanager
    def writing(self) -> Iterator[Sink]:
        """Takes the windows in any order; the file has its name once the block ends, and only then."""
        partial = self.path.with_name(self.path.name + PARTIAL)
        try:
            with partial.open("wb") as f:
                yield Sink(f.fileno(), self.row)
                f.flush()
                os.fsync(f.fileno())
            publish(partial, self.path)
        except OSError as e:
            partial.unlink(missing_ok=True)
            raise UserError(f"{self.path}: {e.strerror or e}") from None

    def keep(self, windows: int) -> None:
        """Drop all but the first windows; with none, the file."""
        if windows:
            os.truncate(self.path, windows * self.row)
        else:
            self.path.unlink(missing_ok=True)


class Sink:
    """A boundary that is being written."""

    def __init__(self, fd: int, row: int) -> None:
        self._fd, self._row = fd, row

    def __call__(self, start: int, windows: NDArray[np.float32]) -> None:
        """Windows start..."""
        data, at, done = memoryview(np.ascontiguousarray(windows).data).cast("B"), start * self._row, 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], at + done)
