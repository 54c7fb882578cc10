"""Files that are on the disk when the call returns."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """A small file."""
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
