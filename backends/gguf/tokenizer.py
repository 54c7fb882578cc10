"""A Hugging Face tokenizer as llama.cpp's `tokenizer.ggml.*` metadata."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from backends.base import Tokenizer
from backends.gguf import pretokenizers
from backends.tokens import steps, surrounding
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
    kind = model.get("type", "BPE")
    if kind not in ("BPE", "Unigram"):
        raise UserError(f"tokenizer.model.type: {kind} has no llama.cpp form here (BPE and Unigram have)")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"tokenizer.model.{name}: {model[name]!r} has no llama.cpp form")
    for note in notes(tokenizer):
        log.warning("%s", note)
    from backends.gguf.sentencepiece import is_sentencepiece, sentencepiece_metadata
    from backends.gguf.unigram import unigram_metadata

    keys = unigram_metadata if kind == "Unigram" else _byte_level
    keys = sentencepiece_metadata if is_sentencepiece(tokenizer) else keys
    vocabulary, out = keys(tokenizer, vocab_size)
    out |= {"tokenizer.ggml.tokens": vocabulary.tokens, "tokenizer.ggml.token_type": vocabulary.types}
    if vocabulary.scores:
        out["tokenizer.ggml.scores"] = vocabulary.scores
    out |= _special(tokenizer, vocabulary)
    if tokenizer.chat_template:
        out["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.templates:
        out["tokenizer.chat_templates"] = list(tokenizer.templates)
        out |= {f"tokenizer.chat_template.{name}": text for name, text in tokenizer.templates.items()}
    return out


def notes(tokenizer: Tokenizer) -> list[str]:
    """What llama.cpp does otherwise in rare texts."""
    out = []
    kinds = {s["type"] for s in steps(tokenizer.json.get("normalizer"), "normalizers")}
    if kinds & {"NFC", "NFKC", "NFD", "NFKD"}:
        form = next(iter(kinds & {"NFC", "NFKC", "NFD", "NFKD"}))
        out.append(f"tokenizer: llama.cpp does not normalize text to {form}: pass text that is")
    strips = [t["content"] for t in tokenizer.json.get("added_tokens", []) if t.get("lstrip") or t.get("rstrip")]
    if strips and not strips_as_phi3(tokenizer):
        out.append(f"tokenizer: llama.cpp keeps spaces around {strips[0]} ({len(strips)} tokens strip them)")
    if added(tokenizer) is None:
        before, after = (" ".join(side) for side in surrounding(tokenizer))
        out.append(f"tokenizer: llama.cpp does not put {before or after} {'before' if before else 'after'} a text: "
                   "write it there, as chat templates do")  # fmt: skip
    if any(s.get("prepend_scheme") == "first" for s in steps(tokenizer.json.get("pre_tokenizer"), "pretokenizers")):
        out.append("tokenizer: llama.cpp puts no space before a text: begin plain text with one (after special tokens "
                   "there is none in either)")  # fmt: skip
    return out


PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
_PHI3_KEEPS = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def strips_as_phi3(tokenizer: Tokenizer) -> bool:
    """Whether added tokens take the white space behind them exactly as llama.cpp lets those of a model do that has
    `phi-3` in its name: GGUF has no other way to say it."""
    tokens = {t["content"]: t for t in tokenizer.json.get("added_tokens", [])}
    return (
        tokens.keys() >= _PHI3_KEEPS | {"</s>"}
        and not any(t.get("lstrip") for t in tokens.values())
        and all(bool(t.get("rstrip")) == (text not in _PHI3_KEEPS) for text, t in tokens.items())
    )


def display_name(name: str, tokenizer: Tokenizer | None) -> str:
    """`general.name`: with `phi-3` in it exactly where the tokenizer asks for what llama.cpp makes of that."""
    if tokenizer is not None and strips_as_phi3(tokenizer):
        return name if PHI3.search(name) else f"{name} (phi-3 tokens)"
    return PHI3.sub("phi 3", name)


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """Every row's token and type. Raises `UserError` where ids and rows do not match."""
    model = tokenizer.json["model"]
    base = model["vocab"].items() if isinstance(model["vocab"], dict) else _numbered(model["vocab"])
    by_id: dict[int, tuple[str, int]] = {i: (t, NORMAL) for t, i in base}
    for t in tokenizer.json.get("added_tokens", []):
        if t.get("single_word"):
            raise UserError(f"tokenizer.added_tokens: {t['content']!r} is found as a whole word alone (single_word), "
                            "which has no llama.cpp form")  # fmt: skip
        by_id[t["id"]] = (t["content"], CONTROL if t.get("special") else USER_DEFINED)
    top = max(by_id, default=-1)
    if top >= vocab_size:
        raise UserError(
            f"vocab_size: {vocab_size}, but the tokenizer has id {top} ({by_id[top][0]!r}): it needs {top + 1} rows"
        )
    taken = {t for t, _ in by_id.values()}
    if (nul := next((t for t in taken if "\0" in t), None)) is not None:
        raise UserError(f"tokenizer: token {nul!r} holds a NUL, where llama.cpp's texts end")
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
    unk = model.get("unk_token") or tokenizer.unk
    ids = {t: i for i, t in enumerate(tokens)}
    if unk in ids and types[ids[unk]] in (NORMAL, CONTROL):
        types[ids[unk]] = UNKNOWN
    return Vocabulary(tokens, types, ids=ids)


def _numbered(pieces: Iterable[Any]) -> Iterator[tuple[str, int]]:
    return ((piece, i) for i, (piece, _) in enumerate(pieces))


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
    found = steps(tokenizer.json.get("normalizer"), "normalizers")
    others = [s["type"] for s in found if s["type"] not in allowed]
    if others:
        raise UserError(f"tokenizer.normalizer: {others[0]} has no llama.cpp form for a byte-level BPE")
    splits = pretokenizers.expressions(tokenizer.json.get("pre_tokenizer"))
    v = vocabulary(tokenizer, vocab_size)
    rules = merges(tokenizer)
    switch = bool(tokenizer.json["model"].get("ignore_merges"))
    pre = pretokenizers.find(splits, switch, lambda: merges_make_every_token(tokenizer, rules))
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
    begins, ends = added(tokenizer) or (False, False)
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


def added(tokenizer: Tokenizer) -> tuple[bool, bool] | None:
    """Whether BOS goes before and EOS after a text; none where other tokens do, which llama.cpp cannot put there."""
    before, after = surrounding(tokenizer)
    if before not in ([], [tokenizer.bos]) or after not in ([], [tokenizer.eos]):
        return None
    return bool(before), bool(after)
