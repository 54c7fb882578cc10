"""Files whose layout is known before their content: space is claimed at once, every piece goes to its final place."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec.errors import UserError


class PlacedFile:
    """A file of `total` bytes under construction; what is there already stays. Raises `UserError` where the disk does
    not take it: a full disk shows now, not after an hour of work."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self._fd = path, -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, total)
            else:
                os.ftruncate(self._fd, total)
        except OSError as e:
            have = shutil.disk_usage(path.parent).free
            self.abort()
            raise UserError(
                f"{path}: {e.strerror}: needs {total / 1e6:,.1f} MB, {have / 1e6:,.1f} MB are free"
            ) from None

    def write(self, data: bytes | NDArray[Any], at: int) -> None:
        """These bytes, from byte `at` on."""
        view = memoryview(np.ascontiguousarray(data).data if isinstance(data, np.ndarray) else data).cast("B")
        try:
            while view:
                n = os.pwrite(self._fd, view, at)
                view, at = view[n:], at + n
        except OSError as e:
            raise UserError(f"{self.path}: {e.strerror}") from None

    def close(self) -> None:
        """Flush to disk."""
        try:
            os.fsync(self._fd)
        except OSError as e:
            raise UserError(f"{self.path}: {e.strerror}") from None
        finally:
            self.shut()

    def shut(self) -> None:
        """Close it as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abort(self) -> None:
        """Close and delete."""
        self.shut()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
