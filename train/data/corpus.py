"""Text to documents: which files there are, what is in them, and which are held out.

Nothing is kept in memory but names and byte ranges. A document is a file, or a piece of a large one.
"""

from __future__ import annotations

import hashlib
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spec.errors import UserError

log = logging.getLogger(__name__)

STDLIB = "stdlib"
"""The name of the embedded corpus."""

STDLIB_LEFT_OUT = frozenset(
    {
        *("site-packages", "dist-packages", "lib-dynload", "ensurepip", "__pycache__", "__phello__"),
        *("test", "tests", "idle_test", "idlelib", "turtledemo", "pydoc_data", "encodings"),
    }
)
"""Folders of the standard library that hold installed packages, tests or tables rather than source to learn from."""

PIECE = 64 * 1024
"""Bytes of a piece of a large file; smaller where the whole corpus is small, so that some can be held out."""


@dataclass(frozen=True)
class Document:
    """Bytes `start` to `stop` of a UTF-8 file."""

    path: Path
    name: str
    """The file's path within the corpus, the same on every machine."""
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    def text(self) -> str:
        """The document's text. Raises `UserError` where the file has changed under our hands."""
        try:
            with self.path.open("rb") as f:
                f.seek(self.start)
                return f.read(self.size).decode()
        except OSError as e:
            raise UserError(f"{self.path}: {e.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: the file changed while it was read (start again)") from None


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and the hash of all that is in them."""

    source: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    hash: str

    @property
    def size(self) -> int:
        """Bytes of all documents."""
        return sum(d.size for d in (*self.train, *self.validation))


def read(source: str, validation: float) -> Corpus:
    """The documents of a text file, a folder, or `stdlib`, a share of them held out.

    A document is held out if the hash of its file falls into the share (of its piece, where the files are few), so
    that equal files land on the same side and new ones move no others. Raises `UserError` for what is not text.
    """
    root, files = _files(source)
    contents = [(path, path.relative_to(root).as_posix(), _digest(path)) for path in files]
    contents = [(path, name, found) for path, name, found in contents if found is not None]
    total = sum(size for _, _, (_, size) in contents)
    if not total:
        raise UserError(f"{source}: no text in it")
    piece = min(PIECE, max(1024, total // 20))
    documents: list[tuple[int, Document]] = []
    for path, name, (digest, size) in contents:
        for n, (start, stop) in enumerate(_pieces(path, size, piece)):
            key = digest if len(contents) >= 50 else hashlib.sha256(f"{digest}:{n}".encode()).hexdigest()
            documents.append((int(key[:13], 16), Document(path, name, start, stop)))
    bound = validation * 16**13
    held = {key for key, _ in documents if key < bound}
    keys = {key for key, _ in documents}
    if validation and not held and len(keys) > 1:
        held = {min(keys)}
    if held == keys:
        held = set() if len(keys) == 1 else held - {max(keys)}
    everything = hashlib.sha256(f"{validation}\n".encode())
    for _, name, (digest, _) in contents:
        everything.update(f"{name}\0{digest}\n".encode())
    return Corpus(
        source,
        tuple(d for key, d in documents if key not in held),
        tuple(d for key, d in documents if key in held),
        everything.hexdigest(),
    )


def _files(source: str) -> tuple[Path, list[Path]]:
    if source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in sorted(root.rglob("*.py")) if _kept(p.relative_to(root))]
        if len(files) < 100:
            raise UserError(f"--data stdlib: this Python has no library source in {root} (name a file or folder)")
        return root, files
    root = Path(source)
    if root.is_file():
        return root.parent, [root]
    if not root.is_dir():
        raise UserError(f"--data {source}: no such file or folder (or write stdlib)")
    visible = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
    return root, sorted(p for p in visible if p.is_file())


def _kept(path: Path) -> bool:
    folders = path.parts[:-1]
    configured = path.name.startswith("_sysconfigdata") or any(f.startswith("config-") for f in folders)
    return not configured and STDLIB_LEFT_OUT.isdisjoint(folders)


def _digest(path: Path) -> tuple[str, int] | None:
    """SHA-256 and size of a UTF-8 file; none for an empty or binary one."""
    digest, size, tail = hashlib.sha256(), 0, b""
    try:
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                if b"\0" in block:
                    log.warning("%s: left out, it is not text", path)
                    return None
                digest.update(block)
                tail = _check(path, tail + block, size - len(tail))
                size += len(block)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if tail:
        raise UserError(f"{path}: not UTF-8 at byte {size - len(tail)}")
    return (digest.hexdigest(), size) if size else None


def _check(path: Path, data: bytes, offset: int) -> bytes:
    """Raise unless `data` is UTF-8 up to a character that it may cut at its end, which is returned."""
    try:
        data.decode()
    except UnicodeDecodeError as e:
        if e.reason == "unexpected end of data":
            return data[e.start :]
        raise UserError(f"{path}: not UTF-8 at byte {offset + e.start}") from None
    return b""


def _pieces(path: Path, size: int, piece: int) -> Iterator[tuple[int, int]]:
    """The file whole if it is not much larger than a piece, else pieces cut behind line ends."""
    if size <= 4 * piece:
        yield 0, size
        return
    with path.open("rb") as f:
        start = 0
        while start < size:
            f.seek(start)
            data = f.read(piece)
            stop = start + len(data)
            if stop < size:
                line = data.rfind(b"\n") + 1
                stop = start + line if line else start + _character(data)
            yield start, stop
            start = stop


def _character(data: bytes) -> int:
    """Length of `data` without a cut character at its end."""
    n = len(data) - 1
    while n and data[n] & 0xC0 == 0x80:
        n -= 1
    return n or len(data)
