"""What a client cannot do with any text, and the texts on which it can be equal: told to the user, never passed over.

A client that owns its tokenizer (llama.cpp, onnxruntime-genai) has no way to carry some steps of a tokenizer.json. Each
of these concerns texts of one plain description, which is found out by asking the client; all other texts must have
equal ids, and a conversation as the chat template writes it must have them as it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Literal

from backends.base import Tokenizer
from backends.tokens import steps, surrounding

Turn = tuple[tuple[str, str], ...]
Encode = Callable[[str], list[int]]
GENAI = frozenset({"form", "strips", "first", "nul", "overlap"})
WIDE = 200
"""Added tokens among which overlaps are looked for, of a tokenizer with more."""


@dataclass(frozen=True)
class Limit:
    """Texts within it are what `within` leaves as they are."""

    flag: str
    """What to tell the user."""
    within: Callable[[str], str] = lambda text: text
    chat: bool = True
    """Whether a conversation is compared within it too."""
    alone: bool = False
    """Whether the client puts nothing around a text."""


def normal_form(tokenizer: Tokenizer) -> Literal["NFC", "NFD", "NFKC", "NFKD"] | None:
    """The Unicode normal form that the tokenizer's normalizer brings text to, if any."""
    for step in steps(tokenizer.json.get("normalizer"), "normalizers"):
        if step.get("type") in ("NFC", "NFD", "NFKC", "NFKD"):
            return step["type"]
    return None


def find(tokenizer: Tokenizer, want: Encode, plain: Encode, got: Encode, allowed: frozenset[str]) -> list[Limit]:
    """The limits that a client has, of those that it may have. `want` and `plain` are the ids that are right, with and
    without what goes around a text; `got` are the client's."""
    found = [Limit("it puts nothing around a text", alone=True)] if "around" in allowed and _further(tokenizer) and (
        want("x") != plain("x") and got("x;") == plain("x;") != want("x;")
    ) else []  # fmt: skip
    if found:
        want = plain

    def differ(text: str) -> bool:
        return want(text) != got(text)

    form = normal_form(tokenizer)
    if "form" in allowed and form is not None and differ("e\u0301"):
        found.append(Limit(f"it does not bring text to {form}, as the tokenizer does: pass text that is in it",
                           lambda text: unicodedata.normalize(form, text)))  # fmt: skip
    if "nul" in allowed and differ("a\0b") and got("a\0b") == got("a"):
        found.append(Limit("it ends a text at a NUL: write none", lambda text: text.replace("\0", "")))
    if "next line" in allowed and plain("\x85") == plain(" ") and (differ("a\x85b") or differ("\x85")):
        found.append(Limit("it does not take U+0085 for a space", lambda text: text.replace("\x85", "")))
    one = plain("x") == plain(" x")  # the tokenizer puts a space before a text that has none
    if "first" in allowed and one and differ("x") and not differ(" x"):
        found.append(Limit("it puts no space before a text: begin plain text with one", _spaced(tokenizer)))
    elif "first" in allowed and one and differ(" x") and not differ("x"):
        found.append(Limit("it puts a space before a text that begins with one too: begin with none",
                           lambda text: text.lstrip(" ")))  # fmt: skip
    joined = [(a, rest) for a, rest, other in overlaps(tokenizer)
              if differ(f"x{a}{rest}x") and other in got(f"x{a}{rest}x") and not differ(f"x{a} {rest}x")]  # fmt: skip
    if "overlap" in allowed and joined:
        a, rest = joined[0]
        flag = f"where one token ends in the start of another, it may see the other one: {a + rest!r}"
        found.append(Limit(flag, _apart(joined)))
    if "strips" in allowed:
        found += _strips(tokenizer, differ, got, found)
    return found


def _further(tokenizer: Tokenizer) -> bool:
    """Whether more goes around a text than BOS and EOS, which every client can put there."""
    before, after = surrounding(tokenizer)
    return before not in ([], [tokenizer.bos]) or after not in ([], [tokenizer.eos])


def _spaced(tokenizer: Tokenizer) -> Callable[[str], str]:
    special = tuple(t["content"] for t in tokenizer.json.get("added_tokens") or [])
    return lambda text: text if not text or text.startswith((" ", "\u2581", *special)) else f" {text}"


def _strips(tokenizer: Tokenizer, differ: Callable[[str], bool], got: Encode, found: list[Limit]) -> list[Limit]:
    def other(text: str) -> bool:
        for limit in found:
            text = limit.within(text)
        return differ(text)

    tokens = [t for t in tokenizer.json.get("added_tokens") or [] if t.get("lstrip") or t.get("rstrip")]
    tokens = [t for t in tokens if other(f"x {t['content']} x") and not other(f"x{t['content']}x")]
    tokens = [t for t in tokens if t["id"] in got(f"x {t['content']} x")]
    if not tokens:
        return []
    sides = "|".join((r"\s*" if t["lstrip"] else "") + re.escape(t["content"]) + (r"\s*" if t["rstrip"] else "")
                     for t in sorted(tokens, key=lambda t: -len(t["content"])))  # fmt: skip
    name = tokens[0]["content"]
    flag = f"it keeps spaces around {name} ({len(tokens)} tokens take those beside them): write none there"
    return [Limit(flag, lambda text: re.sub(sides, lambda m: m[0].strip(), text), chat=False)]


def overlaps(tokenizer: Tokenizer, most: int = 50) -> list[tuple[str, str, int]]:
    """Added tokens, each with the rest of one that begins with its end, and that one's id: clients choose in their own
    order which of the two is in such a text."""
    ids = {t["content"]: t["id"] for t in tokenizer.json.get("added_tokens") or []}
    names = list(ids)
    some = names if len(names) <= WIDE else [*names[: WIDE // 2], *names[-WIDE // 2 :]]
    out = ((a, b[n:], ids[b]) for a in some for b in some if a != b for n in range(1, min(len(a), len(b)))
           if a.endswith(b[:n]))  # fmt: skip
    return list(dict.fromkeys(islice(out, most)))


def _apart(pairs: list[tuple[str, str]]) -> Callable[[str], str]:
    def within(text: str) -> str:
        for a, rest in pairs:
            text = text.replace(a + rest, f"{a} {rest}")
        return text

    return within


def conversations(tokenizer: Tokenizer) -> tuple[tuple[str, ...], str | None]:
    """Conversations as the chat template writes them, and why there are no more where it breaks; none without one."""
    if tokenizer.chat_template is None:
        return (), None
    user, system = (("role", "user"), ("content", "What is 2 + 2?\n")), (("role", "system"), ("content", "Be brief."))
    answer = (("role", "assistant"), ("content", "4."))
    names = {f"{r}_token": t for r in ("bos", "eos", "unk", "pad") if (t := getattr(tokenizer, r)) is not None}
    return _rendered(tokenizer.chat_template, tuple(names.items()), ((user,), (user, answer, user), (system, user)))


@lru_cache(maxsize=8)
def _rendered(
    text: str, names: tuple[tuple[str, str], ...], turns: tuple[tuple[Turn, ...], ...]
) -> tuple[tuple[str, ...], str | None]:
    from convert import templates

    messages = [[dict(turn) for turn in conversation] for conversation in turns]
    found, missing = templates.rendered(text, messages, dict(names))
    return tuple(found), missing
