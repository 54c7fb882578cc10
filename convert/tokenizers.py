"""Tokenizer files of a checkpoint folder, Hugging Face style, into one `Tokenizer`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from backends.base import Tokenizer
from backends.tokens import steps, template
from convert import templates, vocabularies
from convert.sources.files import present, read_bytes, read_json
from convert.vocabularies.common import added
from spec.errors import UserError

ROLES = ("bos", "eos", "unk", "pad")
TYPES = ("BPE", "Unigram")
"""Kinds of tokenizers that decoders have."""
LARGEST = 10_000_000
"""Ids are below this: forty times the largest vocabulary there is."""


def read_tokenizer(folder: Path, model_config: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """tokenizer.json and what surrounds it, or what other vocabulary files amount to; none where a folder has none.

    `model_config` is the config.json, whose eos_token_id counts where no tokenizer file names an EOS. What comes back
    has, as transformers has it, every special token that a file names among its added tokens, and its post-processor
    decides on BOS and EOS; `add_bos_token: true` counts where that has no template. Raises `UserError` for damaged
    files, for kinds that decoders do not have, and for special tokens that the vocabulary lacks.
    """
    main = folder / "tokenizer.json"
    config, special, generation, more = (
        _optional(folder / f"{n}.json")
        for n in ("tokenizer_config", "special_tokens_map", "generation_config", "added_tokens")
    )
    if present(main):
        found = vocabularies.Found(read_json(main))
        pieces = folder / "tokenizer.model"
        if present(pieces):
            found.sentencepiece = read_bytes(pieces)
    else:
        other = vocabularies.find(folder, config)
        if other is None:
            return None
        found, main = other, folder
        _adopt(found.json, config, special, more, main)
    data = found.json
    data |= {"truncation": None, "padding": None}  # of a batch that somebody once made: clients set their own
    ids = _checked(data, main)

    def named(role: str) -> str | None:
        for source in (config, special):
            text = _content(source.get(f"{role}_token"))
            if text is not None:
                if text not in ids:
                    raise UserError(f"{main}: the {role} token {text!r} is not in the vocabulary")
                return text
        return found.roles.get(role)

    names = {i: t for t, i in ids.items()}
    ends = [names[i] for i in _ends(generation, model_config or {}) if i in names]
    roles = {r: named(r) for r in ROLES}
    _mark(data, ids, [t for t in roles.values() if t is not None])
    _load(data, main)
    sides = template(data.get("post_processor"))
    _agree(data, ids, main)
    before, after = sides or ([], [])
    bos = roles["bos"] or (before[0] if len(before) == 1 else None)
    eos = roles["eos"] or next(iter(ends), None) or (after[0] if len(after) == 1 else None)
    if sides is None:
        before = [bos] if bos and (config.get("add_bos_token") is True or found.add_bos) else []
        after = [eos] if eos and config.get("add_eos_token") is True else []
    chat, more_chats = templates.read(folder, config)
    return Tokenizer(
        json=data,
        bos=bos,
        eos=eos,
        unk=roles["unk"],
        pad=roles["pad"],
        extra_eos=tuple(t for t in dict.fromkeys(ends) if t != eos),
        add_bos=bos in before or (bos is not None and config.get("add_bos_token") is True),
        add_eos=eos in after or (eos is not None and config.get("add_eos_token") is True),
        chat_template=chat,
        templates=more_chats,
        sentencepiece=found.sentencepiece,
    )


def token_ids(data: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json and its id, added ones included."""
    vocab = data["model"]["vocab"]
    if isinstance(vocab, dict):
        out = {str(token): int(i) for token, i in vocab.items()}
    else:  # Unigram: pairs of piece and score, in order of id
        out = {str(piece): i for i, (piece, _) in enumerate(vocab)}
    out.update({str(t["content"]): int(t["id"]) for t in data.get("added_tokens") or []})
    return out


def token_count(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs: the largest id + 1."""
    return max(token_ids(tokenizer.json).values(), default=-1) + 1


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if present(path) else {}


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _checked(data: dict[str, Any], where: Path) -> dict[str, int]:
    """Ids by token. Raises `UserError` for a kind that is not carried and for damaged vocabularies."""
    model = data.get("model")
    kind = model.get("type", TYPES[0]) if isinstance(model, dict) else TYPES[0]
    if kind not in TYPES:
        raise UserError(f"{where}: model.type: {kind} is no tokenizer of a decoder here ({' and '.join(TYPES)} are)")
    if isinstance(model, dict) and model.get("dropout"):
        raise UserError(f"{where}: model.dropout: {model['dropout']!r} splits a text differently every time "
                        "(null for use after training)")  # fmt: skip
    try:
        ids = token_ids(data)
        entries = [*data["model"]["vocab"].values()] if isinstance(data["model"]["vocab"], dict) else []
        entries += [t["id"] for t in data.get("added_tokens") or []]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{where}: no tokenizer: its vocabulary cannot be read ({type(e).__name__}: {e})") from None
    wrong = next((i for i in entries if type(i) is not int or not 0 <= i < LARGEST), None)
    if wrong is not None:
        raise UserError(f"{where}: no tokenizer: id {wrong!r} is no number from 0 to {LARGEST - 1}")
    for text in ids:
        if any(0xD800 <= ord(c) < 0xE000 for c in text):
            raise UserError(f"{where}: token {text!r} ({ids[text]}) has half a surrogate pair, which is no text")
    return ids


def _load(data: dict[str, Any], where: Path) -> None:
    """Raises `UserError` where the `tokenizers` library cannot open it: merge rules of missing tokens and the like."""
    from tokenizers import Tokenizer as Fast

    try:
        made = Fast.from_str(json.dumps(data))
    except BaseException as e:  # the library raises bare Exceptions, and panics that are none
        if isinstance(e, (KeyboardInterrupt, SystemExit)):
            raise
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"{where}: not a tokenizer that `tokenizers` can open: {reason}") from None
    for t in data["added_tokens"]:  # it numbers tokens that the vocabulary lacks by itself
        if (found := made.token_to_id(t["content"])) != t["id"]:
            raise UserError(f"{where}: added token {t['content']!r} has id {t['id']}, and `tokenizers`, with which "
                            f"clients read the file, makes it {found}")  # fmt: skip


def _agree(data: Mapping[str, Any], ids: Mapping[str, int], where: Path) -> None:
    """Raises `UserError` where a template's tokens have other ids than the vocabulary's."""
    for step in steps(data.get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            told = {t: s["ids"] for t, s in step.get("special_tokens", {}).items()}
        else:
            told = {t: [i] for t, i in (step.get(k) or ("", 0) for k in ("cls", "sep")) if t}
        for text, found in told.items():
            if found != [ids.get(text)]:
                raise UserError(f"{where}: post_processor: {text!r} has ids {found}, in the vocabulary {ids.get(text)}")


def _mark(data: dict[str, Any], ids: Mapping[str, int], roles: Iterable[str]) -> None:
    """Special tokens by role join the added ones, as transformers has them: found in text before anything else."""
    tokens: list[dict[str, Any]] = data.setdefault("added_tokens", []) or []
    known = {t["content"] for t in tokens}
    missing = [t for t in dict.fromkeys(roles) if t not in known]
    data["added_tokens"] = [*tokens, *(added(t, ids[t]) for t in missing)]


def _adopt(
    data: dict[str, Any], config: Mapping[str, Any], special: Mapping[str, Any], more: Mapping[str, Any], where: Path
) -> None:
    """Added tokens that stand in tokenizer_config.json or added_tokens.json, beside a vocabulary that is no
    tokenizer.json."""
    vocab = data["model"]["vocab"]
    names = list(vocab) if isinstance(vocab, dict) else [p for p, _ in vocab]
    at = vocab if isinstance(vocab, dict) else {text: i for i, text in enumerate(names)}
    own = {t["content"]: t for t in data["added_tokens"]}
    marked = {_content(v) for source in (config, special) for k, v in source.items() if k.endswith("_token")}
    lists = [source.get(k) or [] for source in (config, special)
             for k in ("additional_special_tokens", "extra_special_tokens")]  # fmt: skip
    marked |= {_content(v) for values in lists if isinstance(values, list) for v in values}
    try:
        told = {int(i): dict(t) for i, t in (config.get("added_tokens_decoder") or {}).items()}
        for text, i in more.items():
            told.setdefault(int(i), {"content": str(text), "special": text in marked})
        for i, t in sorted(told.items()):
            text = str(t["content"])
            if not 0 <= i < LARGEST or (at.get(text, i) != i and text not in own):
                raise UserError(f"{where}: added token {text!r} has id {i}, and another one in the vocabulary")
            if i < len(names) and isinstance(vocab, list) and names[i] != text:
                vocab[i][0] = text  # a placeholder's new name
            fresh = added(text, i, bool(t.get("special")))
            own[text] = fresh | {k: bool(t[k]) for k in fresh if k in t and k not in ("id", "content")}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{where}: added tokens cannot be read ({type(e).__name__}: {e})") from None
    data["added_tokens"] = sorted(own.values(), key=lambda t: t["id"])


def _ends(*configs: Mapping[str, Any]) -> Iterable[int]:
    """Ids that end generation, from the first config that names any."""
    for c in configs:
        ids = c.get("eos_token_id")
        if ids is not None:
            return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    return []
