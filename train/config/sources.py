"""Where text comes from: a source, or several with weights, and which columns of its rows count."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from cyclopts import Parameter

from spec.config import Model, Positive
from spec.errors import Problem
from train.config.fields import Size, unused

if TYPE_CHECKING:
    from train.config.top import TrainConfig

STDLIB, HUB, CHATML = "stdlib", "hf:", "chatml"
"""The embedded corpus; the beginning of a Hugging Face dataset's name; the template that one asks for by name."""


class Source(Model):
    """One source of documents."""

    source: Annotated[str, Parameter(name="--data")] = STDLIB
    """A file or folder of text, JSONL (.jsonl, .json) or .parquet, the first two also .gz or .zst;
    `hf:OWNER/NAME[:CONFIG][@REVISION]`; or `stdlib`: the Python standard library's own source."""
    text: Annotated[str, Parameter(name="--data.text")] = "text"
    """Column of JSONL, parquet and datasets that holds a document."""
    messages: Annotated[str | None, Parameter(name="--data.messages")] = None
    """Column that holds a chat, a list of {role, content}; rows are chats then, and `text` is not read."""
    prompt: Annotated[str | None, Parameter(name="--data.prompt")] = None
    """Column of a user's message (or list of messages) that `completion` answers; rows are chats then."""
    completion: Annotated[str | None, Parameter(name="--data.completion")] = None
    """Column of the answer to `prompt`."""
    answers_only: Annotated[bool, Parameter(name="--data.answers_only")] = True
    """Whether only what the assistant writes is learnt from chats, its end of turn included."""
    template: Annotated[str | None, Parameter(name="--data.template")] = None
    """How chats are written: `chatml`, or a Jinja file; none = the chat template of the tokenizer."""
    split: Annotated[str, Parameter(name="--data.split")] = "train"
    """Split of an `hf:` dataset."""
    limit: Annotated[Size | None, Parameter(name="--data.limit")] = None
    """Rows taken of an `hf:` dataset; none = all."""

    @property
    def chat(self) -> bool:
        """Whether rows are chats."""
        return self.messages is not None or self.prompt is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        if self.messages is not None:
            return (self.messages,)
        if self.prompt is not None and self.completion is not None:
            return self.prompt, self.completion
        return (self.text,)

    def absolute(self) -> Self:
        """The same with full paths, since a run may be resumed from another folder."""
        template = self.template if self.template in (None, CHATML) else full(self.template)
        return self.model_copy(update={"source": full(self.source), "template": template})


def full(source: str) -> str:
    """A path made absolute; other names as they are."""
    if source == STDLIB:
        return source
    hub, path = (HUB, source.removeprefix(HUB)) if source.startswith(HUB) else ("", source)
    if hub and not path.startswith((".", "~", "/")):
        return source
    return hub + str(Path(path).expanduser().absolute())


class Mixed(Source):
    """A source of a mixture."""

    weight: Positive = 1.0
    """Its share of the tokens that are drawn, against the weights of the others."""


def problems(c: TrainConfig) -> list[Problem]:
    """What no single field of the sources shows."""
    out: list[Problem] = []
    data = c.data
    if data.mixture is not None and data.source != STDLIB:
        out.append(Problem("data.source", data.source, "contradicts data.mixture", "put it into the mixture"))
    if data.mixture is not None and data.validation_source is None:
        names = tuple(n for n in Source.model_fields if n != "source")
        out += unused("data", data, names, "is not that of a mixture's sources", "put it into each of data.mixture")
    if data.mixture == ():
        out.append(Problem("data.mixture", "[]", "names no source", "remove it, or list some"))
    every = (
        [("data", data)] if data.mixture is None else [(f"data.mixture[{n}]", m) for n, m in enumerate(data.mixture)]
    )
    for where, s in every:
        if (s.prompt is None) != (s.completion is None):
            missing = "prompt" if s.prompt is None else "completion"
            out.append(Problem(f"{where}.{missing}", None, "is missing", "prompt and completion go together"))
        if s.messages is not None and s.prompt is not None:
            out.append(Problem(f"{where}.messages", s.messages, f"contradicts prompt={s.prompt}", "name one of both"))
        if s.template is not None and not s.chat:
            out.append(Problem(f"{where}.template", s.template, "has no chats", "name the column with messages"))
        if not s.source.startswith(HUB):
            out += unused(where, s, ("limit", "split"), "is for hf: datasets", "remove it")
        if s.chat:
            out += unused(where, s, ("text",), "is not read, since rows are chats", "remove it")
    return out
