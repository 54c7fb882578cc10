"""What a tokenizer.json says around its vocabulary: its steps, and the tokens that it puts around a text."""

from __future__ import annotations

from typing import Any

from backends.base import Tokenizer
from spec.errors import UserError

Around = tuple[list[str], list[str]]
"""Tokens before and after a text."""

TEMPLATES = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
"""Post-processors that put tokens around a text."""


def steps(step: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer (`normalizers`), pre-tokenizer (`pretokenizers`), post-processor (`processors`) or
    decoder (`decoders`), sequences taken apart."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        return [s for x in step.get(inner, []) for s in steps(x, inner)]
    return [step]


def template(processor: Any) -> Around | None:
    """Tokens that a post-processor puts around a single text; none where it has no such step.

    Raises `UserError` for a template that does not hold the text once.
    """
    for step in steps(processor, "processors"):
        if step.get("type") == "TemplateProcessing":
            sides: tuple[list[str], list[str]] = ([], [])
            texts = 0
            for piece in step.get("single", []):
                if "Sequence" in piece:
                    texts += 1
                else:
                    sides[min(texts, 1)].append(piece["SpecialToken"]["id"])
            if texts != 1:
                raise UserError(f"tokenizer.post_processor: its template holds the text {texts} times, not once")
            return sides
        if step.get("type") in TEMPLATES:
            return [step["cls"][0]], [step["sep"][0]]
    return None


def around(processor: Any, bos: str | None, eos: str | None, add_bos: bool | None, add_eos: bool | None) -> Around:
    """Tokens that are put around a text: the post-processor's, with BOS and EOS as the flags say (None: as it does)."""
    before, after = template(processor) or ([], [])
    if bos is not None and add_bos is not None and add_bos != (bos in before):
        before = [bos, *before] if add_bos else [t for t in before if t != bos]
    if eos is not None and add_eos is not None and add_eos != (eos in after):
        after = [*after, eos] if add_eos else [t for t in after if t != eos]
    return before, after


def surrounding(t: Tokenizer) -> Around:
    """`around` by the tokenizer's own policy."""
    return around(t.json.get("post_processor"), t.bos, t.eos, t.add_bos, t.add_eos)


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Expressions that split text, as GPT-2, Qwen, GPT-4 (Llama 3, Phi-4, OLMo 2) and GPT-4o have them."""


def misread(t: Tokenizer | None) -> frozenset[str]:
    """Model types that a folder with this tokenizer must not have: for these, transformers takes vocabulary and merge
    rules from tokenizer.json and the rest from a class of its own, whatever the configuration says."""
    return frozenset() if is_qwen2(t) else frozenset({"qwen2"})


def is_qwen2(t: Tokenizer | None) -> bool:
    """Whether transformers' Qwen2Tokenizer does what this tokenizer does."""
    if t is None:
        return True
    model = t.json["model"]
    switches = ("ignore_merges", "byte_fallback", "fuse_unk", "unk_token", "dropout", "end_of_word_suffix",
                "continuing_subword_prefix")  # fmt: skip
    pre = steps(t.json.get("pre_tokenizer"), "pretokenizers")
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(s) for s in switches)
        and [s["type"] for s in steps(t.json.get("normalizer"), "normalizers")] == ["NFC"]
        and [s["type"] for s in pre] == ["Split", "ByteLevel"]
        and (pre[0]["pattern"], pre[0]["behavior"], pre[0]["invert"]) == ({"Regex": QWEN2}, "Isolated", False)
        and not pre[1].get("add_prefix_space")
        and not pre[1].get("use_regex", True)
        and any(a["content"] == "<|endoftext|>" for a in t.json.get("added_tokens") or [])  # it adds that one itself
    )
