"""Tokens on disk: tokenised once, memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spec.errors import UserError
from train.data.corpus import Corpus, Document
from train.data.order import batched
from train.data.store import Shards, Split, TokenData
from train.data.tokenizer import TextTokenizer

VERSION = 2
"""Part of the cache's key: raise it when the layout changes."""


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
    overlap = int(tokenizer.bos == tokenizer.eos)
    splits = {name: _open(folder / name, tokenizer.size, overlap, corpus.source, meta[name]) for name in meta}
    held = (splits["validation"],) if splits["validation"].documents else ()
    return TokenData((splits["train"],), held, (1.0,), tokenizer.eos, tokenizer.bos, fingerprint)


def _dtype(vocab: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


def _write(
    path: Path, documents: Sequence[Document], tokenizer: TextTokenizer, progress: Callable[[int], None]
) -> dict[str, int]:
    eos, bos, dtype = tokenizer.eos, tokenizer.bos, _dtype(tokenizer.size)
    begin = [] if bos is None or bos == eos else [bos]
    size, offsets = 0, [0]
    with path.open("wb") as f:
        if bos == eos:  # what ends one document begins the next, so the first needs one more
            f.write(np.array([eos], dtype).tobytes())
        for group in batched(documents, 64):
            for document, ids in zip(group, tokenizer.encode([d.text() for d in group]), strict=True):
                f.write(np.array([*begin, *ids, eos], dtype).tobytes())
                offsets.append(offsets[-1] + len(begin) + len(ids) + 1)
                size += document.size
                progress(document.size)
        f.flush()
        os.fsync(f.fileno())
    np.array(offsets, np.int64).tofile(path.with_suffix(".offsets"))
    return {"bytes": size}


def _open(path: Path, size: int, overlap: int, source: str, meta: dict[str, int]) -> Split:
    offsets = np.fromfile(path.with_suffix(".offsets"), np.int64)
    dtype = _dtype(size)
    tokens = Shards((path.with_suffix(".bin"),), (int(offsets[-1]) + overlap,), dtype.str)
    return Split(tokens, offsets, meta["bytes"], overlap, None, source)
