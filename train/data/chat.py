"""Chats: written by a chat template, and which of their tokens the assistant wrote, exactly.

A template marks the assistant's text itself (`{% generation %}`), or its text is found by rendering the chat up to
each of its turns: what follows the generation prompt, up to the end of the turn. Where neither tells, the row is
refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spec.errors import MissingDependency, UserError
from train.config.sources import CHATML, Source
from train.data.document import Message
from train.data.tokenizer import TextTokenizer

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's ChatML, every message alike."""

BEGIN, END = "\x00generation>", "\x00<generation"
"""Around what a template marks; refused in messages."""
PROBE = "\ue000"
"""In the place of a message, to see where it goes; of Unicode's private use."""

Span = tuple[int, int]


class Unfit(ValueError):
    """A chat that can't be learnt exactly. Real data has some: they are left out, and counted by this reason."""


def template_of(source: Source, tokenizer: TextTokenizer) -> str:
    """The template that a source's chats are written with. Raises `UserError` where there is none."""
    if source.template is None:
        if tokenizer.template is None:
            raise UserError(
                f"{source.source}: the tokenizer has no chat template (--data.template chatml, or a Jinja file)"
            )
        return tokenizer.template
    if source.template == CHATML:
        lacking = [t for t in CHATML_TOKENS if tokenizer.fast.token_to_id(t) is None]
        if lacking:
            raise UserError(f"--data.template chatml: the tokenizer has no token {lacking[0]} (use its own template)")
        return CHATML_TEMPLATE
    try:
        return Path(source.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        what = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise UserError(f"--data.template {source.template}: {what} (chatml, or a Jinja file)") from None


@dataclass(frozen=True)
class Chats:
    """Chats to ids, and which of those count as targets."""

    template: str
    tokenizer: TextTokenizer
    answers_only: bool

    def encode(self, messages: Sequence[Message]) -> tuple[str, list[int], NDArray[np.bool_] | None]:
        """A chat as text, ids, and the mask of its targets (none: all count). Raises `ValueError` saying why not, an
        `Unfit` one where others of the same data may do."""
        if "tool_calls" not in self.template and any("tool_calls" in m for m in messages):
            raise Unfit("the chat template does not write their tool calls")
        text = self.render(messages)
        encoding = self.tokenizer.marked.encode(text, add_special_tokens=False)
        if not self.answers_only:
            return text, encoding.ids, None
        spans = self.spans(messages, text)
        if not spans:
            raise ValueError("nothing in it is written by an assistant (answers_only: false in YAML learns from all)")
        return text, encoding.ids, self._mask(text, encoding, spans)

    def render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The chat as its template writes it, with the beginning of an answer if `prompt`."""
        return _unmarked(self._rendered(messages, prompt))[0]

    def spans(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Characters that the assistant writes: each answer with the end of its turn."""
        if self._marks:
            found = _unmarked(self._rendered(messages))[1]
        else:
            turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
            found = [self._turn(messages, n, text) for n in turns]
        return [self._trimmed(text, span) for span in found]

    @cached_property
    def _marks(self) -> bool:
        return re.search(r"{%-?\s*generation\b", self.template) is not None

    @cached_property
    def _compiled(self) -> Any:
        jinja = environment()
        try:
            return jinja.from_string(self.template)
        except Exception as e:  # also RecursionError, and what extensions raise
            raise UserError(f"the chat template does not parse: {' '.join(str(e).split())[:200]}") from None

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        tokens = self.tokenizer.marked.get_added_tokens_decoder().values()
        contents = sorted((t.content for t in tokens if t.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    def _rendered(self, messages: Sequence[Message], prompt: bool = False) -> str:
        if self._marks and any(_holds(m, "\x00") for m in messages):
            raise ValueError("a message contains a zero character, which the marks of answers are made of")
        names = self.tokenizer.special_names
        try:
            return self._compiled.render(messages=messages, add_generation_prompt=prompt, **names)
        except UserError:
            raise
        except Exception as e:  # a template may raise anything
            raise ValueError(f"the chat template refuses it: {' '.join(str(e).split())[:200]}") from None

    def _turn(self, messages: Sequence[Message], n: int, text: str) -> Span:
        """What answer `n` is in the whole text: behind the prompt for it, up to where the chat would end with it."""
        start = self._prefix(messages[:n], text, prompt=True)
        stop = self._prefix(messages[: n + 1], text, prompt=False)
        if start is None or stop is None or start >= stop:
            first, last = self._placed(messages, n, text)
            start = first if start is None or start > first else start
            stop = last if stop is None or stop <= start else stop
        return start, stop

    def _prefix(self, messages: Sequence[Message], text: str, prompt: bool) -> int | None:
        """Length of the chat's beginning, if the whole text begins with it."""
        try:
            rendered = self.render(messages, prompt)
        except ValueError:
            return None
        return len(rendered) if text.startswith(rendered) else None

    def _placed(self, messages: Sequence[Message], n: int, text: str) -> Span:
        """The place of answer `n`'s content, found by putting something else there, and the end of turn behind it."""
        content = messages[n]["content"]
        probed = self.render([*messages[:n], {**messages[n], "content": PROBE}, *messages[n + 1 :]])
        before, found, behind = probed.partition(PROBE)
        inner = text[len(before) : len(text) - len(behind)]
        told = (
            bool(found)
            and PROBE not in behind
            and text == before + inner + behind
            and isinstance(content, str)
            and bool(inner.strip())
            and inner.strip() in content
        )
        turn = self._specials.match(behind, len(behind) - len(behind.lstrip())) if told else None
        if turn is None:
            raise ValueError(f"the chat template does not tell where message {n}, an answer, begins and ends")
        return len(before), len(before) + len(inner) + turn.end()

    def _trimmed(self, text: str, span: Span) -> Span:
        """Without the space that a template writes behind the end of a turn: nobody generates it."""
        start, stop = span
        last = max((m.end() for m in self._specials.finditer(text, start, stop)), default=None)
        return (start, last) if last is not None and not text[last:stop].strip() else span

    def _mask(self, text: str, encoding: Any, spans: Sequence[Span]) -> NDArray[np.bool_]:
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        begins, ends = offsets[:, 0], offsets[:, 1]
        mask = np.zeros(len(offsets), np.bool_)
        for span in spans:
            mask |= (begins >= span[0]) & (begins < span[1])
            for edge in span:
                for token in np.flatnonzero((begins < edge) & (ends > edge)):
                    self._whole(text, encoding, int(token), edge)
        return mask

    def _whole(self, text: str, encoding: Any, token: int, edge: int) -> None:
        """A token across an edge is refused, but for a special one that swallows the space around it."""
        begin, end = encoding.offsets[token]
        inside = self._specials.search(text, begin, end)
        if inside is None or inside.start() < edge < inside.end():
            raise Unfit("a token lies across the edge of an answer (which begins or ends with space?)")


def _unmarked(rendered: str) -> tuple[str, list[Span]]:
    """The text without marks, and the spans that were marked."""
    if BEGIN not in rendered:
        return rendered, []
    out, spans, length = [], [], 0
    for n, piece in enumerate(re.split(f"{re.escape(BEGIN)}|{re.escape(END)}", rendered)):
        if n % 2:
            spans.append((length, length + len(piece)))
        out.append(piece)
        length += len(piece)
    return "".join(out), [s for s in spans if s[0] < s[1]]


def _holds(value: Any, mark: str) -> bool:
    """Whether a text anywhere in a message contains it."""
    if isinstance(value, str):
        return mark in value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(_holds(v, mark) for v in inner)


def environment() -> Any:
    """Jinja as transformers runs templates: without access to Python's insides. `strftime_now` is missing on purpose:
    what is learnt does not depend on the day (templates have a date of their own for that)."""
    try:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingDependency("chats need jinja2: pip install 'allotrope[train]'") from None

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (the class's own protocol)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return BEGIN + caller() + END

    def refuse(message: str) -> Any:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"] = tojson
    jinja.globals["raise_exception"] = refuse
    return jinja


def plain(messages: Sequence[Message]) -> str:
    """What is said, to train a tokenizer on."""
    return "\n".join(str(m["content"]) for m in messages)


__all__ = ["CHATML_TOKENS", "Chats", "Unfit", "environment", "plain", "template_of"]
