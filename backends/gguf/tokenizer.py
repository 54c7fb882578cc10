"""A Hugging Face tokenizer as llama.cpp's `tokenizer.ggml.*` metadata."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from backends.base import Tokenizer
from backends.gguf import pretokenizers
from spec.errors import UserError

log = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types."""


@dataclass
class Vocabulary:
    """Tokens by id, with types, and scores where the model has them."""

    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)


def tokenizer_metadata(tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    """All keys, for a model whose embedding has `vocab_size` rows; rows beyond the vocabulary become unused tokens.

    Raises `UserError` where the tokenizer does something that llama.cpp cannot.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    model = tokenizer.json.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"tokenizer.model.type: {model.get('type')} has no llama.cpp form here (BPE has)")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"tokenizer.model.{name}: {model[name]!r} has no llama.cpp form")
    for note in notes(tokenizer):
        log.warning("%s", note)
    from backends.gguf.sentencepiece import is_sentencepiece, sentencepiece_metadata

    keys = sentencepiece_metadata if is_sentencepiece(tokenizer) else _byte_level
    vocabulary, out = keys(tokenizer, vocab_size)
    out |= {"tokenizer.ggml.tokens": vocabulary.tokens, "tokenizer.ggml.token_type": vocabulary.types}
    if vocabulary.scores:
        out["tokenizer.ggml.scores"] = vocabulary.scores
    out |= _special(tokenizer, vocabulary)
    if tokenizer.chat_template:
        out["tokenizer.chat_template"] = tokenizer.chat_template
    return out


def notes(tokenizer: Tokenizer) -> list[str]:
    """What llama.cpp does otherwise in rare texts."""
    out = []
    kinds = set(_normalizers(tokenizer.json.get("normalizer")))
    if kinds & {"NFC", "NFKC", "NFD", "NFKD"}:
        form = next(iter(kinds & {"NFC", "NFKC", "NFD", "NFKD"}))
        out.append(f"tokenizer: llama.cpp does not normalize text to {form}: pass text that is")
    strips = [t["content"] for t in tokenizer.json.get("added_tokens", []) if t.get("lstrip") or t.get("rstrip")]
    if strips:
        out.append(f"tokenizer: llama.cpp keeps spaces around {strips[0]} ({len(strips)} tokens strip them)")
    return out


def _normalizers(step: dict[str, Any] | None) -> Iterator[str]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for s in step["normalizers"]:
            yield from _normalizers(s)
    else:
        yield step["type"]


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Every row's token and type. Raises `UserError` where ids and rows do not match."""
    model = tokenizer.json["model"]
    by_id: dict[int, tuple[str, int]] = {i: (t, NORMAL) for t, i in model["vocab"].items()}
    for t in tokenizer.json.get("added_tokens", []):
        by_id[t["id"]] = (t["content"], CONTROL if t.get("special") else USER_DEFINED)
    top = max(by_id, default=-1)
    if top >= vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size}, but the tokenizer has id {top} ({by_id[top][0]!r}): it needs {top + 1} rows"
        )
    taken = {t for t, _ in by_id.values()}
    if len(taken) != len(by_id):
        names = [t for t, _ in by_id.values()]
        twice = next(t for t in names if names.count(t) > 1)
        raise UserError(f"tokenizer: token {twice!r} has several ids, which llama.cpp refuses")
    tokens, types = [], []
    for i in range(vocab_size):
        text, kind = by_id.get(i, ("", UNUSED))
        if kind == UNUSED:
            text = f"[PAD{i}]"
            while text in taken:
                text = f"[{text}]"
        tokens.append(text)
        types.append(kind)
    unk = model.get("unk_token")
    ids = {t: i for i, t in enumerate(tokens)}
    if unk in ids and types[ids[unk]] in (NORMAL, CONTROL):
        types[ids[unk]] = UNKNOWN
    return Vocabulary(tokens, types, ids=ids)


def merges(tokenizer: Tokenizer) -> list[str]:
    """The merge rules as `left right`."""
    out = []
    for rule in tokenizer.json["model"].get("merges", []):
        left, right = rule.split(" ") if isinstance(rule, str) else rule
        if " " in left or " " in right:
            raise UserError(f"tokenizer.model.merges: {rule!r} contains a space, which llama.cpp's format cannot hold")
        out.append(f"{left} {right}")
    return out


def merges_make_every_token(tokenizer: Tokenizer, rules: list[str]) -> bool:
    """Whether the merge rules turn the text of every token into that token, so that skipping them changes nothing."""
    ranks = {(r.partition(" ")[0], r.partition(" ")[2]): n for n, r in enumerate(rules)}
    special = {t["content"] for t in tokenizer.json.get("added_tokens", [])}
    for token in tokenizer.json["model"]["vocab"]:
        parts = list(token)
        while token not in special and len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(rules)))
            if best not in ranks:
                return False
            merged, i = [], 0
            while i < len(parts):
                pair = i + 1 < len(parts) and (parts[i], parts[i + 1]) == best
                merged.append(parts[i] + parts[i + 1] if pair else parts[i])
                i += 2 if pair else 1
            parts = merged
    return True


def _byte_level(tokenizer: Tokenizer, vocab_size: int) -> tuple[Vocabulary, dict[str, Any]]:
    allowed = {"NFC", "NFKC", "NFD", "NFKD"}
    others = [n for n in _normalizers(tokenizer.json.get("normalizer")) if n not in allowed]
    if others:
        raise UserError(f"tokenizer.normalizer: {others[0]} has no llama.cpp form for a byte-level BPE")
    found = pretokenizers.expressions(tokenizer.json.get("pre_tokenizer"))
    v = vocabulary(tokenizer, vocab_size)
    rules = merges(tokenizer)
    switch = bool(tokenizer.json["model"].get("ignore_merges"))
    pre = pretokenizers.find(found, switch, lambda: merges_make_every_token(tokenizer, rules))
    if pre.caveat:
        log.warning("tokenizer: %s", pre.caveat)
    return v, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre.name,
        "tokenizer.ggml.merges": rules,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _special(tokenizer: Tokenizer, v: Vocabulary) -> dict[str, Any]:
    """Ids of special tokens. llama.cpp takes token 11 for the end where a BPE names none, so there is always one."""
    out: dict[str, Any] = {}

    def put(key: str, token: str | None) -> None:
        if token is None:
            return
        if token not in v.ids:
            raise UserError(f"tokenizer: special token {token!r} is not in the vocabulary")
        out[f"tokenizer.ggml.{key}_token_id"] = v.ids[token]

    control = [t for t, kind in zip(v.tokens, v.types, strict=True) if kind in (CONTROL, UNKNOWN)]
    unused = [t for t, kind in zip(v.tokens, v.types, strict=True) if kind == UNUSED]
    end = tokenizer.eos or tokenizer.pad or next(iter(tokenizer.extra_eos + tuple(control) + tuple(unused)), None)
    if end is None:
        raise UserError("tokenizer: has no end-of-text token, and llama.cpp insists on one (set eos_token)")
    begins, ends = added(tokenizer)
    put("bos", tokenizer.bos or end)
    put("eos", end)
    put("unknown", tokenizer.unk)
    put("padding", tokenizer.pad)
    extra = [t for t in tokenizer.extra_eos if t in v.ids and t != end]
    for key, token in zip(("eot", "eom"), extra, strict=False):
        put(key, token)
    for token in extra[2:]:
        if token not in RECOGNISED_ENDS:
            log.warning("tokenizer: llama.cpp knows three ends of text at most; %r will not stop it", token)
    out["tokenizer.ggml.add_bos_token"] = begins
    out["tokenizer.ggml.add_eos_token"] = ends
    return out


RECOGNISED_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>",
})  # fmt: skip
"""Tokens that llama.cpp takes for the end by their text."""


def added(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether encoding puts BOS before and EOS after a text: the post-processor's template decides where there is
    one."""
    template = next(_templates(tokenizer.json.get("post_processor")), None)
    if template is None:
        return tokenizer.add_bos and tokenizer.bos is not None, tokenizer.add_eos and tokenizer.eos is not None
    before, after, inside = [], [], False
    for part in template["single"]:
        if "Sequence" in part:
            inside = True
        else:
            (after if inside else before).append(part["SpecialToken"]["id"])
    if before not in ([], [tokenizer.bos]) or after not in ([], [tokenizer.eos]):
        raise UserError(
            f"tokenizer.post_processor: puts {before} before and {after} after a text; llama.cpp can put "
            f"bos ({tokenizer.bos}) and eos ({tokenizer.eos}) there"
        )
    return bool(before), bool(after)


def _templates(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    if step["type"] == "Sequence":
        for s in step["processors"]:
            yield from _templates(s)
    elif step["type"] == "TemplateProcessing":
        yield step
