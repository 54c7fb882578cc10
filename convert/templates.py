"""Chat templates of a folder: chat_template.jinja, additional_chat_templates/, or tokenizer_config.json."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from convert import render
from convert.sources.files import present, read_text
from spec.errors import UserError

LIMIT = 1_000_000
"""Characters of a template at most."""
MOST = 32
"""Templates of a folder at most."""


DEFAULT = "default"
FOLDER = "additional_chat_templates"
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """The template that chats use, and further ones by name (tool_use, rag). Of several without a `default`, the first
    is used.

    Template files count before the configuration, as in transformers. Raises `UserError` for one that does not parse.
    """
    found: dict[str, str] = {}
    single, more = folder / "chat_template.jinja", folder / FOLDER
    if present(single):
        found[DEFAULT] = read_text(single, LIMIT)
    if more.is_dir():
        found |= {f.stem: read_text(f, LIMIT) for f in sorted(more.glob("*.jinja"))[:MOST]}
    where = str(folder)
    if not found:
        where = str(folder / "tokenizer_config.json")
        told = config.get("chat_template")
        if isinstance(told, list):
            told = {t.get("name"): t.get("template") for t in told if isinstance(t, dict)}
        told = told if isinstance(told, dict) else {DEFAULT: told}
        found = {str(name): text for name, text in told.items() if isinstance(text, str)}
    accepted(found, where)
    main = found.pop(DEFAULT, None)
    if main is None and found:
        main = found.pop(next(iter(found)))
    return main, found


def accepted(found: Mapping[str, str], where: str) -> None:
    """Raises `UserError` for a template's name that could be a path (files are called by it), and by `checked`."""
    for name, text in found.items():
        if not NAME.fullmatch(name):
            raise UserError(f"{where}: {name[:80]!r} is no name of a template (letters, digits, _ and -)")
        checked(text, f"{where}: chat template {name!r}")


def checked(text: str, where: str) -> str:
    """The template itself. Raises `UserError` where it is too long or, with jinja2 here, does not parse."""
    if len(text) > LIMIT:
        raise UserError(f"{where}: {len(text):,} characters are no template ({LIMIT:,} at most)")
    try:
        import jinja2
    except ImportError:
        return text
    try:
        render.environment().parse(text)
    except (jinja2.TemplateError, RecursionError) as e:
        line = getattr(e, "lineno", None)
        at = f" line {line}" if line else ""
        raise UserError(f"{where}:{at} does not parse: {' '.join(str(e).split())[:200]}") from None
    return text


def rendered(
    text: str, conversations: list[list[dict[str, str]]], names: Mapping[str, str]
) -> tuple[list[str], str | None]:
    """Conversations as the template writes them, less those that it refuses; and why more of them are missing, if any
    are. A template is somebody else's program: it runs in a process of its own with little time and memory."""
    if find_spec("jinja2") is None:
        return [], "jinja2 is not installed"
    job = json.dumps({"text": text, "conversations": conversations, "names": dict(names)})
    try:
        done = subprocess.run(
            [sys.executable, "-I", render.__file__], input=job.encode(), capture_output=True, check=False,
            timeout=3 * render.SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [], "the chat template takes too long"
    except OSError as e:
        return [], f"the chat template cannot be run ({e.strerror})"
    if done.returncode:
        return [], "the chat template takes too long or too much memory"
    found = json.loads(done.stdout)
    texts = [f["text"] for f in found if "text" in f]
    fault = next((f["fault"] for f in found if "fault" in f), None)
    if fault is not None:
        return texts, f"the chat template breaks: {fault}"
    return texts, None if texts else "the chat template refuses them all"
