"""What a calibration reads: a text, as windows of token ids that are spread evenly over it.

Of a large text only the passages that are needed are read.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib
import importlib.util
import io
import json
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from backends.base import Tokenizer
from convert.verify.sample import open_tokenizer
from spec.config import Spec
from spec.errors import UserError

WINDOW = 512
"""Tokens of a window at most."""
PASSAGE = 16
"""Bytes that are read for a token: more than text has, so that one passage fills a window."""
LINE = 16_000_000
"""Bytes of a JSON line at most."""
SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".json")
"""Files of a folder that are read."""
STDLIB = ("typing", "logging", "difflib", "tarfile", "unittest.mock", "pathlib", "doctest", "optparse", "ipaddress")
"""Modules of the standard library, none of them among those that verification measures quality on."""
RANDOM = "random"


@dataclass(frozen=True)
class Sample:
    """The windows of a calibration."""

    ids: NDArray[np.int64]
    """[windows, tokens of one]"""
    name: str
    """`stdlib`, `random`, or the name of the file or folder."""
    asked: int
    """Tokens that were asked for."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.ids.size

    @property
    def hash(self) -> str:
        """SHA-256 of shape and ids."""
        return hashlib.sha256(repr(self.ids.shape).encode() + self.ids.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class _Document:
    """Something to read passages of."""

    label: str
    size: int
    open: Callable[[], BinaryIO]
    lines: bool = False
    """Whether it is JSON lines."""


def sample(spec: Spec, tokenizer: Tokenizer | None, text: str, tokens: int, seed: int = 0) -> Sample:
    """Up to `tokens` tokens of a text (`convert.calibrate.Settings.text`), in windows of equal length.

    A window begins with BOS where the tokenizer adds it to every text. `random` stands for random ids, seeded by
    `seed`: what a model without a tokenizer can be run on. Raises `UserError`.
    """
    length = min(WINDOW, spec.context, tokens)
    if text == RANDOM:
        drawn = np.random.default_rng(seed).integers(0, spec.vocab_size, (max(1, tokens // length), length))
        return Sample(drawn, RANDOM, tokens)
    if tokenizer is None:
        raise UserError(
            f"--calibrate {text}: the source has no tokenizer, so no text can be read: put its tokenizer.json beside "
            f"the weights, or give --effort fast (or --calibrate {RANDOM}: random ids)"
        )
    documents = _documents(text)
    library = open_tokenizer(tokenizer)
    bos = library.token_to_id(tokenizer.bos) if tokenizer.add_bos and tokenizer.bos is not None else None
    lead = [] if bos is None else [bos]
    body = max(1, length - len(lead))
    windows = max(1, tokens // length)
    ids: list[int] = []
    for passage in filter(str.strip, _passages(documents, windows, PASSAGE * body)):
        ids += library.encode(passage, add_special_tokens=False).ids
    if len(ids) + len(lead) < 2:
        raise UserError(f"--calibrate {text}: {len(ids)} tokens are no text to calibrate on (give a longer one)")
    body = min(body, len(ids))
    found = np.asarray(ids[: len(ids) // body * body], np.int64).reshape(-1, body)
    chosen = found[np.arange(min(windows, len(found))) * len(found) // min(windows, len(found))]
    whole = np.concatenate([np.tile(np.asarray(lead, np.int64), (len(chosen), 1)), chosen], axis=1)
    return Sample(whole, text if text == "stdlib" else Path(text).resolve().name, tokens)


def _documents(text: str) -> list[_Document]:
    """What a name stands for. Raises `UserError`."""
    if text == "stdlib":
        return list(_stdlib())
    path = Path(text)
    try:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise UserError(f"--calibrate {path}: no text in it ({', '.join(SUFFIXES)} are read)")
            return [_file(p) for p in found]
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"--calibrate {path}: no file and no folder")
        return [_file(path)]
    except OSError as e:
        raise UserError(f"--calibrate {path}: {e.strerror}") from None


def _file(path: Path) -> _Document:
    return _Document(
        str(path), path.stat().st_size, lambda: path.open("rb"), path.suffix.lower() in (".jsonl", ".json")
    )


def _stdlib() -> Iterator[_Document]:
    """Prose and code that Python brings: the topics of its documentation, and modules."""
    if importlib.util.find_spec("pydoc_data") is not None:
        topics = importlib.import_module("pydoc_data.topics").topics
        prose = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        yield _Document("pydoc_data.topics", len(prose), lambda: io.BytesIO(prose))
    for name in STDLIB:
        found = importlib.util.find_spec(name)
        origin = Path(found.origin) if found is not None and found.origin is not None else None
        if origin is not None and origin.suffix == ".py":
            yield _file(origin)


def _passages(documents: Sequence[_Document], count: int, size: int) -> Iterator[str]:
    """The documents whole where that is little enough, else `count` passages of `size` bytes, spread evenly."""
    total = sum(d.size for d in documents)
    if not total:
        raise UserError(f"--calibrate {documents[0].label}: is empty")
    if total <= count * size:
        for d in documents:
            yield _read(d, 0, d.size)
        return
    starts = np.cumsum([0, *(d.size for d in documents)])
    for n in range(count):
        at = n * total // count
        d = int(np.searchsorted(starts, at, side="right")) - 1
        yield _read(documents[d], at - int(starts[d]), size)


def _read(d: _Document, at: int, size: int) -> str:
    """About `size` bytes from the first line that begins at `at` or after it."""
    try:
        with d.open() as f:
            f.seek(at)
            if at:
                f.readline(LINE if d.lines else size)
            start = f.tell()
            return _texts(d, f, size) if d.lines else _decoded(d, start, f.read(size), whole=start + size >= d.size)
    except OSError as e:
        raise UserError(f"--calibrate {d.label}: {e.strerror}") from None


def _decoded(d: _Document, start: int, data: bytes, whole: bool) -> str:
    cut = (
        next((n for n, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0) if start else 0
    )  # inside of a character
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data[cut:], final=whole)
    except UnicodeDecodeError as e:
        raise UserError(f"--calibrate {d.label}: not UTF-8 at byte {start + cut + e.start}") from None


def _texts(d: _Document, f: BinaryIO, size: int) -> str:
    """The `text` of JSON lines."""
    out: list[str] = []
    stop = f.tell() + size
    while f.tell() < stop and (at := f.tell()) < d.size:
        line = f.readline(LINE)
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(
                f"--calibrate {d.label}: the line at byte {at} is no JSON (one object a line is read)"
            ) from None
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise UserError(f"--calibrate {d.label}: the line at byte {at} has no string called text")
        out.append(found["text"])
    return "\n\n".join(out)
