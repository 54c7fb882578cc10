"""Hashes of files, remembered by what the file system says of them, and the check that text is UTF-8."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from spec.errors import UserError
from train.data.document import Kind
from train.data.files import compression

log = logging.getLogger(__name__)

LONGEST = 64 * 2**20
"""Bytes of a row at most: it is in memory as a whole, several times over."""

REMEMBERED = 4 * 2**20
"""Bytes from which a file's digest is remembered; smaller ones are as quickly hashed."""
SETTLED = 2.0
"""Seconds since a file's last change before its digest is: until then it could change without showing it."""
VERSION = 1
"""Raise it when the check changes."""


@dataclass(frozen=True)
class Digest:
    """SHA-256 of a file, and its bytes."""

    sha: str
    size: int


def digest(path: Path, kind: Kind, cache: Path | None = None) -> Digest | None:
    """The hash of a file, checked to be what its kind says; none for an empty one, and for a binary one that could be
    text. Raises `UserError` for text that is not UTF-8, and for a line of JSON that is too long."""
    try:
        before = path.stat()
        note = _note(path, before, kind, cache)
        if note is not None and note.is_file():
            return Digest(**json.loads(note.read_text(encoding="utf-8")))
        found = _scan(path, kind)
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise UserError(f"{path}: the file changed while it was read (start again)")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if note is not None and found is not None and time.time() - before.st_ctime > SETTLED:
        _remember(note, found)
    return found


def _note(path: Path, stat: os.stat_result, kind: Kind, cache: Path | None) -> Path | None:
    if cache is None or stat.st_size < REMEMBERED:
        return None
    seen = (VERSION, kind, str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return cache / "digests" / f"{hashlib.sha256(repr(seen).encode()).hexdigest()[:32]}.json"


def _remember(note: Path, found: Digest) -> None:
    """Keep it if that is possible; it is only quicker."""
    partial = note.with_name(f".{note.name}.{os.getpid()}.partial")
    try:
        note.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(asdict(found)), encoding="utf-8")
        partial.replace(note)
    except OSError as e:
        partial.unlink(missing_ok=True)
        log.info("%s: %s", note, e.strerror)


def _scan(path: Path, kind: Kind) -> Digest | None:
    sha, size, tail, line, lines = hashlib.sha256(), 0, b"", 0, 1
    plain = kind != "table" and not compression(path)
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            sha.update(block)
            if plain and kind == "text" and b"\0" in block:
                log.warning("%s: left out, it is not text", path)
                return None
            if plain:
                tail = _utf8(path, tail + block, size - len(tail))
            if plain and kind == "lines":
                line = len(block) - block.rfind(b"\n") - 1 if b"\n" in block else line + len(block)
                lines += block.count(b"\n")
                if line > LONGEST:
                    raise too_long(f"{path}: line {lines}")
            size += len(block)
    if tail:
        raise UserError(f"{path}: not UTF-8 at byte {size - len(tail)}")
    return Digest(sha.hexdigest(), size) if size else None


def too_long(where: str) -> UserError:
    """A row that is too large to be read as a whole."""
    return UserError(
        f"{where}: the row is longer than {LONGEST // 2**20} MiB (split it into several rows, or give it as plain text)"
    )


def _utf8(path: Path, data: bytes, offset: int) -> bytes:
    """Raise unless `data` is UTF-8 up to a character that it may cut at its end, which is returned."""
    try:
        data.decode()
    except UnicodeDecodeError as e:
        if e.reason == "unexpected end of data":
            return data[e.start :]
        raise UserError(f"{path}: not UTF-8 at byte {offset + e.start}") from None
    return b""
