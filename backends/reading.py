"""What readers of folders share: a mark that is theirs, and the files of a tokenizer that agree with each other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.base import Option, Tokenizer
from backends.folder import MARK, PLAIN_CLASS, marked_spec, read_mark, write_tokenizer
from spec.config import Spec
from spec.errors import UserError, nearest


@dataclass(frozen=True)
class Marked:
    """What a folder's mark says, checked."""

    source: Spec
    level: str
    options: dict[str, str]
    receipt: dict[str, Any]


def own_mark(
    path: Path, backend: str, levels: Sequence[str], options: Sequence[Option], added: Sequence[str] = ()
) -> Marked:
    """The mark of a folder that `backend` wrote. added: options that folders of earlier versions do not name. Raises
    `UserError` for any other, and for a level or an option that it does not know."""
    mark, file = read_mark(path), path / MARK
    source = marked_spec(mark, path)
    if mark.get("backend") != backend:
        raise UserError(f"{file}: backend: {mark.get('backend')}, and {backend} is asked to read it")
    level, found = mark.get("level"), mark.get("options")
    if level not in levels:
        raise UserError(f"{file}: level: {level} is none of {backend}'s ({nearest(str(level), levels)})")
    known = {o.name: o for o in options}
    if not isinstance(found, dict) or set(found) | set(added) != set(known):
        raise UserError(f"{file}: options: {json.dumps(found)[:80]}, and {backend} has {', '.join(known)}")
    for name, value in found.items():
        if value not in known[name].choices:
            raise UserError(f"{file}: options.{name}: {value} is none of {', '.join(known[name].choices)}")
    receipt = mark.get("receipt")
    if not isinstance(receipt, dict):
        raise UserError(f"{file}: receipt: is no mapping")
    return Marked(source, str(level), {**dict.fromkeys(added, ""), **found}, receipt)


def load_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError`."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{file}: {e.strerror}") from None
    except ValueError:
        raise UserError(f"{file}: not valid JSON") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: not a JSON object")
    return data


def read_back(path: Path) -> Tokenizer | None:
    """The tokenizer that `backends.folder.write_tokenizer` left in a folder, without chat template and SentencePiece
    model; none where there is none. Raises `UserError` for files that are missing or damaged."""
    if not (path / "tokenizer.json").is_file():
        return None
    data, config, generation = (
        load_json(path / f"{name}.json") for name in ("tokenizer", "tokenizer_config", "generation_config")
    )
    try:
        vocab, added = data["model"]["vocab"], data.get("added_tokens") or []
        pieces = ((i, t) for t, i in vocab.items()) if isinstance(vocab, dict) else enumerate(t for t, _ in vocab)
        names = {**dict(pieces), **{t["id"]: t["content"] for t in added}}
        ends = generation.get("eos_token_id", [])
        special: dict[str, Any] = {role: config.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
        return Tokenizer(
            data,
            **special,
            extra_eos=tuple(names[i] for i in (ends if isinstance(ends, list) else [ends])),
            add_bos=config["add_bos_token"],
            add_eos=config["add_eos_token"],
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{path}: tokenizer.json, tokenizer_config.json and generation_config.json do not fit"
        ) from None


def tokenizer_problems(
    path: Path, tokenizer: Tokenizer | None, context: int, kind: str = PLAIN_CLASS
) -> dict[str, str]:
    """Files of the folder's own tokenizer that are not what the others ask for: special tokens and their ids, what ends
    generation, the policy on BOS."""
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        written = [n for n in write_tokenizer(Path(folder), tokenizer, context, kind) if n.endswith(".json")]
        return differences({n: (load_json(path / n), load_json(Path(folder) / n)) for n in written})


def differences(files: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, str]:
    """What is wrong with JSON files, each given as it is and as it must be: `file path.to.key` and how."""
    out: dict[str, str] = {}
    for file, pair in files.items():
        got, want = (dict(_leaves(data)) for data in pair)
        out |= {f"{file} {k}": "is missing" for k in want if k not in got}
        out |= {f"{file} {k}": "does not belong there" for k in got if k not in want}
        out |= {f"{file} {k}": f"is {_shown(got[k])}, not {_shown(want[k])}" for k in want if k in got
                and json.dumps(got[k], sort_keys=True) != json.dumps(want[k], sort_keys=True)}  # fmt: skip
    return out


def _leaves(data: dict[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{under}{key}.")
        else:
            yield f"{under}{key}", value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
