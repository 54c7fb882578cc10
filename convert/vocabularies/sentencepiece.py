"""SentencePiece's tokenizer.model (BPE or unigram) as a tokenizer.json with the same ids.

The file is a protocol buffer (sentencepiece_model.proto); the few fields that matter are read here, from bounded data.
"""

from __future__ import annotations

import base64
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.vocabularies.common import LONGEST, added, all_merges, bpe, document, sequence
from spec.errors import UserError

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LOW = -1e6
"""Score of pieces that no text makes. (An unknown character's is 10 below the lowest, and is only taken where no piece
covers it, so its size does not matter.)"""
ADD_BOS = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "MistralTokenizer"})
"""Classes that add BOS unless add_bos_token says otherwise."""


@dataclass(frozen=True)
class Model:
    """What of the file is used."""

    pieces: list[tuple[str, float, int]]
    kind: int
    byte_fallback: bool
    suffix: bool
    roles: dict[str, int]
    charsmap: bytes
    dummy_prefix: bool
    extra_spaces_removed: bool
    escaped: bool


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a message's fields. Raises `ValueError` for what is none."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError(f"ends or overflows at byte {at}")
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            value: Any = varint()
            value -= 1 << 64 if value >> 63 else 0
        else:
            size = {1: 8, 5: 4}.get(key & 7, -1)
            size = varint() if key & 7 == 2 else size
            if not 0 <= size <= len(data) - at:
                raise ValueError(f"a field of type {key & 7} does not fit at byte {at}")
            value = data[at : at + size]
            at += size
        yield key >> 3, value


def parse(data: bytes) -> Model:
    """Raises `ValueError` for what is no SentencePiece model."""
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in fields(data):
        if number == 1:
            piece = dict(fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece.get(1, b"").decode(), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer |= dict(fields(value))
        elif number == 3:
            normalizer |= dict(fields(value))
    if not pieces:
        raise ValueError("no pieces")
    ids = {"unk": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2), "pad": trainer.get(43, -1)}
    return Model(
        pieces, trainer.get(3, UNIGRAM), bool(trainer.get(35)), bool(trainer.get(24)),
        {r: i for r, i in ids.items() if 0 <= i < len(pieces)}, normalizer.get(2, b""),
        bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)), bool(normalizer.get(5, 1)),
    )  # fmt: skip


def read(data: bytes, file: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], bool]:
    """A tokenizer.json, the special tokens by role, and whether BOS is added. Raises `UserError`, also where the ids
    are not the library's on fuzzed text."""
    try:
        m = parse(data)
    except (ValueError, TypeError, AttributeError, KeyError, struct.error) as e:
        raise UserError(f"{file}: neither a SentencePiece model nor tiktoken's lines ({e})") from None
    refused = _refused(m)
    if refused:
        raise UserError(f"{file}: {refused}")
    made = _document(m)
    _verify(made, data, file)
    roles = {r: m.pieces[i][0] for r, i in m.roles.items()}
    bos = config.get("add_bos_token")
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    return made, roles, bool(bos) if bos is not None else name in ADD_BOS


def _refused(m: Model) -> str:
    names = [p for p, _, _ in m.pieces]
    if m.kind not in (UNIGRAM, BPE):
        kind = {3: "words", 4: "characters"}.get(m.kind, m.kind)
        return f"a SentencePiece model of {kind} (BPE and unigram are read)"
    if len(set(names)) < len(names):
        return f"piece {Counter(names).most_common(1)[0][0][:40]!r} appears twice"
    if (longest := max(map(len, names))) > LONGEST:
        return f"a piece of {longest:,} characters ({LONGEST:,} at most)"
    if m.suffix:
        return "treat_whitespace_as_suffix has no tokenizer.json form"
    if not m.escaped:
        return "escape_whitespaces=false has no tokenizer.json form"
    if m.kind == UNIGRAM and any(k == UNUSED for _, _, k in m.pieces):
        return "unused pieces in a unigram model have no tokenizer.json form"
    if m.byte_fallback and any(f"<0x{b:02X}>" not in names for b in range(256)):
        return "byte fallback without all 256 bytes"
    return ""


def _document(m: Model) -> dict[str, Any]:
    ids = {p: i for i, (p, _, _) in enumerate(m.pieces)}
    free = {p: (s, i) for i, (p, s, k) in enumerate(m.pieces) if k == NORMAL}
    unk = m.pieces[m.roles["unk"]][0] if "unk" in m.roles else None
    if m.kind == BPE:
        rules = all_merges(free, lambda p: (-free[p][0], free[p][1]), {p: i for p, (_, i) in free.items()})
        model = bpe(ids, [list(r) for r in rules], unk_token=unk, fuse_unk=True, byte_fallback=m.byte_fallback)
    else:
        scores = [[p, s if k in (NORMAL, USER_DEFINED) else LOW] for p, s, k in m.pieces]
        model = {"type": "Unigram", "unk_id": m.roles.get("unk"), "vocab": scores, "byte_fallback": m.byte_fallback}
    marked = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    tokens = [added(p, i, marked[k]) for i, (p, _, k) in enumerate(m.pieces) if k in marked]
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]  # fmt: skip
    if m.dummy_prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    steps = sequence(list(_normalizers(m)), "normalizers")
    return document(model, added_tokens=tokens, normalizer=steps, decoder=sequence(back, "decoders"))


def _normalizers(m: Model) -> Iterator[dict[str, Any]]:
    if m.charsmap:
        yield {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(m.charsmap).decode()}
    if m.extra_spaces_removed:
        yield {"type": "Replace", "pattern": {"Regex": r"\A +| +\z|(?<= ) +"}, "content": ""}
    if m.dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE}
    yield {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _verify(made: dict[str, Any], data: bytes, file: Path) -> None:
    """Ids equal to the library's own on fuzzed text; special tokens are no text to it."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{file}: a tokenizer.model alone is read beside the library it is for: "
                        "pip install sentencepiece") from None  # fmt: skip
    from convert.verify.sample import Library
    from convert.verify.tokens import fuzz

    theirs = SentencePieceProcessor()
    try:
        theirs.LoadFromSerializedProto(data)
        ours = Library(made)
    except Exception as e:
        raise UserError(f"{file}: cannot be opened: {' '.join(str(e).split())[:200]}") from None
    control = [t["content"] for t in made["added_tokens"] if t["special"]]
    own = [t["content"] for t in made["added_tokens"] if not t["special"]]
    texts = [t for t in fuzz(own[:30], 400) if not any(n in t for n in control)]
    for text in texts:
        want, got = theirs.encode(text), ours.encode(text, add_special_tokens=False).ids
        if want != got:
            raise UserError(f"{file}: tokenizers has no equal form of this model: {text[:40]!r} is {want[:8]} in "
                            f"sentencepiece and {got[:8]} there")  # fmt: skip
