"""Chat templates of a folder: chat_template.jinja, additional_chat_templates/, or tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.sources.files import present, read_text
from spec.errors import UserError

LIMIT = 1_000_000
"""Characters of a template at most."""


def read(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template that chats use; of several, the one named `default`, else the first.

    A template file counts before the configuration, as in transformers. Raises `UserError` for one that does not parse.
    """
    file = folder / "chat_template.jinja"
    if present(file):
        return checked(read_text(file, LIMIT), str(file))
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default", next(iter(named.values()), None))
    if isinstance(found, dict):
        found = found.get("default", next(iter(found.values()), None))
    return checked(found, where) if isinstance(found, str) else None


def checked(text: str, where: str) -> str:
    """The template itself. Raises `UserError` where it is too long or, with jinja2 here, does not parse."""
    if len(text) > LIMIT:
        raise UserError(f"{where}: {len(text):,} characters are no template ({LIMIT:,} at most)")
    try:
        import jinja2
    except ImportError:
        return text
    try:
        _environment().parse(text)
    except (jinja2.TemplateError, RecursionError) as e:
        line = getattr(e, "lineno", None)
        at = f" line {line}" if line else ""
        raise UserError(f"{where}:{at} does not parse: {' '.join(str(e).split())[:200]}") from None
    return text


def _environment() -> Any:
    """Jinja as transformers runs templates: without access to Python's insides, with `generation` blocks and loop
    controls."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (the class's own protocol)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])


def render(text: str, messages: list[dict[str, str]], **names: Any) -> str:
    """A conversation as the template writes it. Raises `jinja2.TemplateError`."""
    import json
    from datetime import datetime

    import jinja2

    def refuse(message: str) -> Any:
        raise jinja2.TemplateError(message)

    environment = _environment()
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda f: datetime.now().strftime(f)}  # noqa: DTZ005
    return environment.from_string(text).render(messages=messages, add_generation_prompt=True, **names)
