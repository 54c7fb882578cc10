"""Sources to parts: which files there are, what they hash to, and which of their documents are held out.

Nothing is kept in memory but names and ranges. What documents a part has, `rows` and `pieces` know.
"""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spec.errors import UserError
from train.config.sources import HUB, STDLIB, Source
from train.data import digests, pieces, rows
from train.data.document import Document, Part

log = logging.getLogger(__name__)

STDLIB_LEFT_OUT = frozenset(
    {
        *("site-packages", "dist-packages", "lib-dynload", "ensurepip", "__pycache__", "__phello__"),
        *("test", "tests", "idle_test", "idlelib", "turtledemo", "pydoc_data", "encodings"),
    }
)
"""Folders of the standard library that hold installed packages, tests or tables rather than source to learn from."""

SMALL = 16 * 2**20
"""Bytes up to which every document is looked at before any is held out, so that some are where there are two."""

KEYS = 16**13
"""Documents' keys are below this."""

Held = Literal["share", "none", "all"]


@dataclass(frozen=True)
class Corpus:
    """One source's documents, in a fixed order, and the hash of all that is in them."""

    source: Source
    parts: tuple[Part, ...]
    files: int
    size: int
    """Bytes of the files."""
    below: int
    """Documents with a key below this are held out."""
    hash: str
    """Of contents, names, columns and what is held out."""

    @property
    def name(self) -> str:
        """For people."""
        return self.source.source

    def documents(self, held_out: bool | None = None) -> Iterator[Document]:
        """The documents, or only those that are (not) held out. Raises `UserError` for what cannot be read."""
        for part in self.parts:
            for d in read_part(part, self.source):
                if held_out is None or held_out == (d.key < self.below):
                    yield d


def read_part(part: Part, source: Source) -> Iterator[Document]:
    """The documents of a part."""
    return pieces.read(part) if part.kind == "text" else rows.read(part, source)


def read(source: Source, validation: float = 0.0, *, held: Held = "share", cache: Path | None = None) -> Corpus:
    """The documents of a source, a share of them held out.

    A document is held out if the hash of its row or file falls into the share (of its piece, where the files are few),
    so that equal documents land on the same side and new ones move no others. Raises `UserError` for what is not text.
    """
    root, files = _files(source, cache)
    found: list[tuple[Path, str, digests.Digest]] = []
    for path in files:
        if source.chat and rows.kind(path) == "text":
            log.warning("%s: left out, it has no rows (chats are in .jsonl, .json or .parquet files)", path)
            continue
        digest = digests.digest(path, rows.kind(path), cache)
        if digest is not None:
            found.append((path, path.relative_to(root).as_posix(), digest))
    if not found:
        raise UserError(f"{source.source}: no {'chats' if source.chat else 'text'} in it")
    total = sum(d.size for *_, d in found)
    piece = min(pieces.PIECE, max(1024, total // 20))
    parts: list[Part] = []
    for path, name, d in found:
        kind = rows.kind(path)
        if kind == "text":
            parts += pieces.parts(path, name, d.sha, d.size, piece, by_file=len(found) >= 50)
        else:
            parts += rows.parts(path, name, kind, d.size)
    below = {"none": 0, "all": KEYS, "share": int(validation * KEYS)}[held]
    if held == "share" and validation and total <= SMALL:
        below = _some(below, {key for p in parts for key in _keys(p, source)})
    everything = hashlib.sha256(f"{source.columns}\n{source.chat}\n{held}\n{validation}\n".encode())
    for _, name, d in found:
        everything.update(f"{name}\0{d.sha}\n".encode())
    return Corpus(source, tuple(parts), len(found), total, below, everything.hexdigest())


def _keys(part: Part, source: Source) -> Iterator[int]:
    return pieces.keys(part) if part.kind == "text" else (d.key for d in rows.read(part, source))


def _some(below: int, keys: set[int]) -> int:
    """The bound moved so far that one document is held out, and one is not."""
    if len(keys) < 2:
        return 0
    return min(max(below, min(keys) + 1), max(keys))


def _files(source: Source, cache: Path | None) -> tuple[Path, list[Path]]:
    name = source.source
    if name == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in sorted(root.rglob("*.py")) if _kept(p.relative_to(root))]
        if len(files) < 100:
            raise UserError(f"--data stdlib: this Python has no library source in {root} (name a file or folder)")
        return root, files
    if name.startswith(HUB):
        from train.data import hub

        assert cache is not None, "a dataset is fetched into the cache"
        root = hub.fetch(source, cache)
    else:
        root = Path(name)
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        raise UserError(f"--data {name}: no such file or folder (or write stdlib, or hf:OWNER/NAME)")
    visible = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
    return root, sorted(p for p in visible if p.is_file())


def _kept(path: Path) -> bool:
    folders = path.parts[:-1]
    configured = path.name.startswith("_sysconfigdata") or any(f.startswith("config-") for f in folders)
    return not configured and STDLIB_LEFT_OUT.isdisjoint(folders)
