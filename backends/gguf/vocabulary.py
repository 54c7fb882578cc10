"""llama.cpp's `tokenizer.ggml.*` metadata as a Hugging Face tokenizer: the inverse of `backends.gguf.tokenizer`.

Everything that llama.cpp decides by itself (defaults, tokens that it takes for control tokens by their text, models
whose special tokens swallow spaces) is decided in the same way here, so that ids are those of the file's own client.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.base import Tokenizer
from backends.gguf import pretokenizers
from backends.gguf.sentencepiece import SPACE
from backends.gguf.tokenizer import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from backends.gguf.unigram import SQUEEZES
from spec.errors import UserError, nearest

ALIASES = {
    alias: name
    for name, aliases in {
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5",
        "dbrx": "smaug-bpe chatglm-bpe",
        "gpt-2": "phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert mpt olmo jais "
                 "trillion granite-docling exaone4",
        "starcoder": "refact command-r smollm codeshell exaone minerva-7b mellum2",
        "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
        "bloom": "poro-chat gpt3-finnish",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
        "bailingmoe": "bailingmoe2 llada-moe",
    }.items()
    for alias in aliases.split()
}  # fmt: skip
"""Names of llama.cpp's pre-tokenizers that mean the same as one of `pretokenizers.KNOWN`."""

ONLY_READ = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", pretokenizers.GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
"""Expressions of those that no tokenizer is written with."""

ADD_BOS = frozenset({
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
})  # fmt: skip
"""Pre-tokenizers with which llama.cpp puts a BOS before a text unless the file says otherwise."""

ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})  # fmt: skip
"""Tokens that llama.cpp takes for control tokens that end a text, by their text alone."""
PLAIN = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
"""Tokens that it takes for user-defined ones."""
NOT_ENDS = ((frozenset({"<|return|>", "<|call|>"}), "<|end|>"), (frozenset({"<|calls|>", "<|flush|>"}), "<|end|>"))
"""Where these are, that is no end."""

DEFAULTS = {"gpt2": (None,) * 4, "llama": (1, 2, 0, None), "t5": (None, 1, 2, 0)}
"""Ids of BOS, EOS, unknown and padding where a file names none. For a BPE llama.cpp takes 11 as BOS and EOS, which is
no token's meaning: it counts as none."""

BLANK = re.compile(r"\[+PAD\d+\]+")
"""Text of rows that no token has."""


@dataclass
class _Vocabulary:
    """`tokenizer.ggml.*`, checked."""

    keys: Mapping[str, Any]
    source: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)

    def get(self, key: str, default: Any = None) -> Any:
        return self.keys.get(f"tokenizer.ggml.{key}", default)

    def bad(self, key: str, rule: str) -> UserError:
        return UserError(f"{self.source}: tokenizer.ggml.{key}: {rule}")

    def special(self, key: str, default: int | None = None) -> str | None:
        """The token of an id; one outside the vocabulary counts as none, as in llama.cpp."""
        i = self.get(f"{key}_token_id", default)
        if i is None:
            return None
        if type(i) is not int:
            raise self.bad(f"{key}_token_id", f"{i!r} is no id")
        return self.tokens[i] if 0 <= i < len(self.tokens) else None


def read_vocabulary(keys: Mapping[str, Any], rows: int, source: str) -> Tokenizer | None:
    """The tokenizer in a file's metadata, for an embedding of so many rows; none where it has none.

    Raises `UserError` for tokenizers that have no Hugging Face form here, and damaged ones.
    """
    model = keys.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return None
    v = _Vocabulary(keys, source)
    readers = {"gpt2": _gpt2, "llama": _llama, "t5": _t5}
    if model not in readers:
        shown = " (WordPiece)" if model == "bert" else ""
        raise v.bad("model", f"{model!r}{shown} is no tokenizer that is read ({', '.join(readers)} are)")
    v.tokens, v.types = _tokens(v, rows)
    return readers[model](v)


def _tokens(v: _Vocabulary, rows: int) -> tuple[list[str], list[int]]:
    tokens, types = v.get("tokens"), v.get("token_type")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise v.bad("tokens", "are no list of texts")
    if len(tokens) > rows:
        raise v.bad("tokens", f"{len(tokens)} tokens, and the embedding has {rows} rows")
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(t for t in tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
        raise v.bad("tokens", f"{twice!r} is there twice")
    types = [NORMAL] * len(tokens) if types is None else types
    if not isinstance(types, list) or len(types) < len(tokens) or not all(type(t) is int for t in types):
        raise v.bad("token_type", f"is no type for each of {len(tokens)} tokens")
    types = types[: len(tokens)]
    for i, t in enumerate(tokens):
        if t in ENDS and types[i] not in (CONTROL, UNKNOWN):
            types[i] = CONTROL
        if t in PLAIN:
            types[i] = USER_DEFINED
    return tokens, types


def _rules(v: _Vocabulary) -> list[list[str]]:
    rules = v.get("merges")
    if not isinstance(rules, list) or not all(isinstance(r, str) for r in rules):
        raise v.bad("merges", "are no list of texts")
    known = set(v.tokens)
    out = []
    for rule in rules:
        at = rule.find(" ", 1)
        left, right = rule[:at], rule[at + 1 :]
        if at < 0 or left not in known or right not in known or left + right not in known:
            raise v.bad("merges", f"{rule!r} is no rule between tokens of the vocabulary")
        out.append([left, right])
    return out


def _gpt2(v: _Vocabulary) -> Tokenizer:
    pre = v.get("pre", "default")
    if pre == "sarvam-moe":  # rules over characters with byte fallback, as `sentencepiece` writes them
        return _characters(v, _rules(v), prefix=bool(v.get("add_space_prefix", False)), bos=False)
    known = {p.name: p for p in pretokenizers.KNOWN}
    name = ALIASES.get(pre, pre)
    if name in known:
        expressions, ignore = known[name].expressions, known[name].ignore_merges
    elif name in ONLY_READ:
        expressions, ignore = ONLY_READ[name], False
    else:
        names = sorted({*known, *ALIASES, *ONLY_READ})
        raise v.bad("pre", f"{pre!r} is no pre-tokenizer that is read ({nearest(str(pre), names)})")
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated", "invert": False} for e in expressions
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"ignore_merges": ignore, "byte_fallback": False, "vocab": _vocab(v), "merges": _rules(v)}
    return _tokenizer(v, model, None, {"type": "Sequence", "pretokenizers": [*steps, level]}, level, pre in ADD_BOS)


def _llama(v: _Vocabulary) -> Tokenizer:
    """SentencePiece's BPE: any two neighbours whose text is a token may merge, the best score first."""
    scores = v.get("scores")
    if not isinstance(scores, list) or len(scores) < len(v.tokens):
        raise v.bad("scores", f"are no score for each of {len(v.tokens)} tokens")
    ids, prefix = {t: i for i, t in enumerate(v.tokens)}, bool(v.get("add_space_prefix", True))
    top = max(scores[: len(v.tokens)], default=0.0)
    found = []
    for t, i in ids.items():
        splits = [(t[:at], t[at:]) for at in range(1, len(t)) if t[:at] in ids and t[at:] in ids]
        found += [(-scores[i], i, left, right) for left, right in splits]
        apart = any(all(p in ids or len(p) == 1 for p in (t[:at], t[at:])) for at in range(1, len(t)))
        if apart and not splits and scores[i] == top and v.types[i] == NORMAL and not prefix:
            v.types[i] = USER_DEFINED  # made of characters that are no tokens, before anything else is merged
    found.sort(key=lambda r: r[:2])
    return _characters(v, [[left, right] for *_, left, right in found], prefix, True)


def _t5(v: _Vocabulary) -> Tokenizer:
    """SentencePiece's unigram model, without bytes for what it does not know."""
    scores, unk = v.get("scores"), v.get("unknown_token_id", 2)
    if not isinstance(scores, list) or len(scores) < len(v.tokens):
        raise v.bad("scores", f"are no score for each of {len(v.tokens)} tokens")
    if type(unk) is not int or not 0 <= unk < len(v.tokens):
        raise v.bad("unknown_token_id", f"{unk!r} is no token")
    prefix, squeezed = bool(v.get("add_space_prefix", False)), bool(v.get("remove_extra_whitespaces", False))
    if prefix and not squeezed:
        raise v.bad("add_space_prefix", "true without remove_extra_whitespaces: llama.cpp then moves spaces")
    table = v.get("precompiled_charsmap")
    normalizers: list[dict[str, Any]] = []
    if table:
        text = base64.b64encode(bytes(int(b) & 255 for b in table)).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": text})
    if squeezed:
        normalizers.append({"type": "Replace", "pattern": SQUEEZES[1], "content": ""})
    scheme = "always" if squeezed else "never"
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    known = _vocab(v)
    size = max(known.values(), default=-1) + 1
    if size != len(known):
        raise v.bad("tokens", "a row without a token comes before one with a token, which a unigram list cannot hold")
    model = {
        "type": "Unigram", "unk_id": unk, "byte_fallback": False,
        "vocab": [[t, float(s)] for t, s in zip(v.tokens[:size], scores, strict=False)],
    }  # fmt: skip
    normalizer = {"type": "Sequence", "normalizers": normalizers} if normalizers else None
    return _tokenizer(v, model, normalizer, spaces, spaces, False)


def _characters(v: _Vocabulary, rules: list[list[str]], prefix: bool, bos: bool) -> Tokenizer:
    """A BPE of characters in which spaces are U+2581, and characters without a token are bytes."""
    ids = set(v.tokens)
    lacking = [b for b in range(256) if f"<0x{b:02X}>" not in ids]
    if lacking:
        raise v.bad("tokens", f"no <0x{lacking[0]:02X}> ({len(lacking)} bytes have no token), and llama.cpp needs them")
    swap = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        "unk_token": v.special("unknown", 0 if bos else None), "fuse_unk": True, "byte_fallback": True,
        "ignore_merges": False, "vocab": _vocab(v), "merges": rules,
    }  # fmt: skip
    normalizer = {"type": "Sequence", "normalizers": [*before, swap]} if prefix else swap
    return _tokenizer(v, model, normalizer, None, {"type": "Sequence", "decoders": back}, bos)


def _vocab(v: _Vocabulary) -> dict[str, int]:
    return {t: i for i, t in enumerate(v.tokens) if not (v.types[i] == UNUSED and BLANK.fullmatch(t))}


def _tokenizer(
    v: _Vocabulary,
    model: dict[str, Any],
    normalizer: dict[str, Any] | None,
    pre: dict[str, Any] | None,
    decoder: dict[str, Any],
    add_bos: bool,
) -> Tokenizer:
    defaults = DEFAULTS[v.get("model")]
    bos, eos, unk, pad = (v.special(n, i) for n, i in zip(("bos", "eos", "unknown", "padding"), defaults, strict=True))
    begins = bool(v.get("add_bos_token", add_bos)) and bos is not None
    ends = bool(v.get("add_eos_token", v.get("model") == "t5")) and eos is not None
    data = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(v), "normalizer": normalizer,
        "pre_tokenizer": pre, "post_processor": _around(v, bos if begins else None, eos if ends else None),
        "decoder": decoder,
        "model": model if model.get("type") == "Unigram" else {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, **model,
        },
    }  # fmt: skip
    template = v.keys.get("tokenizer.chat_template")
    names = v.keys.get("tokenizer.chat_templates")
    named = {str(n): v.keys.get(f"tokenizer.chat_template.{n}") for n in (names if isinstance(names, list) else [])}
    return Tokenizer(
        json=data, bos=bos, eos=eos, unk=unk, pad=pad,
        extra_eos=_ends(v, eos), add_bos=begins, add_eos=ends,
        chat_template=template if isinstance(template, str) else None,
        templates={n: t for n, t in named.items() if isinstance(t, str)},
    )  # fmt: skip


def _added(v: _Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in the text before anything else. llama.cpp lets those of Phi-3 take the spaces after
    them, which it knows by the model's name."""
    name = str(v.keys.get("general.name", "")).lower()
    greedy = any(n in name for n in ("phi-3", "phi3"))
    plain = {"<unk>", "<s>", "<|endoftext|>"}
    return [
        {
            "id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": greedy and t not in plain,
            "normalized": False, "special": kind != USER_DEFINED,
        }
        for i, (t, kind) in enumerate(zip(v.tokens, v.types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip


def _ends(v: _Vocabulary, eos: str | None) -> tuple[str, ...]:
    """Further tokens that end generation: those that the file names, and those that llama.cpp knows by their text."""
    named = [v.special("eot"), v.special("eom")]
    control = [t for t, kind in zip(v.tokens, v.types, strict=True) if t in ENDS and kind == CONTROL]
    for together, end in NOT_ENDS:
        if together <= set(v.tokens):
            control = [t for t in control if t != end]
    return tuple(t for t in dict.fromkeys([*named, *control]) if t is not None and t != eos)


def _around(v: _Vocabulary, bos: str | None, eos: str | None) -> dict[str, Any] | None:
    """A post-processor that puts tokens before and after a text."""
    if bos is None and eos is None:
        return None

    def token(text: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": text, "type_id": kind}}

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        before = [token(bos, kind)] if bos is not None else []
        after = [token(eos, kind)] if eos is not None else []
        return [*before, {"Sequence": {"id": name, "type_id": kind}}, *after]

    used: Sequence[str] = [t for t in (bos, eos) if t is not None]
    return {
        "type": "TemplateProcessing", "single": sequence("A", 0), "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {t: {"id": t, "ids": [v.tokens.index(t)], "tokens": [t]} for t in used},
    }  # fmt: skip
