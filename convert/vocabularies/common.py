"""What the readers share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

LONGEST = 2000
"""Bytes of a token at most, fifteen times the longest that there is: all ways to make it of two are tried."""


def added(content: str, index: int, special: bool = True) -> dict[str, Any]:
    """An added token as tokenizer.json has it, found before text is normalized."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": index, "content": content, **flags}


def all_merges(parts: Collection[Any], rank: Callable[[Any], Any], ids: Mapping[Any, int]) -> list[tuple[Any, Any]]:
    """Every way to make a part of two others, in the order of the part's rank: what merges by rank of the result does,
    as rules. Parts of one rank: the shorter left side last (its pair stands further to the right)."""
    rules = []
    for part in sorted(parts, key=rank):
        ways = [(part[:i], part[i:]) for i in range(1, len(part)) if part[:i] in ids and part[i:] in ids]
        rules += sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))
    return rules


def document(model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    """A whole tokenizer.json."""
    empty = {"truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
             "post_processor": None, "decoder": None}  # fmt: skip
    return {"version": "1.0", **empty, **steps, "model": model}


def bpe(vocab: dict[str, int], merges: list[list[str]], **switches: Any) -> dict[str, Any]:
    """A BPE model."""
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    return {"type": "BPE", **plain, **switches, "vocab": vocab, "merges": merges}


def sequence(steps: list[dict[str, Any]], inner: str) -> dict[str, Any] | None:
    """Steps as one."""
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", inner: steps}


def byte_level(expression: str | None) -> dict[str, Any]:
    """Pre-tokenizer, decoder and post-processor of a BPE on bytes; without an expression, GPT-2's own."""
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": expression is None}
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    pre = plain if expression is None else {"type": "Sequence", "pretokenizers": [split, plain]}
    end = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"pre_tokenizer": pre, "decoder": end, "post_processor": end}
