"""tiktoken's files (a token in base64 and its rank on each line) and Mistral's tekken.json: BPE on bytes that merges
the pair whose result has the lowest rank."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.text import ALPHABET
from backends.tokens import QWEN2
from convert.sources.files import read_json
from convert.vocabularies.common import LONGEST, added, all_merges, bpe, byte_level, document
from spec.errors import UserError

CHARACTERS = {b: c for c, b in ALPHABET.items()}
PATTERNS: Mapping[str, tuple[str, str | None]] = {"QWenTokenizer": (QWEN2, "NFC")}
"""By class: the expression and the Unicode form, which the files do not hold."""


def looks_like(data: bytes) -> bool:
    """Whether these are lines of base64 and a number, not a SentencePiece model."""
    parts = data[:4096].split(b"\n", 1)[0].split()
    return len(parts) == 2 and parts[1].isdigit() and _decoded(parts[0]) is not None


def _decoded(text: bytes) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True) or None
    except (binascii.Error, ValueError):
        return None


def read(data: bytes, file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of tiktoken's lines. Raises `UserError`, also where the expression is told nowhere."""
    ranks: dict[bytes, int] = {}
    for n, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split()
        token = _decoded(parts[0]) if len(parts) == 2 and parts[1].isdigit() and len(parts[1]) < 10 else None
        if token is None:
            raise UserError(f"{file}: line {n}: {line[:40]!r} is no token in base64 and its rank")
        if token in ranks:
            raise UserError(f"{file}: line {n}: {token!r} has a rank already")
        ranks[token] = int(parts[1])
    pattern, form = config.get("pattern") or config.get("pat_str"), None
    if pattern is None:
        pattern, form = PATTERNS.get(str(config.get("tokenizer_class") or ""), (None, None))
    if not isinstance(pattern, str):
        raise UserError(f"{file}: tiktoken's files do not hold the expression that splits text, and "
                        'tokenizer_config.json has no "pattern" (write it there, or a tokenizer.json)')  # fmt: skip
    return _document(ranks, 0, pattern, form, str(file))


def read_tekken(file: Path) -> tuple[dict[str, Any], dict[str, str], bool]:
    """A tokenizer.json, special tokens and whether BOS is added, of tekken.json. Special tokens come first, a fixed
    number of them. Raises `UserError`."""
    data = read_json(file)
    try:
        config, vocab = data["config"], data["vocab"]
        offset, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        pattern = str(config["pattern"])
        ranks = {base64.b64decode(v["token_bytes"], validate=True): int(v["rank"]) for v in vocab}
        ranks = {t: r for t, r in ranks.items() if r < size - offset}
        named = data.get("special_tokens") or [
            {"rank": i, "token_str": t} for i, t in enumerate(("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
        ]
        special = {int(t["rank"]): str(t["token_str"]) for t in named}
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{file}: no tekken vocabulary ({type(e).__name__}: {e})") from None
    if not 0 <= offset <= 100_000 or max(special, default=0) >= offset:
        raise UserError(f"{file}: {offset} special tokens, and one has the id {max(special, default=0)}")
    special |= {i: f"<SPECIAL_{i}>" for i in range(offset) if i not in special}
    made = _document(ranks, offset, pattern, None, str(file))
    made["model"]["vocab"] |= {t: i for i, t in special.items()}
    made["added_tokens"] = [added(t, i) for i, t in sorted(special.items())]
    roles = {r: t for r, t in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))
             if t in special.values()}  # fmt: skip
    return made, roles, "bos" in roles


def _document(ranks: Mapping[bytes, int], offset: int, pattern: str, form: str | None, where: str) -> dict[str, Any]:
    missing = next((b for b in range(256) if bytes([b]) not in ranks), None)
    if missing is not None:
        raise UserError(f"{where}: byte {missing} is no token: no BPE on bytes")
    if (longest := max(map(len, ranks))) > LONGEST:
        raise UserError(f"{where}: a token of {longest:,} bytes ({LONGEST:,} at most)")
    if len(set(ranks.values())) < len(ranks):
        raise UserError(f"{where}: two tokens have one rank")
    text = {t: "".join(CHARACTERS[b] for b in t) for t in ranks}
    vocab = {text[t]: r + offset for t, r in ranks.items()}
    merges = [[text[a], text[b]] for a, b in all_merges(ranks, lambda t: ranks[t], ranks)]
    normalizer = {"normalizer": {"type": form}} if form else {}
    return document(bpe(vocab, merges, ignore_merges=True), **byte_level(pattern), **normalizer)
