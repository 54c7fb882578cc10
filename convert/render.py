"""Runs one chat template, in a process of its own: it is somebody else's program.

Reads a job as JSON (`text`, `conversations`, `names`) and writes what the template makes of each conversation: `text`,
or `fault`, what is wrong, or neither where it refuses. Imports nothing of this program: starting it costs little.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SECONDS, MEMORY, LIMIT = 2, 2**30, 1_000_000
"""That a template may take, and characters that it may write."""


def environment() -> Any:
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


def _main() -> None:
    import resource
    from datetime import datetime

    import jinja2

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    class Refused(jinja2.TemplateError):
        pass

    def refuse(message: str) -> Any:
        raise Refused(message)

    def today(form: str) -> str:
        return datetime.now().strftime(form)

    job = json.load(sys.stdin)
    jinja = environment()
    jinja.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    jinja.globals |= {"raise_exception": refuse, "strftime_now": today}
    out: list[dict[str, str]] = []
    for messages in job["conversations"]:
        try:
            made = jinja.from_string(job["text"]).render(messages=messages, add_generation_prompt=True, **job["names"])
            out.append({"text": made} if len(made) <= LIMIT else {"fault": f"it writes {len(made)} characters"})
        except Refused:
            out.append({})
        except Exception as e:  # it may raise anything
            told = "".join(c for c in " ".join(str(e).split()) if c.isprintable())[:200]
            out.append({"fault": f"{type(e).__name__}: {told}"})
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    _main()
