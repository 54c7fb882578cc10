"""The fifth check: the artifact's own tokenizer against the `tokenizers` library, on text made to break it."""

from __future__ import annotations

import importlib.util
import random
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from backends.base import Tokenizer
from backends.folder import end_ids
from convert.gates import TOKENIZER_DIFFERENCES
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
    """What the `tokenizers` library makes of a text, with the BOS and EOS policy of the tokenizer's configuration."""
    ids: list[int] = list(library.encode(text, add_special_tokens=False).ids)
    if tokenizer.add_bos and tokenizer.bos is not None:
        ids.insert(0, library.token_to_id(tokenizer.bos))
    if tokenizer.add_eos and tokenizer.eos is not None:
        ids.append(library.token_to_id(tokenizer.eos))
    return ids


def normal_form(tokenizer: Tokenizer) -> Literal["NFC", "NFD", "NFKC", "NFKD"] | None:
    """The Unicode normal form that the tokenizer's normalizer brings text to, if any."""
    steps = [tokenizer.json.get("normalizer") or {}]
    while steps:
        step = steps.pop(0)
        steps += step.get("normalizers", [])
        if step.get("type") in ("NFC", "NFD", "NFKC", "NFKD"):
            return step["type"]
    return None


def check_stock(folder: Path, tokenizer: Tokenizer, count: int = 60) -> Check | None:
    """The ids that transformers' AutoTokenizer (which mlx-lm and vLLM use too) makes of a folder, since it builds some
    architectures' tokenizers by rules of its own. None where they are equal, or transformers is not here."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    library = open_tokenizer(tokenizer)
    texts = [t for t in fuzz((), count) if t]
    pairs = [(t, expected_ids(library, tokenizer, t), list(stock(t).input_ids)) for t in texts]
    wrong = [p for p in pairs if p[1] != p[2]]
    if not wrong:
        return None
    text, want, got = wrong[0]
    at = _first_difference(want, got)
    kind = type(stock).__name__
    reason = (
        f"transformers' AutoTokenizer ({kind}) makes other ids of {len(wrong)} of {len(texts)} texts, "
        f"first {text[:40]!r}: {want[at : at + 4]} became {got[at : at + 4]}"
    )
    if kind == "Qwen2Tokenizer":
        reason += " (it splits text as Qwen does, whatever tokenizer.json says; with a bias on o too it is a llama)"
    return Check("tokenizer", Status.FAIL, len(wrong), TOKENIZER_DIFFERENCES, reason)


def check_client(path: Path, tokenizer: Tokenizer | None, found: Check) -> Check:
    """`found`, or what llama.cpp, whose file the source is, makes otherwise of a text."""
    if importlib.util.find_spec("llama_cpp") is None:
        return replace(found, flags=(*found.flags, "not compared with llama.cpp, which is not installed"))
    from backends.gguf.runtime import Words

    with Words(path) as words:
        check = check_tokenizer(words, tokenizer)
    if check.status is Status.PASS:
        return replace(found, reason=f"{found.reason}; llama.cpp's ids of the source too")
    return replace(check, reason=f"the source in llama.cpp: {check.reason}")


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_tokenizer(runtime: Encoder, tokenizer: Tokenizer | None, count: int = 300, seed: int = 0) -> Check:
    """Ids equal on every fuzzed text, and text back from ids wherever the library itself gets it back.

    Where the tokenizer begins by bringing text to a Unicode normal form and the runtime does not, texts are compared in
    that form; the check is flagged, since other texts get other ids.
    """
    if tokenizer is None:
        return Check("tokenizer", Status.NOT_RUN, reason="the source has no tokenizer")
    library = open_tokenizer(tokenizer)
    specials = [t["content"] for t in tokenizer.json.get("added_tokens", []) if t.get("special")]
    texts = fuzz(specials, count, seed)
    flags: tuple[str, ...] = ()
    form = normal_form(tokenizer)
    if form and runtime.encode("e\u0301") != expected_ids(library, tokenizer, "e\u0301"):
        texts = [unicodedata.normalize(form, text) for text in texts]
        flags = (f"the runtime does not bring text to {form}, as the tokenizer does: pass text that is in it",)
    # a runtime decodes token by token, so that text can stream: some leave the prefix that the library strips
    first = library.encode("x", add_special_tokens=False)
    prefix = b" " if first.tokens[0].startswith("\u2581") and runtime.decode(first.ids) == b" x" else b""
    wrong, lossy, tokens, trips = [], [], 0, 0
    for text in texts:
        want, got = expected_ids(library, tokenizer, text), list(runtime.encode(text))
        tokens += len(want)
        if want != got:
            wrong.append((text, _first_difference(want, got), want, got))
        plain = library.encode(text, add_special_tokens=False).ids
        if any(s in text for s in specials) or library.decode(plain) != text:
            continue  # the library does not restore it either (normalisers, prefix spaces)
        trips += 1
        if runtime.decode(plain) != (prefix if plain else b"") + text.encode():
            lossy.append(text)
    details = {
        "texts": len(texts),
        "tokens": tokens,
        "round_trips": trips,
        "different": len(wrong),
        "lossy": len(lossy),
    }
    bad = len(wrong) + len(lossy)
    endless = sorted(set(end_ids(tokenizer)) - runtime.eos_ids)
    if endless:
        reason = f"generation does not end at {endless}, as the source's tokenizer says it must"
        return Check("tokenizer", Status.FAIL, len(endless), 0, reason, flags, details)
    if bad <= TOKENIZER_DIFFERENCES:
        reason = f"{len(texts)} texts, {tokens} tokens: ids equal, {trips} round trips exact"
        return Check("tokenizer", Status.PASS, 0, TOKENIZER_DIFFERENCES, reason, flags, details)
    if wrong:
        text, at, want, got = wrong[0]
        change = f"{want[at : at + 4]} became {got[at : at + 4]}"
        reason = f"{len(wrong)} of {len(texts)} texts differ, first {text[:40]!r} at token {at}: {change}"
    else:
        reason = f"{len(lossy)} of {trips} texts do not come back from their ids, first {lossy[0][:40]!r}"
    return Check("tokenizer", Status.FAIL, bad, TOKENIZER_DIFFERENCES, reason, flags, details)
