"""Text to ids and ids to bytes, for runtimes that bring no tokenizer of their own: the Hugging Face tokenizer.json.

Decoding goes to bytes, token by token, since a token may end inside a UTF-8 character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.tokens import around
from spec.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (b for b in range(256) if b not in set(plain))
    return {chr(b): b for b in plain} | {chr(0x100 + n): b for n, b in enumerate(rest)}


class Text:
    """A tokenizer with its policy on special tokens, from `tokenizer.json`, `tokenizer_config.json` and
    `generation_config.json` of a folder."""

    def __init__(self, fast: Fast, config: dict[str, Any], generation: dict[str, Any] | None = None) -> None:
        self._fast = fast
        self._data: dict[str, Any] = json.loads(fast.to_str())
        self._add_bos, self._add_eos = config.get("add_bos_token"), config.get("add_eos_token")
        self._bos, self._eos = (self._known(config.get(name)) for name in ("bos_token", "eos_token"))
        more = (generation or {}).get("eos_token_id") or []
        ids = more if isinstance(more, list) else [more]
        end = None if self._eos is None else fast.token_to_id(self._eos)
        self.eos_ids = frozenset(int(i) for i in [*ids, *([] if end is None else [end])])
        """Tokens that end generation."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, where the configuration names one."""
        return None if self._bos is None else self._fast.token_to_id(self._bos)

    def _known(self, token: Any) -> str | None:
        content = token.get("content") if isinstance(token, dict) else token
        return content if isinstance(content, str) and self._fast.token_to_id(content) is not None else None

    @classmethod
    def read(cls, folder: Path) -> Text | None:
        """The tokenizer of a folder, or none where it has no tokenizer.json. Raises `UserError` for a broken one."""
        from tokenizers import Tokenizer as Fast

        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            fast = Fast.from_file(str(file))
        except Exception as e:  # tokenizers raises bare Exceptions
            raise UserError(f"{file}: not a tokenizer that `tokenizers` can read: {e}") from None
        return cls(fast, _json(folder / "tokenizer_config.json"), _json(folder / "generation_config.json"))

    def encode(self, text: str) -> list[int]:
        """Text to ids. `add_bos_token` and `add_eos_token` rule where the configuration has them; where it does not,
        the tokenizer's own post-processor does."""
        ids = self._fast.encode(text, add_special_tokens=False).ids
        head, tail = self._around
        return head + ids + tail

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        sides = around(self._data.get("post_processor"), self._bos, self._eos, self._add_bos, self._add_eos)
        found = [[self._fast.token_to_id(t) for t in side] for side in sides]
        if None in found[0] + found[1]:
            raise UserError(f"tokenizer.json: its post-processor adds {sides[0] + sides[1]}, not all of them tokens")
        return [i for i in found[0] if i is not None], [i for i in found[1] if i is not None]

    def decode(self, ids: Sequence[int]) -> bytes:
        """Ids to bytes; special and unknown ids are left out."""
        if self._pieces is None:
            return self._fast.decode([int(i) for i in ids]).encode()
        out = b"".join(self._pieces.get(int(i), b"") for i in ids)
        return out[1:] if self._strips and out.startswith(b" ") else out

    @cached_property
    def _decoders(self) -> list[dict[str, Any]]:
        decoder = self._data.get("decoder") or {}
        return list(decoder.get("decoders", [])) if decoder.get("type") == "Sequence" else [decoder]

    @cached_property
    def _strips(self) -> bool:
        """Whether a space at the very beginning belongs to the tokenizer and not to the text."""
        return any(
            (d.get("type") == "Strip" and d.get("content") == " " and d.get("start", 0) > 0)
            or (d.get("type") == "Metaspace" and d.get("prepend_scheme", "always") != "never")
            for d in self._decoders
        )

    @cached_property
    def _pieces(self) -> dict[int, bytes] | None:
        """Bytes of every id; none for a decoder that is no function of single tokens."""
        kinds = {d.get("type") for d in self._decoders}
        if not kinds <= {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"} or kinds <= {"Fuse"}:
            return None
        if any(d.get("type") == "Replace" and "String" not in d.get("pattern", {}) for d in self._decoders):
            return None
        model = self._data["model"]
        vocabulary = model["vocab"]
        pieces = (
            {i: piece for piece, i in vocabulary.items()}
            if isinstance(vocabulary, dict)
            else {i: entry[0] for i, entry in enumerate(vocabulary)}
        )
        out = {i: self._bytes(piece) for i, piece in pieces.items()}
        for added in self._data.get("added_tokens", []):
            out[added["id"]] = b"" if added["special"] else added["content"].encode()
        return out

    def _bytes(self, piece: str) -> bytes:
        for d in self._decoders:
            match d.get("type"):
                case "ByteLevel":
                    codes = [ALPHABET.get(c) for c in piece]
                    return bytes(c for c in codes if c is not None) if None not in codes else piece.encode()
                case "ByteFallback":
                    found = _BYTE.fullmatch(piece)
                    if found:
                        return bytes([int(found[1], 16)])
                case "Metaspace":
                    piece = piece.replace(d.get("replacement", "\u2581"), " ")
                case "Replace":
                    piece = piece.replace(d["pattern"]["String"], d["content"])
        return piece.encode()


ALPHABET = _byte_alphabet()
"""Characters that stand for bytes."""


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise UserError(f"{file}: not valid JSON: {e}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: not a JSON object")
    return data
