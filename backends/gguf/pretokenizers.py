r"""llama.cpp's pre-tokenizers as data, and the search for the one that is a tokenizer's own.

llama.cpp names about 95 pre-tokenizers; each is a list of regular expressions applied one after the other, as in a
Hugging Face `Sequence`, and a switch: whether a word that is a token as a whole skips the merges. Names that mean
the same are left out. A tokenizer is matched by the expressions in its own tokenizer.json, so one that was trained
yesterday with a known expression is found too.

Spellings that are compared as equal:
- `(?i:'s|'t|...)` and `(?:'[sS]|'[tT]|...)`, as llama.cpp itself has them (only U+017F, the long s, tells them apart);
- a literal carriage return or newline and its escape; `\p{N}{1}` and `\p{N}`;
- a set within Bloom's set and its members; Falcon's digits after GPT-2's expression, which has split them already;
- `\s+(?!\S)|\s+` and `\s+(?!\S)` at the end of the GPT-2 expression, where a lone space that nothing else takes is
  a piece of its own either way.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spec.errors import UserError

_ENGLISH = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
QWEN2 = _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_CAMEL_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}{_CAMEL_TAIL}"
)
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}{_CAMEL_TAIL}"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
"""What tokenizers' Punctuation takes: ASCII's and Unicode's."""
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_MARKS = "llama.cpp splits words at combining marks (as in Devanagari) with this pre-tokenizer"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's."""

    name: str
    expressions: tuple[str, ...]
    ignore_merges: bool = False
    caveat: str = ""
    """Texts in which llama.cpp's form of the expressions is another."""


KNOWN = (
    PreTokenizer("gpt-2", (GPT2,)),
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True),
    PreTokenizer("dbrx", (LLAMA3,)),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("starcoder", (r"\p{N}", GPT2)),
    PreTokenizer("gpt-4o", (GPT4O,), caveat=_MARKS),
    PreTokenizer("tekken", (TEKKEN,), ignore_merges=True, caveat=_MARKS),
    PreTokenizer("deepseek-v3", DEEPSEEK3),
    PreTokenizer("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    PreTokenizer("bloom", (BLOOM,)),
    PreTokenizer("viking", (BLOOM, r"\p{N}")),
    PreTokenizer("falcon", (PUNCTUATION, GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer(
        "qwen35",
        (_ENGLISH + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
    ),
    PreTokenizer(
        "bailingmoe",
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    PreTokenizer(
        "seed-coder",
        (_ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",),
    ),
    PreTokenizer("ufakzeka", (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL,)),
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", _ENGLISH + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+|" + _TAIL), True),
    PreTokenizer("laguna", (r"[^\n]+|[\n]+", QWEN2)),
)


def canonical(expression: str) -> str:
    """One spelling of an expression; see the module's list of what counts as equal."""
    out = expression.replace("\r", r"\r").replace("\n", r"\n").replace("\t", r"\t")
    out = out.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _ENGLISH).replace(r"\p{N}{1}|", r"\p{N}|")
    out = out.replace("|[.,!?…。，、।۔،])]", "|.,!?…。，、।۔،)]")
    return GPT2 if out == GPT2 + r"|\s+" else out


def expressions(pre: dict[str, Any] | None) -> list[str]:
    """The expressions of a tokenizer.json's byte-level `pre_tokenizer`, in order.

    Raises `UserError` for steps that llama.cpp's lists cannot express.
    """
    steps = _steps(pre)
    if not any(s["type"] == "ByteLevel" for s in steps):
        raise UserError("tokenizer.pre_tokenizer: not byte-level (no ByteLevel step), so its BPE has no llama.cpp form")
    out: list[str] = []
    for s in steps:
        kind = s["type"]
        if kind == "ByteLevel":
            if s.get("add_prefix_space"):
                raise UserError(
                    "tokenizer.pre_tokenizer: ByteLevel add_prefix_space=true has no llama.cpp form (set it to false)"
                )
            if s.get("use_regex", True):
                out.append(GPT2)
        elif kind == "Digits" and s.get("individual_digits"):
            out.append(r"\p{N}")
        elif kind == "Digits" and GPT2 in out:
            continue
        elif kind == "Digits":
            out.append(r"\p{N}+")
        elif kind == "Punctuation" and s.get("behavior") == "Contiguous":
            out.append(PUNCTUATION)
        elif kind == "Split" and s.get("behavior") == "Isolated" and not s.get("invert"):
            pattern = s["pattern"]
            out.append(canonical(pattern["Regex"]) if "Regex" in pattern else _escaped(pattern["String"]))
        elif kind == "Split" and s.get("behavior") == "Removed" and s.get("invert") and "Regex" in s["pattern"]:
            out.append(canonical(s["pattern"]["Regex"]))  # keeps the matches only, which cover everything here
        else:
            raise UserError(f"tokenizer.pre_tokenizer: {kind} {_options(s)} has no llama.cpp form")
    return out


def _options(step: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in step.items() if k != "type")


def _escaped(text: str) -> str:
    import re

    return re.escape(text)


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [s for p in pre["pretokenizers"] for s in _steps(p)]
    return [pre]


def find(found: list[str], ignore_merges: bool, neutral: Callable[[], bool] = lambda: False) -> PreTokenizer:
    """llama.cpp's pre-tokenizer with these expressions and this switch. `neutral` answers whether the switch changes
    nothing in this vocabulary.

    Raises `UserError` that shows the expressions and the closest ones there are.
    """
    known = [(p, tuple(canonical(e) for e in p.expressions)) for p in KNOWN]
    same = [p for p, mine in known if mine == tuple(found)]
    exact = [p for p in same if p.ignore_merges == ignore_merges]
    if exact or (same and neutral()):
        return (exact or same)[0]
    shown = " then ".join(found) or "(none)"
    if same:
        raise UserError(
            f"tokenizer.model.ignore_merges: {str(ignore_merges).lower()} with the pre-tokenizer of {same[0].name}, "
            f"which llama.cpp has only with {str(not ignore_merges).lower()}"
        )
    near = max(known, key=lambda k: difflib.SequenceMatcher(None, shown, " then ".join(k[1])).ratio())
    raise UserError(
        f"tokenizer.pre_tokenizer: {shown} is none of llama.cpp's pre-tokenizers "
        f"(closest: {near[0].name}, {' then '.join(near[1])})"
    )
