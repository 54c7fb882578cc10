"""Files of a folder that somebody else made: regular files, of a bounded size, that lie in it, or a `UserError`.

A folder may hold pipes that never end, links to a reader's own secrets, or a config.json of a gigabyte. Whatever is
read from a source goes through here.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from spec.errors import UserError

LIMIT = 64_000_000
"""Bytes of a JSON or text file at most: twice the largest tokenizer.json there is."""
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
         stat.S_IFBLK: "a device"}  # fmt: skip


def present(path: Path) -> bool:
    """Whether there is such a file. Raises `UserError` for what is no file, and for a link that leaves the folder."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return False
        raise UserError(f"{path}: a link to nothing (copy the file again)") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: {KINDS.get(stat.S_IFMT(mode), 'something')}, where a file is expected")
    folder, file = path.parent.resolve(), path.resolve()
    if not file.is_relative_to(folder) and not _blob(file, folder):
        raise UserError(f"{path}: a link to {file}, outside the folder (copy the file into it)")
    return True


def _blob(file: Path, folder: Path) -> bool:
    """Whether it is a blob of the Hub's cache, in which snapshots/REVISION holds links to blobs/HASH."""
    repo = folder.parent.parent
    return folder.parent.name == "snapshots" and repo.name.startswith("models--") and file.parent == repo / "blobs"


def open_file(path: Path) -> int:
    """A descriptor for reading. Raises `UserError` where there is no such regular file."""
    if not present(path):
        raise UserError(f"{path}: no such file")
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """A whole file of at most `limit` bytes, or a `UserError`."""
    with os.fdopen(open_file(path), "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > limit:
            raise UserError(f"{path}: {size:,} bytes are more than such a file ever has ({limit:,} are read)")
        try:
            return f.read(limit + 1)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None


def read_text(path: Path, limit: int = LIMIT) -> str:
    """A UTF-8 file, or a `UserError`."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None


def read_json(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """A JSON object without repeated keys or numbers that are none (NaN, Infinity, 1e999), or a `UserError`."""
    text = read_bytes(path, limit)
    try:
        data = parse_json(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON: {str(e) or type(e).__name__}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object")
    return data


def parse_json(text: bytes) -> Any:
    """Strict JSON. Raises `ValueError` or `RecursionError`."""
    return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float,
                      parse_int=_int)  # fmt: skip


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"key {_cut(twice)} appears twice")
    return out


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _int(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"{_cut(text)} is no number that a float holds")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{_cut(text)} is no number that a float holds")
    return value


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def harmless(pattern: str, around: str = "{}") -> re.Pattern[str] | None:
    """A regular expression that somebody else wrote, compiled within `around`; none where it is no sound one or could
    take forever: repeated groups, back-references, many repetitions."""
    loops = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if loops > 2 or len(pattern) > 500 or re.search(r"\)[*+{?]|\\[1-9]|\(\?P=", pattern):
        return None
    try:
        return re.compile(around.format(pattern))
    except (re.error, RecursionError, OverflowError):
        return None
