"""BPE in the style of SentencePiece: spaces become U+2581, unknown characters fall back to bytes."""

from __future__ import annotations

from typing import Any

from backends.base import Tokenizer
from backends.gguf.tokenizer import Vocabulary
from spec.errors import UserError


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer works on characters with byte fallback instead of on bytes."""
    return bool(tokenizer.json["model"].get("byte_fallback"))


def sentencepiece_metadata(tokenizer: Tokenizer, vocab_size: int) -> tuple[Vocabulary, dict[str, Any]]:
    """Tokens, types and keys."""
    raise UserError("tokenizer: byte fallback is not carried")
