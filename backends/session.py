"""What runtimes with a tokenizer.json beside them share: checked ids, text in and out, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from backends.text import Text
from spec.errors import UserError, nearest


class Session:
    """A base for `backends.base.Runtime`.

    name: what errors call the artifact. context: tokens of the longest sequence; longest: what the model would allow.
    """

    def __init__(
        self, name: object, text: Text | None, vocab_size: int, context: int, longest: int | None = None
    ) -> None:
        self.name, self.text, self._vocab_size = str(name), text, vocab_size
        self._context, self._longest = context, longest or context

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._vocab_size

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self._context

    def checked(self, ids: NDArray[np.integer], dims: int, used: int = 0) -> NDArray[np.int64]:
        """[T] (dims 1) or [B, T] (dims 2) ids that come after `used` others. Raises `UserError` for another shape, ids
        outside the vocabulary, and more tokens than the session takes."""
        array = np.asarray(ids)
        if array.ndim != dims or not array.size:
            raise UserError(f"ids: shape {list(array.shape)}, and {'[B, T]' if dims == 2 else '[T]'} is needed")
        if array.min() < 0 or array.max() >= self.vocab_size:
            raise UserError(f"ids: {array.min()}..{array.max()} reach beyond the vocabulary of {self.vocab_size}")
        total = used + array.shape[-1]
        if total > self.context:
            hint = " (ask for a longer context)" if self.context < self._longest else ""
            raise UserError(f"{total} tokens exceed the session's context of {self.context}{hint}")
        return array.astype(np.int64)

    def encode(self, text: str) -> list[int]:
        """Text to ids, special tokens and BOS policy included."""
        return self._words.encode(text)

    def decode(self, ids: Sequence[int]) -> bytes:
        """Ids to bytes, special tokens left out."""
        return self._words.decode(ids)

    @property
    def _words(self) -> Text:
        if self.text is None:
            raise UserError(f"{self.name}: has no tokenizer.json, so it can neither read nor write text")
        return self.text

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end generation."""
        return self.text.eos_ids if self.text is not None else frozenset()

    def close(self) -> None:
        """Let go of everything."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


NOT_BEGUN = "step: there is no sequence to continue (call prefill first)"


def session_length(context: int | None, longest: int, threads: int | None = None) -> int:
    """Tokens of a session: what was asked for, or all that the model allows. Raises `UserError`."""
    if context is not None and not 1 <= context <= longest:
        raise UserError(f"context={context}: must be between 1 and the model's {longest} tokens")
    if threads is not None and threads < 1:
        raise UserError(f"threads={threads}: must be at least 1")
    return context or longest


def cache_types(asked: str, known: Sequence[str]) -> tuple[str, str]:
    """Types of keys and of values for `cache="TYPE"` or `cache="KEYS/VALUES"`. Raises `UserError`."""
    both = asked.lower().split("/")
    for name in both:
        if name not in known:
            raise UserError(f"cache={asked!r}: {name or 'nothing'} is no type of cache here ({nearest(name, known)})")
    if len(both) > 2:
        raise UserError(f"cache={asked!r}: names more than two types (TYPE, or KEYS/VALUES such as q8/q4)")
    return both[0], both[-1]


def exact_cache(asked: str | None, exact: bool) -> None:
    """Raises `UserError` where a cache is asked for together with float32 throughout."""
    if exact and asked is not None:
        raise UserError(f"cache={asked!r}: exact is float32 throughout, its cache too (leave one of them out)")
