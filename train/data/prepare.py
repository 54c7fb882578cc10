"""All the text of a run: its sources, the tokenizer, and every source's tokens."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from spec.config import Spec
from spec.errors import UserError
from spec.load import load as load_spec
from spec.show import size
from train.config import Data, TrainConfig
from train.config.sources import CHATML, HUB, Source
from train.data import corpus, tokenizer, tokens
from train.data.chat import CHATML_TOKENS, plain, template_of
from train.data.corpus import Corpus, read_part
from train.data.progress import shown
from train.data.store import Shards, Split, TokenData
from train.data.tokenizer import TextTokenizer
from train.data.workers import cores

SAMPLE = 64 * 2**20
"""Bytes of text that a tokenizer is trained on at most."""


@dataclass(frozen=True)
class Sources:
    """The text of a run."""

    train: tuple[Corpus, ...]
    weights: tuple[float, ...]
    held_out: Corpus | None
    """`data.validation_source`; none = a share of each of the others."""

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        """All of them."""
        return self.train if self.held_out is None else (*self.train, self.held_out)

    @property
    def size(self) -> int:
        """Bytes of files."""
        return sum(c.size for c in self.corpora)

    @property
    def files(self) -> int:
        """Number of files."""
        return sum(c.files for c in self.corpora)

    @property
    def name(self) -> str:
        """The sources, for people."""
        return " + ".join(c.name for c in self.train)


def read(data: Data, cache: Path) -> Sources:
    """The sources that a configuration names. Raises `UserError` for what is not there, or not text."""
    apart = data.validation_source
    sources = data.sources
    found = [corpus.read(s, data.validation, held="none" if apart else "share", cache=cache) for s in sources]
    held = None
    if apart is not None:
        own = Source(**{name: getattr(data, name) for name in Source.model_fields})
        held = corpus.read(own.model_copy(update={"source": apart}), held="all", cache=cache)
    return Sources(tuple(found), tuple(s.weight for s in sources), held)


def described(data: Data, cache: Path) -> str:
    """The sources in a line. Raises `UserError` as `read` does; datasets that would be fetched are only named."""
    if any(s.source.startswith(HUB) for s in data.sources):
        return " + ".join(s.source for s in data.sources) + " (hf: datasets are fetched when the run begins)"
    found = read(data, cache)
    return f"{found.name}: {found.files:,} file(s), {size(found.size)}"


def tokenizer_of(text: Sources, given: str | Path | None, vocab_size: int, context: int, cache: Path) -> TextTokenizer:
    """The tokenizer that was given, or one trained on what is not held out. With `data.template: chatml` its settings
    say so, and a trained one has ChatML's tokens. Raises `UserError`."""
    chatml = any(c.source.template == CHATML for c in text.train)
    if given is not None:
        tok = tokenizer.load(given)
    else:
        key = hashlib.sha256(repr([(c.hash, w) for c, w in zip(text.train, text.weights, strict=True)]).encode())
        more = CHATML_TOKENS if chatml else ()
        tok = tokenizer.cached(lambda: _sample(text), key.hexdigest(), vocab_size, context, cache, more)
    own = next((c.source for c in text.train if c.source.template is not None), None)
    if own is None:
        return tok
    return TextTokenizer(tok.json, {**tok.config, "chat_template": template_of(own, tok)})


def _sample(text: Sources) -> Iterator[str]:
    """What a tokenizer is trained on: all, or of a large text parts by chance, of each source by its weight."""
    everything = sum(c.size for c in text.train) <= SAMPLE
    for c, weight in zip(text.train, text.weights, strict=True):
        left = SAMPLE * weight / sum(text.weights)
        parts = list(c.parts)
        if not everything:
            random.Random(0).shuffle(parts)
        for d in (d for part in parts for d in read_part(part, c.source) if d.key >= c.below):
            if not everything and left <= 0:
                break
            left -= d.bytes
            yield d.content if isinstance(d.content, str) else plain(d.content)


def tokenize(
    text: Sources,
    tok: TextTokenizer,
    cache: Path,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> TokenData:
    """Every source as tokens, from the cache or made now. Raises `UserError`."""
    made = [tokens.prepare(c, tok, cache, workers or cores(), progress) for c in text.corpora]
    train = tuple(split for split, *_ in made[: len(text.train)])
    held = tuple(split for _, split, *_ in made if split.documents)
    left_out = tuple(line for *_, lines in made for line in lines)
    for c, split in zip(text.train, train, strict=True):
        if not split.documents:
            raise UserError("\n".join([*left_out, f"{c.name}: nothing in it to train on"]))
    every = hashlib.sha256("\n".join(fingerprint for _, _, fingerprint, _ in made).encode())
    return TokenData(train, held, text.weights, tok.eos, tok.bos, every.hexdigest(), left_out)


def text(
    c: TrainConfig, spec: Spec, console: Console, given: str | Path | None = None
) -> tuple[TextTokenizer, TokenData]:
    """The tokenizer (`given` to a run that is resumed: its own) and the tokens of a run, from the cache where they are
    in it. Raises `UserError` for a text or a tokenizer that cannot be used."""
    cache = tokens.cache_folder(c.data.cache)
    found = read(c.data, cache)
    say(console, f"data: {found.name}, {found.files:,} file(s), {found.size / 1e6:,.1f} MB")
    tok = tokenizer_of(found, given or c.tokenizer, spec.vocab_size, spec.context, cache)
    fits(tok, spec)
    if tok.size < spec.vocab_size:
        say(console, f"tokenizer: {tok.size} tokens; the spec's other {spec.vocab_size - tok.size} rows stay unused")
    with shown(console, "tokenising", sum(p.size for s in found.corpora for p in s.parts)) as progress:
        data = tokenize(found, tok, cache, c.data.workers, progress)
    for line in data.left_out:
        say(console, f"data: {line}")
    for what, splits in (("to train on", data.train), ("held out", data.validation)):
        count, documents = sum(len(s.tokens) for s in splits), sum(s.documents for s in splits)
        say(console, f"tokens: {count:,} {what}, {documents:,} document(s)")
    return tok, data


def fits(tok: TextTokenizer, spec: Spec) -> None:
    """Raises `UserError` for a tokenizer that ends no document, or has more ids than the spec."""
    if tok.size > spec.vocab_size:
        raise UserError(
            f"spec.vocab_size: {spec.vocab_size} is fewer than the tokenizer's {tok.size} tokens (raise it)"
        )
    _ = tok.eos  # raises where there is none


def say(console: Console, line: str) -> None:
    """A line for people."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def ahead(c: TrainConfig, console: Console) -> dict[str, Any]:
    """Everything that a run with this configuration needs of the cache, and what there is then, as plain data."""
    began = time.perf_counter()
    spec, given = load_spec(c.spec), None
    if c.init is not None:
        from train.checkpoint import init

        spec, given = init.spec_of(c), init.tokenizer_of(c)
    tok, data = text(c, spec, console, given)
    return {
        "cache": str(tokens.cache_folder(c.data.cache)),
        "fingerprint": data.fingerprint,
        "tokenizer": {"tokens": tok.size, "hash": tok.hash, "chat_template": tok.template is not None},
        "train": [_told(s) for s in data.train],
        "validation": [_told(s) for s in data.validation],
        "seconds": round(time.perf_counter() - began, 3),
    }


def _told(s: Split) -> dict[str, Any]:
    folder = str(s.tokens.paths[0].parent) if isinstance(s.tokens, Shards) else None
    return {"source": s.name, "tokens": len(s.tokens), "documents": s.documents, "bytes": s.bytes, "folder": folder}
