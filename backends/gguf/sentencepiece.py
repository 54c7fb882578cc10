"""BPE in the style of SentencePiece: spaces become U+2581, characters without a token fall back to bytes.

llama.cpp has two tokenizers for it. `llama` merges any two neighbours whose text is a token, best score first, which
is what Hugging Face's merge rules do if every way to split a token is a rule and tokens come in order (as in
converted SentencePiece models). Other rule lists need the tokenizer that knows rules, `gpt2` without byte encoding,
and that one cannot put a space before the text.
"""

from __future__ import annotations

from typing import Any

from backends.base import Tokenizer
from backends.gguf.tokenizer import BYTE, NORMAL, USER_DEFINED, Vocabulary, merges, vocabulary
from backends.tokens import steps
from spec.errors import UserError

SPACE = "\u2581"
_NEVER = -1e9
"""Score of what must not come from a merge."""


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer works on characters with byte fallback instead of on bytes."""
    model = tokenizer.json["model"]
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def sentencepiece_metadata(tokenizer: Tokenizer, vocab_size: int) -> tuple[Vocabulary, dict[str, Any]]:
    """Tokens, types and keys. Raises `UserError` where neither of llama.cpp's tokenizers does the same."""
    v = vocabulary(tokenizer, vocab_size)
    for b in range(256):
        token = f"<0x{b:02X}>"
        if token not in v.ids:
            raise UserError(f"tokenizer: byte fallback without a token {token}, which llama.cpp insists on")
        v.types[v.ids[token]] = BYTE
    prefix = _prefix(tokenizer, v)
    rules = merges(tokenizer)
    scores = _scores(v, rules)
    if scores is not None:
        v.scores = scores
        return v, {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
                   "tokenizer.ggml.add_space_prefix": prefix}  # fmt: skip
    if prefix:
        raise UserError(
            "tokenizer: its merge rules are not those of a SentencePiece model, and llama.cpp's rule-based tokenizer "
            "puts no space before the text (train without prepending one)"
        )
    for t, kind in zip(v.tokens, v.types, strict=True):
        if kind in (NORMAL, USER_DEFINED) and "\n" in t and t.strip("\n"):
            raise UserError(f"tokenizer: token {t!r} joins a newline with other text, which llama.cpp always splits")
    return v, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "sarvam-moe", "tokenizer.ggml.merges": rules,
               "tokenizer.ggml.add_space_prefix": False}  # fmt: skip


def _prefix(tokenizer: Tokenizer, v: Vocabulary) -> bool:
    """Whether a space is put before the text. Raises `UserError` for steps other than SentencePiece's."""
    prefix = replaced = False
    for step in steps(tokenizer.json.get("normalizer"), "normalizers"):
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif kind == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            replaced = True
        else:
            raise UserError(f"tokenizer.normalizer: {kind} has no llama.cpp form next to byte fallback")
    for step in steps(tokenizer.json.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "Split" and step["pattern"] == {"String": " "} and replaced:
            continue  # there are no spaces left
        if kind == "Metaspace" and step.get("replacement", SPACE) == SPACE and _metaspace(step, v):
            replaced = True
            continue
        raise UserError(f"tokenizer.pre_tokenizer: {kind} has no llama.cpp form next to byte fallback")
    if not replaced:
        raise UserError(f"tokenizer.normalizer: spaces must become {SPACE} for a BPE with byte fallback")
    return prefix


def _metaspace(step: dict[str, Any], v: Vocabulary) -> bool:
    inner = next((t for t, k in zip(v.tokens, v.types, strict=True) if k == NORMAL and SPACE in t[1:]), None)
    if step.get("split", True) and inner is not None:
        raise UserError(f"tokenizer.pre_tokenizer: Metaspace splits words, yet token {inner!r} spans two")
    if step.get("prepend_scheme", "always") == "always":  # `first` is said in `notes`
        raise UserError(
            "tokenizer.pre_tokenizer: Metaspace puts no second space before a text that begins with one, and llama.cpp "
            "does (use the normalizer Prepend, or prepend_scheme: never)"
        )
    return True


def _scores(v: Vocabulary, rules: list[str]) -> list[float] | None:
    """A score for every token such that merging by score is merging by these rules; none where there is no such."""
    ranks = {tuple(r.split(" ")): n for n, r in enumerate(rules)}
    made: dict[str, list[int]] = {}
    for (left, right), n in ranks.items():
        made.setdefault(left + right, []).append(n)
    free = {t for t, k in zip(v.tokens, v.types, strict=True) if k in (NORMAL, USER_DEFINED)}
    for t in free:
        for i in range(1, len(t)):
            if t[:i] in free and t[i:] in free and (t[:i], t[i:]) not in ranks:
                return None
    last = -1
    for ns in sorted(made.values(), key=min):
        if min(ns) <= last:
            return None
        last = max(ns)
    return [float(-min(made[t])) if t in made else 0.0 if t in free else _NEVER for t in v.tokens]
