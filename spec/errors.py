"""Errors that a user can act on: the place, the value, the rule and the fix, all of them at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """Something the user can fix. Commands print it as one line (or one line a problem) and exit with 2."""


class MissingDependency(UserError):
    """An optional package is not installed; the message says which and how to install it."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a spec."""

    path: str
    value: object
    rule: str
    fix: str = ""

    def under(self, prefix: str) -> Problem:
        """The same problem, seen from further out."""
        if not self.path:
            return replace(self, path=prefix)
        return replace(self, path=prefix + self.path if self.path.startswith("[") else f"{prefix}.{self.path}")

    def __str__(self) -> str:
        shown = "" if self.value is None else f"{_short(self.value)} "
        return f"{self.path}: {shown}{self.rule}" + (f" ({self.fix})" if self.fix else "")


class SpecError(UserError):
    """A spec that does not hold; `problems` lists everything that is wrong with it."""

    def __init__(self, problems: Sequence[Problem], source: str = "") -> None:
        self.problems = tuple(problems)
        self.source = source
        lead = f"{source}: " if source else ""
        super().__init__("\n".join(f"{lead}{p}" for p in self.problems))


def _short(value: object, limit: int = 60) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names what was probably meant, or what there is."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else "known: " + ", ".join(options)


def problems_from(error: ValidationError, data: Any, model: type | None = None) -> list[Problem]:
    """pydantic's errors as problems with YAML paths. `data` is the input, to tell list indices from union tags."""
    out: list[Problem] = []
    for item in error.errors(include_url=False):
        inner = item.get("ctx", {}).get("error")
        path = _path(item["loc"], data)
        if isinstance(inner, SpecError):
            out.extend(p.under(path) if path else p for p in inner.problems)
            continue
        kind, value = item["type"], item.get("input")
        if kind == "extra_forbidden":
            name = str(item["loc"][-1])
            known = _fields_at(item["loc"][:-1], model)
            out.append(Problem(path, None, "is not a field", nearest(name, known) if known else "remove it"))
        elif kind == "missing":
            out.append(Problem(path, None, "is missing", "it has no default"))
        elif kind == "union_tag_not_found":
            out.append(Problem(f"{path}.kind", None, "is missing", "say which kind this is"))
        elif kind == "union_tag_invalid":
            ctx = item.get("ctx", {})
            out.append(Problem(f"{path}.kind", ctx.get("tag"), "is no kind", f"one of {ctx.get('expected_tags')}"))
        else:
            shown = None if isinstance(value, dict) else value
            message = item["msg"].removeprefix("Value error, ")
            out.append(Problem(path, shown, message[0].lower() + message[1:]))
    return out


def _path(loc: Sequence[int | str], data: Any) -> str:
    """A pydantic location as a YAML path; tags of discriminated unions, which are no keys of the data, are dropped."""
    text, here = "", data
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
            here = here[part] if isinstance(here, list | tuple) and part < len(here) else None
        else:
            tag = isinstance(here, dict) and part not in here and here.get("kind", "dense") == part
            if tag:
                continue
            text += f".{part}" if text else part
            here = here.get(part) if isinstance(here, dict) else None
    return text


def _fields_at(loc: Sequence[int | str], model: Any) -> list[str]:
    """Field names of the model that a location leads to, through optionals, tuples and unions."""
    from typing import get_args

    from pydantic import BaseModel

    candidates = [model] if model is not None else []
    for part in loc:
        following: list[Any] = []
        for c in candidates:
            if isinstance(part, str) and part in c.model_fields:
                stack = [c.model_fields[part].annotation]
                while stack:
                    t = stack.pop()
                    if isinstance(t, type) and issubclass(t, BaseModel):
                        following.append(t)
                    else:
                        stack.extend(get_args(t))
            elif isinstance(part, int):  # the annotation of a list's items was reached with its field
                following.append(c)
            else:  # a union's tag: keep the member of that kind
                kind = c.model_fields.get("kind")
                if kind is not None and part in get_args(kind.annotation):
                    following.append(c)
        candidates = following
    return sorted({name for c in candidates for name in c.model_fields})
