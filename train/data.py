"""Tokens on disk and their order: tokenised once, memory-mapped, shuffled globally, resumable at any sequence.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec.errors import UserError
from train.corpus import Corpus, Document
from train.tokenizer import TextTokenizer

Ids = NDArray[np.int64]

IGNORE = -100
"""Targets that count nowhere."""

VERSION = 1
"""Part of the cache's key: raise it when the layout changes."""


@dataclass(frozen=True)
class Split:
    """One stream of tokens: documents, each with its end (and its beginning, where the tokenizer has one)."""

    tokens: NDArray[np.uint16] | NDArray[np.uint32]
    bytes: int
    """Bytes of text that the tokens stand for."""
    documents: int


@dataclass(frozen=True)
class TokenData:
    """Both streams, the ids that separate documents, and the fingerprint of it all."""

    train: Split
    validation: Split
    eos: int
    bos: int | None
    fingerprint: str


def cache_folder(chosen: str | None) -> Path:
    """The folder for what can be computed again: `chosen`, $ALLOTROPE_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(chosen or os.environ.get("ALLOTROPE_CACHE") or Path(base) / "allotrope")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror} (choose another folder with --data.cache)") from None
    return path


def prepare(
    corpus: Corpus, tokenizer: TextTokenizer, cache: Path, progress: Callable[[int], None] = lambda n: None
) -> TokenData:
    """The corpus as tokens, from the cache or tokenised now. `progress` receives bytes done.

    The cache's entry is a folder that gets its name when it is whole. Raises `UserError` where it cannot be written.
    """
    fingerprint = hashlib.sha256(f"{VERSION}:{corpus.hash}:{tokenizer.hash}".encode()).hexdigest()
    folder = cache / f"tokens-{fingerprint[:32]}"
    if not (folder / "meta.json").is_file():
        partial = Path(tempfile.mkdtemp(prefix=".tokens-", dir=cache))
        try:
            meta = {
                name: _write(partial / f"{name}.bin", documents, tokenizer, progress)
                for name, documents in (("train", corpus.train), ("validation", corpus.validation))
            }
            (partial / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            try:
                partial.rename(folder)
            except OSError:
                if not (folder / "meta.json").is_file():  # otherwise another process was faster
                    raise
        except OSError as e:
            raise UserError(f"{folder}: cannot store the tokens: {e.strerror} (try --data.cache FOLDER)") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    splits = {name: _open(folder / f"{name}.bin", **meta[name], size=tokenizer.size) for name in meta}
    return TokenData(splits["train"], splits["validation"], tokenizer.eos, tokenizer.bos, fingerprint)


def _dtype(vocab: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


def _write(
    path: Path, documents: Sequence[Document], tokenizer: TextTokenizer, progress: Callable[[int], None]
) -> dict[str, int]:
    eos, bos, dtype = tokenizer.eos, tokenizer.bos, _dtype(tokenizer.size)
    begin = [] if bos is None or bos == eos else [bos]
    size = 0
    with path.open("wb") as f:
        if bos == eos:  # what ends one document begins the next, so the first needs one more
            f.write(np.array([eos], dtype).tobytes())
        for group in _batched(documents, 64):
            for document, ids in zip(group, tokenizer.encode([d.text() for d in group]), strict=True):
                f.write(np.array([*begin, *ids, eos], dtype).tobytes())
                size += document.size
                progress(document.size)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": size, "documents": len(documents)}


def _open(path: Path, *, bytes: int, documents: int, size: int) -> Split:  # noqa: A002
    dtype = _dtype(size)
    if not path.stat().st_size:
        return Split(np.empty(0, dtype), bytes, documents)
    return Split(np.memmap(path, dtype, mode="r"), bytes, documents)


@dataclass(frozen=True)
class Rows:
    """Sequences for one forward pass, [B, T] each; `segments` only where documents are masked."""

    ids: Ids
    targets: Ids
    segments: Ids | None

    @property
    def valid(self) -> int:
        """Targets that count."""
        return int((self.targets != IGNORE).sum())


@dataclass(frozen=True)
class Sequences:
    """A stream cut into sequences of `length` tokens: row i predicts tokens i * length + 1 and on."""

    split: Split
    length: int
    eos: int
    bos: int | None
    document_mask: bool

    @property
    def count(self) -> int:
        """Whole sequences; one padded sequence where the stream is shorter than that."""
        return max(1, (len(self.split.tokens) - 1) // self.length)

    def rows(self, indices: Sequence[int]) -> Rows:
        """The sequences of these numbers; a negative number is a row without targets, to fill a batch."""
        window = np.full((len(indices), self.length + 1), self.eos, np.int64)
        targets = np.full((len(indices), self.length), IGNORE, np.int64)
        for row, i in enumerate(indices):
            if i < 0:
                continue
            tokens = self.split.tokens[i * self.length : (i + 1) * self.length + 1]
            window[row, : len(tokens)] = tokens
            targets[row, : len(tokens) - 1] = tokens[1:]
        segments = self._segments(window) if self.document_mask else None
        if segments is not None:
            # An end that also begins the next document still belongs to the one it ends.
            crossing = (segments[:, 1:] != segments[:, :-1]) & (window[:, 1:] != self.eos)
            targets[crossing] = IGNORE
            segments = segments[:, :-1]
        return Rows(window[:, :-1], targets, segments)

    def _segments(self, window: Ids) -> Ids:
        if self.bos is not None:
            return np.cumsum(window == self.bos, axis=1)
        ends = np.cumsum(window == self.eos, axis=1)
        return np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)


@dataclass
class DataState:
    """Where the data stands. The order depends on the seed and `sequences` alone, not on the number of ranks."""

    fingerprint: str
    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    seed: int = 0
    epoch: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


class Batches:
    """Global batches in a deterministic order: every epoch is one permutation of all sequences."""

    def __init__(self, sequences: Sequences, state: DataState) -> None:
        self.sequences, self.state = sequences, state

    def next(self, total: int, micro: int, rank: int = 0, world: int = 1) -> tuple[list[Rows], int]:
        """This rank's share of the next `total` sequences as A forward passes of `micro` rows, and the number of valid
        targets in the whole batch, over all ranks."""
        count, state = self.sequences.count, self.state
        places = range(state.sequences, state.sequences + total)
        indices = [int(_order(count, state.seed, p // count)[p % count]) for p in places]
        groups = list(_batched(indices, micro))
        mine = [self.sequences.rows(g) for g in groups[rank::world]]
        valid = sum(r.valid for r in mine) if world == 1 else sum(self.sequences.rows(g).valid for g in groups)
        state.batches += 1
        state.sequences += total
        state.tokens += valid
        state.epoch = state.sequences // count
        return mine, valid


def validation_rows(sequences: Sequences, tokens: int, micro: int, rank: int = 0, world: int = 1) -> Iterator[Rows]:
    """This rank's share of about `tokens` tokens spread evenly over the stream; equally many passes on every rank."""
    wanted = min(sequences.count, max(1, tokens // sequences.length))
    indices = [int(i) for i in np.linspace(0, sequences.count - 1, wanted).round()]
    indices += [-1] * (-len(indices) % (micro * world))
    for group in list(_batched(indices, micro))[rank::world]:
        yield sequences.rows(group)


def _batched(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
