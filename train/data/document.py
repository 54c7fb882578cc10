"""What readers hand out, and the units of work that they are given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.data.files import opened

Kind = Literal["text", "lines", "table"]
"""Text; JSON objects, one a line; parquet."""

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a file that can be read by itself: pieces of text, bytes of lines, or row groups of a table."""

    path: Path
    name: str
    """The file's path within the source, the same on every machine."""
    kind: Kind
    start: int
    stop: int | None
    """None = up to the end, wherever that is: a compressed file."""
    size: int
    """Bytes, about, for balance and progress."""
    piece: int = 0
    """Bytes of a piece of text."""
    key: str = ""
    """Text: the file's digest, from which its pieces have their keys."""
    by_file: bool = False
    """Whether all pieces share the file's key."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text or a chat."""

    content: str | Sequence[Message]
    key: int
    """Decides whether it is held out; of its content alone."""
    bytes: int
    """Of its text in UTF-8."""
    part: Part
    at: int
    """Where in the file: a piece's number, a line's byte, or a row's number."""

    @property
    def where(self) -> str:
        """For messages. It may read the file."""
        return place(self.part, self.at)


def key_of(data: bytes) -> int:
    """A document's key: 52 bits of a SHA-256."""
    return int(hashlib.sha256(data).hexdigest()[:13], 16)


def place(part: Part, at: int) -> str:
    """`file: line 7`; lines are counted only here, where somebody asks."""
    if part.kind != "lines":
        return f"{part.path}: {'row' if part.kind == 'table' else 'piece'} {at + 1}"
    number, left = 1, at
    with opened(part.path) as f:
        while left > 0 and (block := f.read(min(left, 1 << 20))):
            number, left = number + block.count(b"\n"), left - len(block)
    return f"{part.path}: line {number}"
