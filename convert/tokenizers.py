"""Tokenizer files of a checkpoint folder, Hugging Face style, into one `Tokenizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from backends.base import Tokenizer
from convert.sources.files import read_json
from spec.errors import UserError


def read_tokenizer(folder: Path, model_config: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """tokenizer.json and what surrounds it; none where a folder has no tokenizer files.

    `model_config` is the config.json, whose eos_token_id counts where no tokenizer file names an EOS. Raises
    `UserError` for damaged files, for special tokens that the vocabulary lacks, and for a tokenizer.model alone.
    """
    main, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if not main.is_file():
        if pieces.is_file() or (folder / "vocab.json").is_file():
            what = pieces.name if pieces.is_file() else "vocab.json"
            raise UserError(f"{folder}: {what} without tokenizer.json; write one with transformers' "
                            "AutoTokenizer.from_pretrained(...).save_pretrained(...)")  # fmt: skip
        return None
    data = read_json(main)
    config, special, generation = (
        _optional(folder / n) for n in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
    )
    try:
        ids = token_ids(data)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{main}: no tokenizer: its vocabulary cannot be read ({type(e).__name__}: {e})") from None

    def named(role: str) -> str | None:
        for source in (config, special):
            value = source.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                if text not in ids:
                    raise UserError(f"{main}: the {role} token {text!r} is not in the vocabulary")
                return text
        return None

    names = {i: t for t, i in ids.items()}
    ends = [names[i] for i in _ends(generation, model_config or {}) if i in names]
    bos, eos = named("bos"), named("eos")
    eos = eos if eos is not None else next(iter(ends), None)
    before, after = _surrounding(data.get("post_processor"))
    return Tokenizer(
        json=data,
        bos=bos,
        eos=eos,
        unk=named("unk"),
        pad=named("pad"),
        extra_eos=tuple(t for t in dict.fromkeys(ends) if t != eos),
        add_bos=bos is not None and (bos in before or config.get("add_bos_token") is True),
        add_eos=eos is not None and (eos in after or config.get("add_eos_token") is True),
        chat_template=_chat_template(folder, config),
        sentencepiece=pieces.read_bytes() if pieces.is_file() else None,
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
    return read_json(path) if path.is_file() else {}


def _ends(*configs: Mapping[str, Any]) -> Iterable[int]:
    """Ids that end generation, from the first config that names any."""
    for c in configs:
        ids = c.get("eos_token_id")
        if ids is not None:
            return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    return []


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{file}: cannot be read ({e})") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _surrounding(processor: Any) -> tuple[set[str], set[str]]:
    """Special tokens that a post-processor puts before and after a single sequence."""
    before: set[str] = set()
    after: set[str] = set()
    if not isinstance(processor, dict):
        return before, after
    for inner in processor.get("processors", []):
        b, a = _surrounding(inner)
        before |= b
        after |= a
    if processor.get("type") == "TemplateProcessing":
        side = before
        for piece in processor.get("single", []):
            if "Sequence" in piece:
                side = after
            elif "SpecialToken" in piece:
                side.add(piece["SpecialToken"]["id"])
    elif processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        before.add(processor["cls"][0])
        after.add(processor["sep"][0])
    return before, after
