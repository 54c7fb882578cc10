"""All the text of a run: its sources, the tokenizer, and every source's tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from spec.errors import UserError
from train.config import Data
from train.config.sources import CHATML, Source
from train.data import corpus, tokenizer, tokens
from train.data.chat import CHATML_TOKENS, plain, template_of
from train.data.corpus import Corpus, read_part
from train.data.store import TokenData
from train.data.tokenizer import TextTokenizer
from train.data.workers import cores

SAMPLE = 64 * 2**20
"""Bytes of text that a tokenizer is trained on at most."""


@dataclass(frozen=True)
class Text:
    """The sources of a run."""

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


def read(data: Data, cache: Path) -> Text:
    """The sources that a configuration names. Raises `UserError` for what is not there, or not text."""
    apart = data.validation_source
    sources = data.sources
    found = [corpus.read(s, data.validation, held="none" if apart else "share", cache=cache) for s in sources]
    held = None
    if apart is not None:
        own = Source(**{name: getattr(data, name) for name in Source.model_fields})
        held = corpus.read(own.model_copy(update={"source": apart}), held="all", cache=cache)
    return Text(tuple(found), tuple(s.weight for s in sources), held)


def tokenizer_of(text: Text, given: str | Path | None, vocab_size: int, context: int, cache: Path) -> TextTokenizer:
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


def _sample(text: Text) -> Iterator[str]:
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
    text: Text,
    tok: TextTokenizer,
    cache: Path,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> TokenData:
    """Every source as tokens, from the cache or made now. Raises `UserError`."""
    made = [tokens.prepare(c, tok, cache, workers or cores(), progress) for c in text.corpora]
    train = tuple(split for split, _, _ in made[: len(text.train)])
    held = tuple(split for _, split, _ in made if split.documents)
    for c, split in zip(text.train, train, strict=True):
        if not split.documents:
            raise UserError(f"{c.name}: nothing in it to train on")
    every = hashlib.sha256("\n".join(fingerprint for *_, fingerprint in made).encode())
    return TokenData(train, held, text.weights, tok.eos, tok.bos, every.hexdigest())
