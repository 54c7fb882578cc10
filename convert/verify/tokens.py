"""The fifth check: the artifact's own tokenizer against the `tokenizers` library, on text made to break it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from backends.base import Tokenizer
from backends.folder import end_ids
from backends.tokens import surrounding
from convert.gates import TOKENIZER_DIFFERENCES
from convert.verify import limits
from convert.verify.report import Check, Status
from convert.verify.sample import corpus, open_tokenizer

_FIXED = (
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    " \n \n\n  x",
    "Hello, world!",
    "I'm you're WE'LL they'd it's 'tis",
    "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # no-op\n",
    "3.14159 1,000,000 0xDEADBEEF 1e-5 123456789012345678901234567890",
    "naïve café Ünïcödé ﬁ ß İ ı",
    "日本語のテキスト 中文字符 한국어 ภาษาไทย",
    "Привет, мир! שלום עולם مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇺🇸 e\u0301 \u200b\ufeff\u00a0\u2028 𝔘𝔫𝔦",
    "https://example.org/a?b=c&d=%20#e <tag attr='v'/> {\"k\": [1, null]}",
    "\u0000\u0001\u001b[0m\u007f",
    "a" * 300,
    " " * 37 + "x" + "\n" * 9 + "\t" * 5,
)
_ALPHABETS = (
    "abc XYZ09.,;:!?'\"()[]{}<>/\\|_-+=*&^%$#@~`",
    " \t\n\r\u00a0\u3000",
    "éüñçøåßœ",
    "абвгдежз",
    "漢字かなカナ",
    "אבגד",
    "😀🎉👍🏽\u200d♥",
    "0123456789",
)


MOST = 60
"""Added tokens that texts are made of, of a tokenizer with more."""


class Encoder(Protocol):
    """The part of a runtime that this check uses."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> bytes: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...


def fuzz(specials: Sequence[str] = (), count: int = 300, seed: int = 0) -> list[str]:
    """Texts: the known troublemakers, every single byte as a character, code, random mixes of scripts and white space,
    arbitrary bytes read as UTF-8, and special tokens inside text."""
    rng = random.Random(seed)
    out = [*_FIXED, *(chr(i) for i in range(1, 256))]
    code = corpus()
    for _ in range(count):
        match rng.randrange(4):
            case 0:
                at = rng.randrange(max(1, len(code) - 200))
                out.append(code[at : at + rng.randrange(1, 200)])
            case 1:
                out.append("".join(rng.choice(rng.choice(_ALPHABETS)) for _ in range(rng.randrange(1, 60))))
            case 2:
                out.append(bytes(rng.randrange(1, 256) for _ in range(rng.randrange(1, 40))).decode("utf-8", "replace"))
            case _:
                points = (rng.choice((rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000))) for _ in range(12))
                out.append("".join(map(chr, points)))
    for s in specials:
        out += [s, f"before {s}after", f"{s}{s}\n {s} x"]
    return out


def expected_ids(library: Any, tokenizer: Tokenizer, text: str) -> list[int]:
    """What the `tokenizers` library makes of a text, with what the tokenizer's policy puts around it."""
    before, after = ([library.token_to_id(t) for t in side] for side in surrounding(tokenizer))
    return [*before, *library.encode(text, add_special_tokens=False).ids, *after]


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Texts:
    """Texts and the ids that are right for them."""

    library: Any
    tokenizer: Tokenizer
    texts: tuple[str, ...]
    chats: tuple[str, ...]
    missing: str | None = None
    """Why there are no more conversations, where the template breaks."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, count: int, seed: int = 0) -> Texts:
        """Fuzzed texts, added tokens (a few of many) among them, and conversations."""
        added = [t["content"] for t in tokenizer.json.get("added_tokens") or []]
        some = added if len(added) <= MOST else [*added[: MOST // 2], *added[-MOST // 2 :]]
        named = [t for t in (tokenizer.bos, tokenizer.eos, *tokenizer.extra_eos) if t is not None]
        texts = [
            *fuzz(list(dict.fromkeys([*some, *named])), count, seed),
            *(f"x{a}{rest}x" for a, rest, _ in limits.overlaps(tokenizer)),
        ]
        return cls(open_tokenizer(tokenizer), tokenizer, tuple(texts), *limits.conversations(tokenizer))

    def want(self, text: str) -> list[int]:
        return expected_ids(self.library, self.tokenizer, text)

    def plain(self, text: str) -> list[int]:
        return list(self.library.encode(text, add_special_tokens=False).ids)

    def probe(self) -> None:
        """What the library makes of every text. Raises `UserError` where it breaks."""
        for text in (*self.texts, *self.chats):
            self.plain(text)


@dataclass(frozen=True)
class Compared:
    """What a client made of texts."""

    wrong: list[tuple[str, list[int], list[int]]]
    texts: tuple[str, ...]
    tokens: int
    flags: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The first text that differs, the shortest of them."""
        text, want, got = min(self.wrong, key=lambda w: len(w[0]))
        at = _first_difference(want, got)
        change = f"{want[at : at + 4]} became {got[at : at + 4]}"
        return f"{len(self.wrong)} of {len(self.texts)} texts differ, first {text[:40]!r} at token {at}: {change}"


def compare(texts: Texts, got: Callable[[str], list[int]], allowed: frozenset[str], bare: bool = False) -> Compared:
    """A client's ids on every text within its limits; `bare`: it leaves what goes around a text to its user."""
    found = limits.find(texts.tokenizer, texts.plain if bare else texts.want, texts.plain, got, allowed)
    want = texts.plain if bare or any(limit.alone for limit in found) else texts.want

    def within(text: str, chat: bool) -> str:
        for limit in found:
            text = limit.within(text) if limit.chat or not chat else text
        return text

    asked = [*(within(t, False) for t in texts.texts), *(within(t, True) for t in texts.chats)]
    pairs = [(t, want(t), list(got(t))) for t in asked]
    return Compared(
        [p for p in pairs if p[1] != p[2]], tuple(asked), sum(len(p[1]) for p in pairs),
        tuple(limit.flag for limit in found),
    )  # fmt: skip


def check_tokenizer(runtime: Encoder, tokenizer: Tokenizer | None, count: int = 300, seed: int = 0) -> Check:
    """Ids equal on every fuzzed text and on conversations, and text back from ids wherever the library itself gets it
    back. A runtime may name `limits` (see `convert.verify.limits`): texts are compared within them, and the check is
    flagged, since other texts get other ids."""
    if tokenizer is None:
        return Check("tokenizer", Status.NOT_RUN, reason="the source has no tokenizer")
    texts = Texts.of(tokenizer, count, seed)
    found = compare(texts, runtime.encode, getattr(runtime, "limits", frozenset()))
    flags = tuple(f"the runtime's tokenizer: {flag}" for flag in found.flags)
    if texts.missing is not None:
        flags += (f"{'further ' if texts.chats else ''}conversations were not compared: {texts.missing}",)
    library = texts.library
    added = tokenizer.json.get("added_tokens") or []
    specials = [t["content"] for t in added if t.get("special") or t["id"] in runtime.eos_ids]  # no part of a text
    # a runtime decodes token by token, so that text can stream: some leave the prefix that the library strips
    first = library.encode("x", add_special_tokens=False)
    marked = bool(first.tokens) and first.tokens[0].startswith("\u2581")
    prefix = b" " if marked and runtime.decode(first.ids) == b" x" else b""
    lossy, trips = [], 0
    for text in found.texts:
        plain = texts.plain(text)
        if any(s in text for s in specials) or library.decode(plain) != text:
            continue  # the library does not restore it either (normalisers, prefix spaces)
        trips += 1
        if runtime.decode(plain) != (prefix if plain else b"") + text.encode():
            lossy.append(text)
    details = {
        "texts": len(found.texts),
        "tokens": found.tokens,
        "round_trips": trips,
        "different": len(found.wrong),
        "lossy": len(lossy),
    }
    bad = len(found.wrong) + len(lossy)
    endless = sorted(set(end_ids(tokenizer)) - runtime.eos_ids)
    if endless:
        reason = f"generation does not end at {endless}, as the source's tokenizer says it must"
        return Check("tokenizer", Status.FAIL, len(endless), 0, reason, flags, details)
    if bad <= TOKENIZER_DIFFERENCES:
        reason = f"{len(found.texts)} texts, {found.tokens} tokens: ids equal, {trips} round trips exact"
        return Check("tokenizer", Status.PASS, 0, TOKENIZER_DIFFERENCES, reason, flags, details)
    if found.wrong:
        reason = found.reason
    else:
        reason = f"{len(lossy)} of {trips} texts do not come back from their ids, first {lossy[0][:40]!r}"
    return Check("tokenizer", Status.FAIL, bad, TOKENIZER_DIFFERENCES, reason, flags, details)
