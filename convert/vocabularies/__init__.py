"""Vocabulary files of other tokenizers than `tokenizers`, turned into its tokenizer.json: SentencePiece models
(BPE, unigram), vocab.json with merges.txt, tiktoken's ranks and Mistral's tekken.json.

Each reader gives the same ids as the library that the file is for, which is tried on fuzzed text where that library is
here; what has no equal form is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.sources.files import present, read_bytes
from convert.vocabularies import gpt2, sentencepiece, tiktoken
from spec.errors import UserError

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
TIKTOKEN = ("tokenizer.model", "tiktoken.model", "tokenizer.tiktoken", "qwen.tiktoken", "vocab.tiktoken")
FILES = tuple(dict.fromkeys((*SENTENCEPIECE, *TIKTOKEN, "tekken.json", "vocab.json", "merges.txt", "vocab.txt")))
"""Every file that is looked at where there is no tokenizer.json."""


@dataclass
class Found:
    """A tokenizer.json and the special tokens that the vocabulary file itself names."""

    json: dict[str, Any]
    roles: dict[str, str] = field(default_factory=dict)
    add_bos: bool = False
    sentencepiece: bytes | None = None


def find(folder: Path, config: Mapping[str, Any]) -> Found | None:
    """The tokenizer of a folder without tokenizer.json; none where nothing there is one.

    config: tokenizer_config.json. Raises `UserError` for files that are damaged or of a kind that is not carried.
    """
    readers: list[tuple[str, Callable[[Path, Mapping[str, Any]], Found]]] = [
        *((name, _model) for name in SENTENCEPIECE),
        ("tekken.json", lambda file, _: Found(*tiktoken.read_tekken(file))),
        *((name, _tiktoken) for name in TIKTOKEN[1:]),
        ("vocab.json", lambda file, c: Found(gpt2.read(file, c))),
    ]
    for name, reader in readers:
        if present(folder / name):
            return reader(folder / name, config)
    if present(folder / "vocab.txt"):
        raise UserError(f"{folder / 'vocab.txt'}: a WordPiece vocabulary; decoders here have BPE or unigram tokenizers")
    return None


def _model(file: Path, config: Mapping[str, Any]) -> Found:
    data = read_bytes(file)
    if tiktoken.looks_like(data):
        return _tiktoken(file, config)
    made, roles, add_bos = sentencepiece.read(data, file, config)
    return Found(made, roles, add_bos, data)


def _tiktoken(file: Path, config: Mapping[str, Any]) -> Found:
    return Found(tiktoken.read(read_bytes(file), file, config))
