"""Unigram tokenizers as llama.cpp's `t5`: scores, and the normalizer's table of characters.

llama.cpp does without byte fallback, and its spaces are either all kept, with none before the text, or squeezed to one
before each word.
"""

from __future__ import annotations

import base64
from typing import Any

from backends.base import Tokenizer
from backends.gguf.sentencepiece import SPACE
from backends.gguf.tokenizer import NORMAL, Vocabulary, vocabulary
from backends.tokens import steps
from spec.errors import UserError

SQUEEZES = ({"Regex": " {2,}"}, {"Regex": r"\A +| +\z|(?<= ) +"})
"""Patterns of Replace that leave one space of many."""


def unigram_metadata(tokenizer: Tokenizer, vocab_size: int) -> tuple[Vocabulary, dict[str, Any]]:
    """Tokens, types, scores and keys. Raises `UserError` where llama.cpp does otherwise."""
    model = tokenizer.json["model"]
    if model.get("byte_fallback"):
        raise UserError("tokenizer.model.byte_fallback: llama.cpp's unigram tokenizer has none")
    unk = model.get("unk_id")
    if unk is None:
        raise UserError("tokenizer.model.unk_id: llama.cpp's unigram tokenizer needs an unknown token")
    v = vocabulary(tokenizer, vocab_size)
    v.scores = [float(score) for _, score in model["vocab"]]
    v.scores += [0.0] * (len(v.tokens) - len(v.scores))
    v.types[unk] = 2
    charsmap, squeezed, prefix, splits = _spaces(tokenizer)
    inner = next((t for t, k in zip(v.tokens, v.types, strict=True) if k == NORMAL and SPACE in t[1:]), None)
    if splits and inner is not None:
        raise UserError(f"tokenizer.pre_tokenizer: Metaspace splits words, yet token {inner!r} spans two")
    if squeezed != prefix:
        spaces, first = ("squeezes", "none") if squeezed else ("keeps", "one")
        raise UserError(f"tokenizer.normalizer: {spaces} spaces and puts {first} before the text, which llama.cpp's "
                        "unigram tokenizer does not")  # fmt: skip
    out: dict[str, Any] = {
        "tokenizer.ggml.model": "t5", "tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": squeezed, "tokenizer.ggml.unknown_token_id": unk,
    }  # fmt: skip
    if charsmap:
        out["tokenizer.ggml.precompiled_charsmap"] = charsmap
    return v, out


def _spaces(tokenizer: Tokenizer) -> tuple[bytes, bool, bool, bool]:
    """The table of characters, whether spaces are squeezed, whether one goes before the text, and whether words are
    split. Raises `UserError` for other steps."""
    charsmap, squeezed, prefix, splits = b"", False, False, False
    for n, s in enumerate(steps(tokenizer.json.get("normalizer"), "normalizers")):
        match s:
            case {"type": "Precompiled", "precompiled_charsmap": str(text)} if n == 0:
                charsmap = base64.b64decode(text)
            case {"type": "Replace", "pattern": pattern, "content": ("" | " " | "\u2581")} if pattern in SQUEEZES:
                squeezed = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"} | {"type": "Strip"}:
                pass
            case {"type": "Prepend", "prepend": "\u2581"}:
                prefix = True
            case _:
                raise UserError(f"tokenizer.normalizer: {s['type']} has no llama.cpp form for a unigram model")
    for s in steps(tokenizer.json.get("pre_tokenizer"), "pretokenizers"):
        match s:
            case {"type": "WhitespaceSplit"}:
                squeezed = splits = True
            case {"type": "Metaspace", "replacement": "\u2581"} if s.get("prepend_scheme", "always") != "first":
                prefix = prefix or s.get("prepend_scheme", "always") == "always"
                splits = splits or s.get("split", True)
            case _:
                raise UserError(f"tokenizer.pre_tokenizer: {s['type']} has no llama.cpp form for a unigram model")
    return charsmap, squeezed, prefix, splits
