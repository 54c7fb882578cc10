"""A byte-level BPE trained on the text, or a tokenizer that the user brings, in Hugging Face's two files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spec.errors import UserError
from train.data.words import GPT2, Words, words_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast

END = "<|endoftext|>"
"""Begins, ends and separates documents."""

PATTERN = GPT2
"""How text is cut. llama.cpp has it as `gpt-2` and agrees with `tokenizers` on every code point, which it does
not for the newer patterns' case-insensitive parts."""

ACROSS = re.compile(r"[^\W_▁Ġ][▁Ġ ]")
"""A letter, and a space as tokenizers write it: a token that begins in one word and ends in another."""

VERSION = 2
"""Part of the cache's key: raise it when training changes."""

PROBE = 'def größe(x):\n    return {"α": x[0] + 1}  # naïve 3.14\n\n\tIt\'s  "quoted"; they\'ll go 東京 🙂.'
"""Text in which tokenizers differ."""


@dataclass(frozen=True)
class TextTokenizer:
    """tokenizer.json and tokenizer_config.json as they go into the checkpoint."""

    json: str
    config: dict[str, Any]

    def __getstate__(self) -> dict[str, Any]:
        """Only what it is made of, for other processes."""
        return {"json": self.json, "config": self.config}

    @cached_property
    def fast(self) -> Fast:
        """The tokenizer; special tokens that stand in the text are text."""
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_str(self.json)
        fast.encode_special_tokens = True
        fast.no_padding()
        fast.no_truncation()
        return fast

    @cached_property
    def marked(self) -> Fast:
        """The tokenizer that takes special tokens in the text for what they are, as in what a chat template writes."""
        from tokenizers import Tokenizer as Fast

        fast = Fast.from_str(self.json)
        fast.no_padding()
        fast.no_truncation()
        return fast

    @property
    def template(self) -> str | None:
        """The chat template; of several, the one called default."""
        found = self.config.get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default", next(iter(named.values()), None))
        return found if isinstance(found, str) else None

    @property
    def special_names(self) -> dict[str, str]:
        """Special tokens by their role, as templates know them."""
        roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        named = {role: self._content(role) for role in roles}
        return {role: token for role, token in named.items() if token is not None}

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that changes the ids."""
        own = json.dumps([self.json, self.bos, self.eos])
        return hashlib.sha256(own.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Number of ids: the largest one plus one."""
        return max(self.fast.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eos(self) -> int:
        """The id that ends a document."""
        found = self._id("eos_token")
        if found is None:
            raise UserError("tokenizer: no eos_token (documents need an end; name it in tokenizer_config.json)")
        return found

    @property
    def bos(self) -> int | None:
        """The id that begins a document, where the tokenizer adds one (by its post-processor, or by its settings)."""
        name = self._content("bos_token")
        added = name is not None and self.fast.encode("a").tokens[:1] == [name]
        return self._id("bos_token") if added or self.config.get("add_bos_token") else None

    def _content(self, field: str) -> str | None:
        token = self.config.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else str(token)

    def _id(self, field: str) -> int | None:
        token = self._content(field)
        if token is None:
            return None
        found = self.fast.token_to_id(token)
        if found is None:
            raise UserError(f"tokenizer_config.json: {field} {token!r} is not in the vocabulary")
        return found

    @cached_property
    def seam(self) -> int | None:
        """How a text goes on behind a cut before a space between letters, so that its tokens stay the same: with the
        space (0), or without it (1) where the tokenizer puts one before a text; none = it can't be cut there."""
        if any(ACROSS.search(token) for token in self.fast.get_vocab()):
            return None
        whole, first, kept, left = self.encode(["before after", "before", " after", "after"])
        return 0 if whole == first + kept else 1 if whole == first + left else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts, without special tokens."""
        return [e.ids for e in self.fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def _words(self) -> Words | None:
        return words_of(self.fast)

    def arrays(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """What `encode` returns, as arrays, and quicker where the tokenizer is a byte-level BPE."""
        if self._words is not None:
            return [self._words.encode(t) for t in texts]
        return [np.array(ids, np.uint32) for ids in self.encode(texts)]

    def files(self) -> dict[str, bytes]:
        """File names and contents for a checkpoint folder."""
        config = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        return {"tokenizer.json": self.json.encode(), "tokenizer_config.json": config.encode()}


def train(texts: Iterable[str], vocab_size: int, context: int, more: Sequence[str] = ()) -> TextTokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens: the end of text, `more` special ones, 256 bytes, and merges.

    Where the text is too small for so many merges, unused special tokens fill the vocabulary, so that every row of the
    embedding is a token. The result depends on the text alone.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Fast

    least = 257 + len(more)
    if vocab_size < least:
        raise UserError(f"vocab_size: {vocab_size} is too small for a byte-level tokenizer (at least {least})")
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *more],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer)
    missing = vocab_size - fast.get_vocab_size()
    fast.add_special_tokens([AddedToken(f"<|unused_{n}|>", special=True, normalized=False) for n in range(missing)])
    end = fast.token_to_id(END)
    fast.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B:1", special_tokens=[(END, end)]
    )
    return TextTokenizer(fast.to_str(pretty=True), settings(context))


def settings(context: int) -> dict[str, Any]:
    """tokenizer_config.json of a trained tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": None,
        "pad_token": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }


def cached(
    texts: Callable[[], Iterable[str]], key: str, vocab_size: int, context: int, cache: Path, more: Sequence[str] = ()
) -> TextTokenizer:
    """`train`, or what it left in the cache for the same `key` of the texts, and size."""
    every = f"{VERSION}:{PATTERN}:{vocab_size}:{key}:{','.join(more)}"
    file = cache / f"tokenizer-{hashlib.sha256(every.encode()).hexdigest()[:32]}.json"
    if file.is_file():
        found = TextTokenizer(file.read_text(encoding="utf-8"), settings(context))
        if found.size == vocab_size:
            return found
    fresh = train(texts(), vocab_size, context, more)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(fresh.json, encoding="utf-8")
        partial.replace(file)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise UserError(f"{file}: {e.strerror} (choose another folder with --data.cache)") from None
    return fresh


def difference(model: Mapping[str, Any], own: TextTokenizer, *, more: bool = False) -> str | None:
    """How `own` gives other ids than the tokenizer.json of a model, as the end of a sentence about that model; none
    where it does not. `more` lets `own` have tokens beside those of the model."""
    from tokenizers import Tokenizer as Fast

    theirs = Fast.from_str(json.dumps(model))
    theirs.encode_special_tokens = True
    a, b = (dict(t.get_vocab(with_added_tokens=True)) for t in (theirs, own.fast))
    if differing := sorted({token for token, _ in (a.items() - b.items() if more else a.items() ^ b.items())}):
        shown = ", ".join(repr(t) for t in differing[:3])
        return f"has other tokens than the run's tokenizer: {len(differing)} differ ({shown})"
    if len({tuple(t.encode(PROBE, add_special_tokens=False).ids) for t in (theirs, own.fast)}) > 1:
        return "cuts text into tokens otherwise than the run's tokenizer"
    return None


def load(path: str | Path) -> TextTokenizer:
    """A tokenizer.json, or the folder that holds one, with its tokenizer_config.json.

    A lone file begins and ends documents with the `<|endoftext|>` or `</s>` that it has. Raises `UserError`.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        side = file.with_name("tokenizer_config.json")
        config = json.loads(side.read_text(encoding="utf-8")) if side.is_file() else None
        chats = file.with_name("chat_template.jinja")  # counts before the settings, as in transformers
        template = {"chat_template": chats.read_text(encoding="utf-8")} if chats.is_file() else {}
    except OSError as e:
        raise UserError(f"{file}: {e.strerror} (--tokenizer is a tokenizer.json or a folder with one)") from None
    except ValueError as e:
        raise UserError(f"{file.parent}: not a tokenizer: {e}") from None
    found = TextTokenizer(text, (config if isinstance(config, dict) else {}) | template)
    try:
        vocab = found.fast.get_vocab(with_added_tokens=True)
    except Exception as e:  # tokenizers raises bare Exception
        raise UserError(f"{file}: not a tokenizer: {e}") from None
    if config is None:
        end = next((t for t in (END, "</s>", "<|end_of_text|>") if t in vocab), None)
        return TextTokenizer(text, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end} | template)
    return found
