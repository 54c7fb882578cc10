"""Documents of text files: a file, or a piece of a large one.

Pieces lie on a grid of equal steps, each step moved back to the end of a line, of a word, or of a character. So a
part can be read without what stands before it, and a single line of any length costs no more memory than a piece.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from spec.errors import UserError
from train.data.document import Document, Part
from train.data.files import DAMAGE, compression, opened, reason

PIECE = 64 * 1024
"""Bytes of a piece; smaller where the whole source is small, so that some can be held out."""
TOGETHER = 16
"""Pieces in a part."""


def parts(path: Path, name: str, sha: str, size: int, piece: int, *, by_file: bool) -> Iterator[Part]:
    """The file as parts of some pieces each; one piece if it is not much larger than that."""
    if compression(path):
        yield Part(path, name, "text", 0, None, size, piece, sha, by_file)
        return
    if size <= 4 * piece:
        piece = size
    for start in range(0, -(-size // piece), TOGETHER):
        stop = min(start + TOGETHER, -(-size // piece))
        yield Part(path, name, "text", start, stop, min(size, stop * piece) - start * piece, piece, sha, by_file)


def keys(part: Part) -> Iterator[int]:
    """The keys of a part's documents."""
    if part.stop is None:
        yield from (d.key for d in read(part))
    else:
        yield from (_key(part, number) for number in range(part.start, part.stop))


def read(part: Part) -> Iterator[Document]:
    """The pieces of a part. Raises `UserError` where the file has changed under our hands."""
    try:
        with opened(part.path) as f:
            yield from _pieces(part, f)
    except UnicodeDecodeError:
        what = "not UTF-8" if compression(part.path) else "the file changed while it was read (start again)"
        raise UserError(f"{part.path}: {what}") from None
    except DAMAGE as e:
        raise UserError(f"{part.path}: {reason(e)}") from None


def _pieces(part: Part, f: BinaryIO) -> Iterator[Document]:
    piece, number, carried = part.piece, part.start, b""
    step = f.read(piece) if number == 0 else b""
    if number:
        f.seek((number - 1) * piece)
        before = f.read(piece)
        carried, step = before[boundary(before) :], f.read(piece)
    while step and (part.stop is None or number < part.stop):
        following = f.read(piece)
        cut = boundary(step) if following else len(step)
        text = (carried + step[:cut]).decode()
        if text:
            yield Document(text, _key(part, number), len(carried) + cut, part, number)
        carried, step = step[cut:], following
        number += 1


def _key(part: Part, number: int) -> int:
    found = part.key if part.by_file else hashlib.sha256(f"{part.key}:{number}".encode()).hexdigest()
    return int(found[:13], 16)


def boundary(data: bytes) -> int:
    """Where to cut `data` near its end: behind the last line, else before the last space, else between characters."""
    line = data.rfind(b"\n") + 1
    if line:
        return line
    space = data.rfind(b" ")
    if space > 0:
        return space
    n = len(data) - 1
    while n > 0 and data[n] & 0xC0 == 0x80:
        n -= 1
    # The last character is whole if as many bytes follow as its first one says.
    length = 1 if data[n] < 0x80 else 2 if data[n] < 0xE0 else 3 if data[n] < 0xF0 else 4
    return len(data) if n + length == len(data) else n
