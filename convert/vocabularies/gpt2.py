"""vocab.json and merges.txt: a BPE on bytes, GPT-2's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.text import ALPHABET
from backends.tokens import QWEN2
from convert.sources.files import present, read_json, read_text
from convert.vocabularies.common import bpe, byte_level, document
from spec.errors import UserError

FORMS: Mapping[str, tuple[str | None, str | None]] = {
    **dict.fromkeys(("", "GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "OPTTokenizer", "BartTokenizer",
                     "RobertaTokenizer"), (None, None)),
    "Qwen2Tokenizer": (QWEN2, "NFC"),
}  # fmt: skip
"""By class: the expression that splits text (none: GPT-2's), and the Unicode form. The files themselves name neither;
without a class they are GPT-2's."""


def read(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of vocab.json and the merges.txt beside it. Raises `UserError`."""
    vocab, rules = read_json(file), file.with_name("merges.txt")
    if not present(rules):
        raise UserError(f"{file}: without merges.txt or tokenizer.json it is a vocabulary of words, not of a BPE")
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if name not in FORMS:
        known = ", ".join(n for n in FORMS if n)
        raise UserError(f"{file}: how a {name} splits text stands nowhere in it (known here: {known}); "
                        "write a tokenizer.json with AutoTokenizer....save_pretrained(...)")  # fmt: skip
    missing = [c for c in ALPHABET if c not in vocab]
    if missing:
        raise UserError(f"{file}: no vocabulary of bytes: {missing[0]!r}, which stands for byte "
                        f"{ALPHABET[missing[0]]}, is no token")  # fmt: skip
    if config.get("add_prefix_space"):
        raise UserError(f"{file}: add_prefix_space in tokenizer_config.json puts a space before texts; "
                        "llama.cpp and onnxruntime-genai have no such form (write a tokenizer.json)")  # fmt: skip
    merges = []
    for n, line in enumerate(read_text(rules).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or (n == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{rules}: line {n}: {line[:40]!r} is no pair of tokens")
        merges.append(pair)
    expression, form = FORMS[name]
    normalizer = {"normalizer": {"type": form}} if form else {}
    return document(bpe(vocab, merges), **byte_level(expression), **normalizer)
