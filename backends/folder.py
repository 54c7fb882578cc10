"""What folders of every backend share: the mark that says what they are, and the tokenizer's files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from backends.base import Tokenizer
from backends.tokens import TEMPLATES, steps, surrounding
from spec.config import Spec
from spec.errors import UserError
from spec.load import dump, parse, read_yaml

MARK = "allotrope.json"
"""`backend`, `level`, `options`, `spec` (YAML text), `receipt`, and once it is verified `report`."""


def read_mark(folder: Path) -> dict[str, Any]:
    """The mark of a folder that we wrote; empty for any other. Raises `UserError` for a damaged one."""
    file = folder / MARK
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read ({e})") from None
    options = data.get("options", {}) if isinstance(data, dict) else None
    if not isinstance(options, dict) or not all(isinstance(v, str) for v in options.values()):
        raise UserError(f"{file}: damaged: no mark of a converted folder")
    for key, kind in (("backend", str), ("level", str), ("spec", str), ("receipt", dict)):
        if not isinstance(data.get(key, kind()), kind):
            raise UserError(f"{file}: damaged: {key} is no {'mapping' if kind is dict else 'text'}")
    return data


def write_mark(
    folder: Path, backend: str, spec: Spec, level: str, options: Mapping[str, str], receipt: Mapping[str, Any]
) -> None:
    """The mark of a finished folder."""
    data = {"backend": backend, "level": level, "options": dict(options), "spec": dump(spec), "receipt": dict(receipt)}
    write_json(folder / MARK, data)


def stamp(folder: Path, receipt: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> None:
    """The same folder's receipt again, with what was measured since."""
    data = read_mark(folder) | {"receipt": dict(receipt)}
    write_json(folder / MARK, data | ({"report": dict(report)} if report else {}))


def marked_spec(mark: Mapping[str, Any], where: Path) -> Spec:
    """The spec in a mark. Raises `UserError` where there is none."""
    text = mark.get("spec")
    if not isinstance(text, str):
        raise UserError(f"{where}: has no {MARK} with a spec: not converted by this program")
    return parse(read_yaml(text, str(where)), str(where))


def write_json(file: Path, data: Any) -> None:
    """Strict JSON, flushed to disk."""
    with file.open("w", encoding="utf-8") as f:
        json.dump(data, f, indent=1, allow_nan=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())


def token_id(tokenizer: Tokenizer, token: str | None) -> int | None:
    """The id of a token by its text."""
    if token is None:
        return None
    for added in tokenizer.json.get("added_tokens") or []:
        if added["content"] == token:
            return int(added["id"])
    vocab = tokenizer.json["model"]["vocab"]
    if isinstance(vocab, dict):
        return vocab.get(token)
    return next((i for i, (piece, _) in enumerate(vocab) if piece == token), None)


def end_ids(tokenizer: Tokenizer | None) -> list[int]:
    """Ids that end generation, the EOS first."""
    if tokenizer is None:
        return []
    ids = [token_id(tokenizer, t) for t in (tokenizer.eos, *tokenizer.extra_eos)]
    return [i for i in dict.fromkeys(ids) if i is not None]


PLAIN_CLASS = "PreTrainedTokenizerFast"
"""transformers' name for a tokenizer that tokenizer.json describes whole."""


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None, context: int, kind: str = PLAIN_CLASS) -> list[str]:
    """tokenizer.json and its configuration as transformers, mlx-lm and onnxruntime-genai read them; the names written.

    kind: the class that the configuration names, which says to some clients how to read the rest. BOS and EOS go into
    the post-processor, since not every client reads `add_bos_token`.
    """
    if tokenizer is None:
        return []
    data = deepcopy(tokenizer.json)
    data["post_processor"] = _post_processor(tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": kind,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
    }
    special: dict[str, Any] = {}
    for role in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, role)
        if token is not None:
            config[f"{role}_token"] = special[f"{role}_token"] = token
    ends = end_ids(tokenizer)
    generation: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    for role in ("bos", "pad"):
        if (i := token_id(tokenizer, getattr(tokenizer, role))) is not None:
            generation[f"{role}_token_id"] = i
    files = {
        "tokenizer.json": data,
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
        "generation_config.json": generation,
    }
    for name, content in files.items():
        write_json(folder / name, content)
    written = list(files)
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        written.append("chat_template.jinja")
    for name, text in tokenizer.templates.items():
        more = folder / "additional_chat_templates" / f"{name}.jinja"
        assert Path(name).name == name, "a name, and no path"
        more.parent.mkdir(exist_ok=True)
        more.write_text(text, encoding="utf-8")
        written.append(f"{more.parent.name}/{more.name}")
    if tokenizer.sentencepiece is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer.sentencepiece)
        written.append("tokenizer.model")
    return written


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The tokenizer's own steps, less what adds special tokens, then the policy as a template."""
    kept = [s for s in steps(tokenizer.json.get("post_processor"), "processors") if s.get("type") not in TEMPLATES]
    before, after = surrounding(tokenizer)
    if before or after:

        def around(name: str, kind: int) -> list[dict[str, Any]]:
            special = [[{"SpecialToken": {"id": t, "type_id": kind}} for t in side] for side in (before, after)]
            return [*special[0], {"Sequence": {"id": name, "type_id": kind}}, *special[1]]

        tokens = {t: {"id": t, "ids": [token_id(tokenizer, t)], "tokens": [t]} for t in (*before, *after)}
        kept.append({
            "type": "TemplateProcessing", "single": around("A", 0), "pair": [*around("A", 0), *around("B", 1)],
            "special_tokens": tokens,
        })  # fmt: skip
    if not kept:
        return None
    return kept[0] if len(kept) == 1 else {"type": "Sequence", "processors": kept}
