"""Files that may be compressed."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from spec.errors import MissingDependency

COMPRESSIONS = (".gz", ".zst")

DAMAGE = (OSError, EOFError, zlib.error)
"""What reading a file may raise."""


def reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def compression(path: Path) -> str:
    """`.gz`, `.zst`, or nothing."""
    return path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""


def opened(path: Path) -> BinaryIO:
    """The file's bytes, decompressed; only plain files can be sought in. Raises `DAMAGE`."""
    kind = compression(path)
    if kind == ".gz":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if kind == ".zst":
        try:
            import pyarrow as pa
        except ImportError:
            raise MissingDependency(f"{path}: .zst needs pyarrow: pip install 'allotrope[train]'") from None
        stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        return cast("BinaryIO", io.BufferedReader(stream, 1 << 20))
    return path.open("rb")
