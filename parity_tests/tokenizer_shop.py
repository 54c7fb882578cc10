"""Tokenizers set up as the families' own are (normalizer, pre-tokenizer, model switches, added tokens, template), small
ones trained here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Fast

from backends.base import Tokenizer
from backends.gguf import pretokenizers
from convert.vocabularies.sentencepiece import parse

CORPUS = [
    *Path(pretokenizers.__file__).read_text(encoding="utf-8").split("\n"),
    *Path(__file__).read_text(encoding="utf-8").split("\n"),
    *(
        "Ünïcödé naïve café 日本語のテキスト Привет мир 12345 😀 DON'T won't I'LL they've  \t\n\n  x = y ** 2\r\n",
        "The quick brown fox jumps over the lazy dog; 3.14159 and 2,718,281 are numbers, aren't they?",
        "हिन्दी में लिखा हुआ पाठ और ภาษาไทย 한국어 문장 שלום עולם مرحبا بالعالم",
        "for (int i = 0; i < n; ++i) {\n        total += values[i];\n    }\n\n\n\treturn total;",
    )
    * 6,
]
SPACE = "\u2581"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace("{1,3}", "")
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

Maker = Callable[[], Tokenizer]


def token(content: str, special: bool = True, **flags: bool) -> AddedToken:
    return AddedToken(content, special=special, normalized=flags.pop("normalized", not special), **flags)


def split(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(expression), "isolated")


def byte_level(
    steps: list[Any], use_regex: bool = False, *, normalizer: Any = None, special: Iterable[str] = ("<|endoftext|>",),
    added: Iterable[AddedToken] = (), last: list[Any] | None = None, size: int = 700, **model: Any,
) -> Fast:  # fmt: skip
    """A byte-level BPE: `steps`, ByteLevel, `last`."""
    t = Fast(models.BPE(**model))
    ends = [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex), *(last or [])]
    t.pre_tokenizer = ends[0] if len(ends) == 1 else pre_tokenizers.Sequence(ends)
    if normalizer is not None:
        t.normalizer = normalizer
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    for a in added:
        (t.add_special_tokens if a.special else t.add_tokens)([a])
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    return t


def template(t: Fast, single: str) -> Any:
    names = [p for p in single.split() if p != "$A"]
    return processors.TemplateProcessing(
        single=single, pair=single + " " + single.replace("$A", "$B"),
        special_tokens=[(n, t.token_to_id(n)) for n in dict.fromkeys(names)],
    )  # fmt: skip


def packed(t: Fast, **roles: Any) -> Tokenizer:
    return Tokenizer(json=json.loads(t.to_str()), **roles)


def gpt2() -> Tokenizer:
    t = byte_level([], True)
    return packed(t, bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>")


def neox() -> Tokenizer:
    spaces = [token(" " * n, special=False) for n in range(2, 25)]
    t = byte_level([], True, normalizer=normalizers.NFC(), special=["<|endoftext|>", "<|padding|>"], added=spaces)
    return packed(t, bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>")


def phi2() -> Tokenizer:
    """CodeGen's: GPT-2's, with runs of spaces and tabs added."""
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    t = byte_level([], True, added=[token(r, special=False) for r in runs])
    return packed(t, bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>")


def llama3() -> Tokenizer:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>",
               "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]  # fmt: skip
    t = byte_level([split(CL100K)], ignore_merges=True, special=[], added=[token(s) for s in special])
    t.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), template(t, "<|begin_of_text|> $A")]
    )
    return packed(t, bos="<|begin_of_text|>", eos="<|end_of_text|>", extra_eos=("<|eom_id|>", "<|eot_id|>"),
                  add_bos=True)  # fmt: skip


def qwen2() -> Tokenizer:
    added = [token(s) for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>")]
    added += [token(s, special=False, normalized=False) for s in ("<tool_call>", "</tool_call>", "<think>", "</think>")]
    t = byte_level([split(QWEN2)], normalizer=normalizers.NFC(), special=[], added=added)
    return packed(t, eos="<|im_end|>", pad="<|endoftext|>", extra_eos=("<|endoftext|>",))


def starcoder2() -> Tokenizer:
    special = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<repo_name>"]
    t = byte_level([pre_tokenizers.Digits(individual_digits=True)], True, special=special)
    return packed(t, bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>")


def cohere() -> Tokenizer:
    special = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>"]
    added = [token(s) for s in ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>")]
    t = byte_level([pre_tokenizers.Digits(individual_digits=True)], True, normalizer=normalizers.NFC(),
                   special=special, added=added)  # fmt: skip
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template(t, "<BOS_TOKEN> $A")])
    return packed(t, bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", unk="<UNK>", pad="<PAD>", add_bos=True)


def falcon() -> Tokenizer:
    digits = [pre_tokenizers.Digits(individual_digits=False), split("[0-9][0-9][0-9]")]
    special = [">>TITLE<<", ">>ABSTRACT<<", "<|endoftext|>"]
    t = byte_level([pre_tokenizers.Punctuation("contiguous")], True, special=special, last=digits)
    return packed(t, bos="<|endoftext|>", eos="<|endoftext|>")


def bloom() -> Tokenizer:
    t = byte_level([split(BLOOM)], special=["<unk>", "<s>", "</s>", "<pad>"])
    return packed(t, bos="<s>", eos="</s>", unk="<unk>", pad="<pad>")


def olmo2() -> Tokenizer:
    added = [token(s, special=False, normalized=False) for s in ("|||IP_ADDRESS|||", "|||EMAIL_ADDRESS|||")]
    added += [token(s) for s in ("<|endoftext|>", "<|fim_prefix|>", "<|pad|>")]
    t = byte_level([split(CL100K)], special=[], added=added)
    return packed(t, bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>", pad="<|pad|>")


def phi4() -> Tokenizer:
    added = [token(s, lstrip=True, rstrip=True) for s in ("<|im_start|>", "<|im_sep|>", "<|im_end|>")]
    t = byte_level([split(CL100K)], added=added)
    return packed(t, bos="<|endoftext|>", eos="<|im_end|>", pad="<|endoftext|>")


def glm4() -> Tokenizer:
    added = [token(s) for s in ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>")]
    t = byte_level([split(CL100K)], ignore_merges=True, special=[], added=added)
    t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template(t, "[gMASK] <sop> $A")])
    return packed(t, eos="<|endoftext|>", pad="<|endoftext|>", extra_eos=("<|user|>", "<|observation|>"))


def gpt_oss() -> Tokenizer:
    added = [token(s) for s in ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>", "<|channel|>",
                                "<|start|>", "<|end|>", "<|message|>")]  # fmt: skip
    t = byte_level([split(O200K)], special=[], added=added, ignore_merges=True)
    return packed(t, bos="<|startoftext|>", eos="<|return|>", pad="<|endoftext|>")


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


BYTES = [f"<0x{b:02X}>" for b in range(256)]


def pieces(
    normalizer: Any, pre: Any, strip: bool, special: list[str], added: Iterable[AddedToken] = (), decoder: Any = None,
    size: int = 900,
) -> Fast:  # fmt: skip
    """A BPE on characters with byte fallback, whose merges are all the ways to make a token, as SentencePiece's."""
    t = Fast(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    t.normalizer = normalizers.Replace(" ", SPACE)  # words begin with the mark: no token spans two
    t.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*special, *BYTES], show_progress=False, limit_alphabet=100
    )
    t.train_from_iterator(CORPUS, trainer)
    data = json.loads(t.to_str())
    vocab, seen, rules = data["model"]["vocab"], set(), []
    for left, right in data["model"]["merges"]:
        made = left + right
        if made not in seen:
            seen.add(made)
            rules += [[made[:i], made[i:]] for i in range(1, len(made)) if made[:i] in vocab and made[i:] in vocab]
    data["model"]["merges"] = rules
    data["added_tokens"] = [a for a in data["added_tokens"] if a["content"] in special]
    t = Fast.from_str(json.dumps(data | {"pre_tokenizer": None, "normalizer": None}))
    if normalizer is not None:
        t.normalizer = normalizer
    if pre is not None:
        t.pre_tokenizer = pre
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    t.decoder = decoder or decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if strip else back)
    for a in added:
        (t.add_special_tokens if a.special else t.add_tokens)([a])
    return t


LLAMA2 = ["<unk>", "<s>", "</s>"]


def llama2() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    t = pieces(normalizer, None, True, LLAMA2)
    t.post_processor = template(t, "<s> $A")
    return packed(t, bos="<s>", eos="</s>", unk="<unk>", add_bos=True)


def phi3() -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    added = [token("</s>", special=False, normalized=False, rstrip=True)]
    added += [token(s, rstrip=True) for s in ("<|assistant|>", "<|end|>", "<|user|>")] + [token("<|endoftext|>")]
    t = pieces(normalizer, None, True, LLAMA2, added)
    return packed(t, bos="<s>", eos="<|endoftext|>", unk="<unk>", pad="<|endoftext|>")


def mistral3() -> Tokenizer:
    """Metaspace, before the first word alone."""
    metaspace = pre_tokenizers.Metaspace(SPACE, "first", False)
    t = pieces(None, metaspace, True, [*LLAMA2, "[INST]", "[/INST]"])
    t.post_processor = template(t, "<s> $A")
    return packed(t, bos="<s>", eos="</s>", unk="<unk>", add_bos=True)


def gemma() -> Tokenizer:
    normalizer = normalizers.Replace(" ", SPACE)
    runs = ("\n\n", "\n\n\n", SPACE * 2, SPACE * 3, "<table>", "<h1>")
    added = [token(s, special=False, normalized=False) for s in runs]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<unused0>", "<start_of_turn>", "<end_of_turn>"]
    t = pieces(normalizer, pre_tokenizers.Split(" ", "merged_with_previous"), False, special, added)
    t.post_processor = template(t, "<bos> $A")
    return packed(t, bos="<bos>", eos="<eos>", unk="<unk>", pad="<pad>", extra_eos=("<end_of_turn>",), add_bos=True)


@cache
def trained_model(rule: str = "identity", kind: str = "unigram", **options: Any) -> bytes:
    """A SentencePiece model of the text."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in CORPUS if line.strip()), model_writer=model, model_type=kind,
        normalization_rule_name=rule, minloglevel=2, **{"vocab_size": 600, "character_coverage": 0.98, **options},
    )  # fmt: skip
    return model.getvalue()


def unigram(rule: str, steps: list[Any], pre: Any, decoder: Any) -> Fast:
    """A unigram model with a table of characters (none for `identity`) before the other steps."""
    found = parse(trained_model(rule, unk_id=2, eos_id=1, bos_id=-1, pad_id=0))
    t = Fast(models.Unigram([(p, s) for p, s, _ in found.pieces], 2, False))
    first = [normalizers.Precompiled(found.charsmap)] if found.charsmap else []
    t.normalizer = normalizers.Sequence([*first, *steps])
    t.decoder = decoder
    if pre is not None:
        t.pre_tokenizer = pre
    t.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return t


def t5() -> Tokenizer:
    """Words by white space, each with its mark."""
    pre = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    t = unigram("nmt_nfkc", [], pre, decoders.Metaspace())
    t.post_processor = template(t, "$A </s>")
    return packed(t, eos="</s>", unk="<unk>", pad="<pad>", add_eos=True)


def mt5() -> Tokenizer:
    """As converted since: trailing spaces go, many become one."""
    steps = [normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), SPACE)]
    t = unigram("nmt_nfkc", steps, pre_tokenizers.Metaspace(), decoders.Metaspace())
    return packed(t, eos="</s>", unk="<unk>", pad="<pad>")


def plain_unigram() -> Tokenizer:
    """Spaces kept, none before the text, no table of characters."""
    back = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    return packed(unigram("identity", [normalizers.Replace(" ", SPACE)], None, back), eos="</s>", unk="<unk>")


BYTE_LEVEL: dict[str, Maker] = {
    "gpt2": gpt2, "neox": neox, "phi2": phi2, "llama3": llama3, "qwen2": qwen2, "starcoder2": starcoder2,
    "cohere": cohere, "falcon": falcon, "bloom": bloom, "olmo2": olmo2, "phi4": phi4, "glm4": glm4, "gpt_oss": gpt_oss,
}  # fmt: skip
PIECES: dict[str, Maker] = {"llama2": llama2, "phi3": phi3, "mistral3": mistral3, "gemma": gemma}
UNIGRAM: dict[str, Maker] = {"t5": t5, "mt5": mt5, "plain_unigram": plain_unigram}
FAMILIES: dict[str, Maker] = BYTE_LEVEL | PIECES | UNIGRAM


@cache
def _made(name: str) -> Tokenizer:
    return FAMILIES[name]()


def family(name: str) -> Tokenizer:
    """A family's tokenizer; trained once."""
    from copy import deepcopy

    return deepcopy(_made(name))
