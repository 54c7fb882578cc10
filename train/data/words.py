"""The tokens of a text, word by word: what a tokenizer makes of each word is asked once.

A byte-level BPE cuts text by a regular expression and merges within each piece, so equal pieces have equal tokens.
Cutting is `re`'s work here, by the tokenizer's own pattern. ASCII characters of the same class (letter, number, space,
other) stand in for those beyond ASCII; the class is what the tokenizer's engine says it is. A tokenizer that does
anything else, and a text that needs more, is left to the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What `ByteLevel` cuts by on its own (Radford et al. 2019)."""

PIECE = re.compile(r"\\p\{[LN]\}|\\[sSrn]|\(\?i:|\(\?:|\(\?!|\{\d(?:,\d)?\}|\[\^?|[\])|?*+' /a-y]")
"""What patterns may consist of: `re` reads it as the tokenizer's engine does, on ASCII text."""
GREEDY = re.compile(r"[+*?}][+?]")
"""Quantifiers that are not plainly greedy."""
CLASSES = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9"}

STAND_INS = ((r"\p{L}", "z"), (r"\p{N}", "0"), (r"\s", "\x0b"))
OTHER = "\x01"
"""In the place of characters beyond ASCII, by class; no pattern names these by themselves."""
FOLDED = re.compile("[\u017f\u212a]")
"""Characters that are s and k where case does not count."""
BEYOND = re.compile(r"[^\x00-\x7f]")
FEW = 24
"""Distinct characters up to which they are replaced one by one, which is quicker."""
MOST, LONG = 2**18, 64
"""Words that are remembered, at most, and characters of the longest of them."""


class StandIns(dict[int, str]):
    """Characters' stand-ins, found when they are first met."""

    def __init__(self) -> None:
        from tokenizers import Regex, pre_tokenizers

        super().__init__({n: chr(n) for n in range(128)})
        self.engines = [(pre_tokenizers.Split(Regex(name), "removed"), c) for name, c in STAND_INS]

    def __missing__(self, code: int) -> str:
        found = (c for engine, c in self.engines if not engine.pre_tokenize_str(chr(code)))
        self[code] = next(found, OTHER)
        return self[code]


class Words:
    """Encodes texts exactly as the tokenizer does."""

    def __init__(self, fast: Fast, data: dict[str, Any], pattern: str) -> None:
        from tokenizers import Tokenizer as Fast
        from tokenizers import pre_tokenizers

        self.fast = fast
        self.pattern = re.compile(pattern, re.ASCII)
        self.merging = Fast.from_str(
            json.dumps({**data, "added_tokens": [], "normalizer": None, "pre_tokenizer": None})
        )
        self.merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.merging.no_truncation()
        self.merging.no_padding()
        tokens = [t["content"] for t in data.get("added_tokens", []) if not t["special"]]
        self.apart = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self.normalized = data.get("normalizer") is not None
        self.stand_ins = StandIns()
        self.known: dict[str, bytes] = {}

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Ids of a text, without special tokens."""
        words = None if self.apart.search(text) else self._cut(text)
        if words is None:
            return np.array(self.fast.encode(text, add_special_tokens=False).ids, "<u4")
        if len(self.known) > MOST:
            self.known.clear()
        fresh = list(set(words).difference(self.known))
        for word, e in zip(fresh, self.merging.encode_batch_fast(fresh, add_special_tokens=False), strict=True):
            self.known[word] = np.array(e.ids, "<u4").tobytes()
        ids = np.frombuffer(b"".join(map(self.known.__getitem__, words)), "<u4")
        for word in fresh:
            if len(word) > LONG:
                del self.known[word]
        return ids

    def _cut(self, text: str) -> list[str] | None:
        """The pieces between which nothing merges; none where only the tokenizer knows."""
        if text.isascii():
            words = self.pattern.findall(text)
            return words if sum(map(len, words)) == len(text) else None
        if self.normalized or FOLDED.search(text):
            return None
        distinct = set(BEYOND.findall(text))
        plain = text
        if len(distinct) <= FEW:
            for c in distinct:
                plain = plain.replace(c, self.stand_ins[ord(c)])
        else:
            plain = text.translate(self.stand_ins)
        ends = [0, *accumulate(map(len, self.pattern.findall(plain)))]
        return [text[a:b] for a, b in pairwise(ends)] if ends[-1] == len(text) else None


def words_of(fast: Fast) -> Words | None:
    """The word by word encoder of a tokenizer; none if it does more than cut and merge."""
    data = json.loads(fast.to_str())
    model, normalizer = data["model"], data.get("normalizer")
    pattern = _pattern(data.get("pre_tokenizer"))
    simple = model["type"] == "BPE" and not model.get("dropout") and not model.get("continuing_subword_prefix")
    simple &= not model.get("end_of_word_suffix") and (normalizer is None or normalizer["type"] == "NFC")
    return Words(fast, data, pattern) if simple and pattern is not None else None


def _pattern(cutting: dict[str, Any] | None) -> str | None:
    """The pattern as `re` reads it on ASCII text."""
    steps = cutting["pretokenizers"] if cutting is not None and cutting["type"] == "Sequence" else [cutting or {}]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if last.get("use_regex", True) == bool(before):  # cut by one of both
        return None
    if not before:
        return _translated(GPT2)
    [split] = before
    plain = split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    regex = split["pattern"].get("Regex") if plain else None
    return None if regex is None or PIECE.sub("", regex) else _translated(regex)


def _translated(regex: str) -> str | None:
    """The pattern for ASCII text; none where it says things that the two engines may read differently."""
    inside, out = False, []
    for piece in PIECE.findall(regex):
        out.append(CLASSES.get(piece, piece) if inside or piece not in CLASSES else f"[{CLASSES[piece]}]")
        inside = piece.startswith("[") or (inside and piece != "]")
    made = "".join(out)
    return None if GREEDY.search(made) else made
