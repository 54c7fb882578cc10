"""What a source says about itself, for the card of what is made from it: licence, languages, data, training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.sources import Source
from convert.sources.files import present, read_text
from spec.errors import UserError
from spec.load import read_yaml

CARRIED = ("license", "license_name", "license_link", "language", "datasets", "base_model")
"""Keys of a card's front matter that hold for what is made from it too."""
LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
CARD = 1_000_000
"""Bytes of a README at most."""


@dataclass(frozen=True)
class Provenance:
    """What is known of a source."""

    front: dict[str, Any]
    """Front matter that is carried over."""
    licences: tuple[Path, ...]
    """Files to copy."""
    training: tuple[tuple[str, str], ...]
    """How it was trained, where that is known."""
    notes: tuple[str, ...] = ()


def provenance(source: Source) -> Provenance:
    """Read what lies beside a source's weights. Nothing here stops a conversion."""
    notes: list[str] = []
    front: dict[str, Any] = {}
    licences: tuple[Path, ...] = ()
    if source.path.is_dir():
        try:
            front = _front(source.path / "README.md")
        except UserError as e:
            notes.append(f"its card is not carried over: {e}")
        licences = tuple(sorted({p for pattern in LICENCES for p in source.path.glob(pattern) if _plain(p)}))
    if licences and "license" not in front:
        front |= {"license": "other", "license_name": licences[0].name, "license_link": licences[0].name}
    if "license" not in front:
        notes.append("no licence is known: the source names none")
    if source.origin is not None:
        front["base_model"] = source.origin["repo"]
    training = tuple(_training(source.path / "training")) if source.path.is_dir() else ()
    return Provenance(front, licences, training, tuple(notes))


def _plain(path: Path) -> bool:
    try:
        return present(path) and path.stat().st_size <= CARD
    except UserError:
        return False


def _front(readme: Path) -> dict[str, Any]:
    if not present(readme):
        return {}
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", read_text(readme, CARD).replace("\r\n", "\n"), re.DOTALL)
    data = read_yaml(found[1], str(readme)) if found and found[1].strip() else {}
    return {k: data[k] for k in CARRIED if _text(data.get(k))}


def _text(value: object) -> bool:
    """Whether it is a word, or a few, as front matter holds them."""
    if isinstance(value, list):
        return 0 < len(value) <= 50 and all(isinstance(v, str) and _text(v) for v in value)
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _training(folder: Path) -> Iterator[tuple[str, str]]:
    """Rows of a table from a run of our own trainer: training/config.yaml and training/train.jsonl."""
    try:
        config = read_yaml(read_text(folder / "config.yaml"), "") if present(folder / "config.yaml") else {}
        steps = list(_steps(folder / "train.jsonl"))
    except UserError:
        return
    data = config.get("data")
    source = data.get("source") if isinstance(data, dict) else data
    if isinstance(source, str):
        yield "data", "the Python standard library's source" if source == "stdlib" else Path(source).name
    for key in ("steps", "seed", "precision"):
        if key in config:
            yield key, str(config[key])
    if not steps:
        return
    last = steps[-1]
    if isinstance(last.get("tokens"), int):
        yield "tokens seen", f"{last['tokens']:,}"
    scored = next((s for s in reversed(steps) if isinstance(s.get("val_loss"), float)), {})
    if scored:
        yield "validation loss", f"{scored['val_loss']:.4f} nats/token at step {scored.get('step')}"
    if isinstance(scored.get("val_bits_per_byte"), float):
        yield "validation bits per byte", f"{scored['val_bits_per_byte']:.4f}"


def _steps(journal: Path) -> Iterator[dict[str, Any]]:
    if not present(journal):
        return
    for line in read_text(journal).splitlines():
        try:
            step = json.loads(line)
        except ValueError:  # a last line that a crash cut
            return
        if isinstance(step, dict):
            yield step
