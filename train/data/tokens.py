"""Tokenising: parts of a source into shards on disk, by several processes, once.

A shard's content depends on the source, the tokenizer and the options alone, and it gets its name when it is whole.
So work goes on where it was interrupted, any number of processes makes the same files, and two runs that make the same
ones at a time don't harm each other.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec.errors import UserError
from train.config.sources import Source
from train.data import workers
from train.data.chat import Chats, Unfit, template_of
from train.data.corpus import Corpus, read_part
from train.data.document import Document, Part
from train.data.files import reason
from train.data.long import encode
from train.data.store import Shards, Split
from train.data.tokenizer import TextTokenizer

VERSION = 4
"""Part of the cache's key: raise it when tokens or their layout change."""

SMALLEST, LARGEST, MOST = 4 * 2**20, 256 * 2**20, 256
"""Bytes of text in a shard at least and at most, and shards of a source where those bounds allow it."""
TOGETHER = 2**20
"""Bytes of text that are encoded at a time."""

SPLITS = ("train", "validation")


def cache_folder(chosen: str | None) -> Path:
    """The folder for what can be computed again: `chosen`, $ALLOTROPE_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(chosen or os.environ.get("ALLOTROPE_CACHE") or Path(base) / "allotrope")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror} (choose another folder with --data.cache)") from None
    return path


@dataclass(frozen=True)
class Job:
    """All that a process needs to make any of a source's shards."""

    folder: Path
    shards: tuple[tuple[Part, ...], ...]
    source: Source
    tokenizer: TextTokenizer
    template: str | None
    below: int
    """Documents with a key below this are held out."""

    def record(self, shard: int) -> Path:
        """What is written last, when a shard is whole."""
        return self.folder / f"{shard:05d}.json"

    def size(self, shard: int) -> int:
        """Bytes of text in it, about."""
        return sum(p.size for p in self.shards[shard])

    @property
    def shared_end(self) -> bool:
        """Whether the end of a document is also the beginning of the next one."""
        return self.template is None and self.tokenizer.bos == self.tokenizer.eos


def prepare(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    cache: Path,
    count: int = 1,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[Split, Split, str, list[str]]:
    """A source as tokens, to train on and held out, from the cache or made now by `count` processes; their hash; and
    what was left out of it, a line each.

    `progress` receives bytes done. Raises `UserError` for documents that cannot be used, and where the tokens cannot be
    written.
    """
    template = template_of(corpus.source, tokenizer) if corpus.source.chat else None
    how = (template, corpus.source.answers_only) if corpus.source.chat else None
    fingerprint = hashlib.sha256(f"{VERSION}:{corpus.hash}:{tokenizer.hash}:{how}".encode()).hexdigest()
    folder = cache / f"tokens-{fingerprint[:32]}"
    shards = tuple(_shards(corpus.parts))
    job = Job(folder, shards, corpus.source, tokenizer, template, corpus.below)
    try:
        if not (folder / "meta.json").is_file():
            folder.mkdir(exist_ok=True)
            missing = [n for n in range(len(shards)) if not job.record(n).is_file()]
            progress(sum(job.size(n) for n in range(len(shards))) - sum(job.size(n) for n in missing))
            workers.run(job, missing, count, progress)
            _finish(job)
        train, held = (_open(job, name, corpus.name) for name in SPLITS)
        left_out = _left_out(job, corpus.name)
    except OSError as e:
        done = sum(job.record(n).is_file() for n in range(len(shards)))
        kept = f"; {done} of {len(shards)} shards are kept" if done else ""
        raise UserError(f"{folder}: cannot store the tokens: {reason(e)}{kept} (try --data.cache FOLDER)") from None
    return train, held, fingerprint, left_out


def _left_out(job: Job, name: str) -> list[str]:
    meta = json.loads((job.folder / "meta.json").read_text(encoding="utf-8"))
    counts = sum((Counter(found) for found in meta["left_out"]), Counter())
    return [f"{name}: {n:,} chat(s) left out: {why}" for why, n in sorted(counts.items())]


def _shards(parts: Sequence[Part]) -> Iterator[tuple[Part, ...]]:
    """Parts in groups of about equal size, which depends on the source alone."""
    bound = min(LARGEST, max(SMALLEST, sum(p.size for p in parts) // MOST))
    group: list[Part] = []
    size = 0
    for part in parts:
        group.append(part)
        size += part.size
        if size >= bound:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


class Stream:
    """One split of a shard while it is written."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self.file = path.with_name(f".{path.name}.{os.getpid()}.partial").open("wb")
        self.lengths: list[int] = []
        self.masks: list[NDArray[np.bool_]] = []
        self.bytes = self.tokens = 0

    def write(self, ids: Sequence[int] | NDArray[Any], mask: NDArray[np.bool_] | None = None) -> None:
        """Tokens, and which of them count."""
        self.file.write(np.asarray(ids, self.dtype).tobytes())
        self.tokens += len(ids)
        if mask is not None:
            self.masks.append(mask)

    def close(self) -> dict[str, int]:
        """Everything under its name; what there is of it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        _rename(Path(self.file.name), self.path)
        _save(self.path.with_suffix(".lengths"), np.array(self.lengths, "<i8"))
        if self.masks:
            _save(self.path.with_suffix(".mask"), np.packbits(np.concatenate(self.masks), bitorder="little"))
        return {"tokens": self.tokens, "documents": len(self.lengths), "bytes": self.bytes, "masked": bool(self.masks)}


def make(job: Job, shard: int, progress: Callable[[int], None] = lambda n: None) -> None:
    """Tokenise one shard. Raises `UserError` for a document that cannot be used, and `OSError`."""
    tok = job.tokenizer
    streams = [Stream(job.folder / f"{shard:05d}.{name}.bin", _dtype(tok.size)) for name in SPLITS]
    try:
        begin = [] if tok.bos is None or tok.bos == tok.eos else [tok.bos]
        if shard == 0 and job.shared_end:  # the first document needs a beginning that no other one's end is
            for stream in streams:
                stream.write([tok.eos])
        chats = None if job.template is None else Chats(job.template, tok, job.source.answers_only)
        left_out: dict[str, int] = {}
        for part in job.shards[shard]:
            for group in _groups(read_part(part, job.source)):
                for d, ids, mask, size in _encoded(group, tok, chats, begin, left_out):
                    stream = streams[d.key < job.below]
                    stream.write(ids, mask)
                    stream.lengths.append(len(ids))
                    stream.bytes += size
            progress(part.size)
        made = {name: stream.close() for name, stream in zip(SPLITS, streams, strict=True)}
        record = {**made, "left_out": left_out}
        partial = job.folder / f".{shard:05d}.json.{os.getpid()}.partial"
        partial.write_text(json.dumps(record), encoding="utf-8")
        _rename(partial, job.record(shard))
    finally:
        for stream in streams:
            with suppress(OSError):  # what could not be written still can't
                stream.file.close()
            Path(stream.file.name).unlink(missing_ok=True)


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for d in documents:
        group.append(d)
        size += d.bytes
        if size >= TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encoded(
    group: Sequence[Document],
    tok: TextTokenizer,
    chats: Chats | None,
    begin: list[int],
    left_out: dict[str, int],
) -> Iterator[tuple[Document, Sequence[int] | NDArray[Any], NDArray[np.bool_] | None, int]]:
    """Each document's tokens, from its beginning to its end, their mask, and the bytes of its text; those that are left
    out are counted by their reason."""
    if chats is None:
        texts = [d.content for d in group]
        for d, ids in zip(group, encode(tok, [t for t in texts if isinstance(t, str)]), strict=True):
            yield d, np.concatenate([begin, ids, [tok.eos]]) if begin else np.append(ids, tok.eos), None, d.bytes
        return
    for d in group:
        assert not isinstance(d.content, str)
        try:
            text, ids, mask = chats.encode(d.content)
        except UserError:
            raise
        except Unfit as e:
            left_out[str(e)] = left_out.get(str(e), 0) + 1
            continue
        except ValueError as e:
            raise UserError(f"{d.where}: {e}") from None
        yield d, ids, mask, len(text.encode())


def _dtype(vocab: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


def _save(path: Path, values: NDArray[Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as f:
            f.write(values.tobytes())
            f.flush()
            os.fsync(f.fileno())
        _rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _rename(partial: Path, path: Path) -> None:
    """Give a file its name. Whoever finished the folder meanwhile has the same file, and swept up ours."""
    try:
        partial.replace(path)
    except FileNotFoundError:
        if not path.is_file():
            raise


def _finish(job: Job) -> None:
    """The offsets of all documents, and the record of the whole."""
    records = [json.loads(job.record(n).read_text(encoding="utf-8")) for n in range(len(job.shards))]
    for name in SPLITS:
        path = job.folder / f"{name}.offsets"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as f:
            base = np.zeros(1, "<i8")
            f.write(base.tobytes())
            for n in range(len(job.shards)):
                lengths = np.fromfile(job.folder / f"{n:05d}.{name}.lengths", "<i8")
                if len(lengths):
                    offsets = base + np.cumsum(lengths)
                    f.write(offsets.tobytes())
                    base = offsets[-1:]
            f.flush()
            os.fsync(f.fileno())
        _rename(partial, path)
    meta = job.folder / "meta.json"
    partial = meta.with_name(f".{meta.name}.{os.getpid()}.partial")
    every = {name: [r[name] for r in records] for name in (*SPLITS, "left_out")}
    partial.write_text(json.dumps(every), encoding="utf-8")
    _rename(partial, meta)
    for left in job.folder.glob(".*.partial"):  # by processes that were killed
        left.unlink(missing_ok=True)


def _open(job: Job, name: str, source: str) -> Split:
    meta = json.loads((job.folder / "meta.json").read_text(encoding="utf-8"))[name]
    there = [(job.folder / f"{n:05d}.{name}.bin", r["tokens"]) for n, r in enumerate(meta) if r["tokens"]]
    dtype = _dtype(job.tokenizer.size)
    paths, counts = [p for p, _ in there], [c for _, c in there]
    for path, tokens in there:
        if not path.is_file() or path.stat().st_size != tokens * dtype.itemsize:
            raise UserError(f"{path}: the cached tokens are damaged (remove {job.folder}, they are made anew)")
    ends = tuple(int(e) for e in np.cumsum(counts))
    offsets = np.memmap(job.folder / f"{name}.offsets", "<i8", mode="r")
    masked = any(r["masked"] for r in meta)
    mask = Shards(tuple(p.with_suffix(".mask") for p in paths), ends, "bits") if masked else None
    tokens = Shards(tuple(paths), ends, dtype.str)
    return Split(tokens, offsets, sum(r["bytes"] for r in meta), int(job.shared_end), mask, source)
