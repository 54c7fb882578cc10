"""Text generation over any runtime: sampling in NumPy, so that one seed gives one text wherever the logits agree.

V vocab.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from backends.base import Runtime
from spec.errors import UserError

Logits = NDArray[np.float64]

TAIL = 8
"""Tokens before a new one that are decoded with it: some tokenizers drop a space at the beginning of what they see."""


def generate(
    runtime: Runtime,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    on_token: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Continue a prompt, piece by piece of whole UTF-8 characters.

    It ends after `max_tokens` tokens, at an end-of-sequence token, at the end of the context, or before a stop string,
    of which nothing is ever yielded. Temperature 0 is greedy. `seed` makes it repeatable. `on_token` hears every token
    as it is chosen, the end-of-sequence token included. A character left incomplete at the end is dropped.

    Raises `UserError` at once for settings out of range and for a prompt that is empty or fills the context.
    """
    sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if max_tokens < 0:
        raise UserError(f"max_tokens={max_tokens}: must not be negative")
    if not len(prompt_ids):
        raise UserError("prompt: has no tokens (write a few words)")
    if len(prompt_ids) >= runtime.context:
        raise UserError(f"prompt: {len(prompt_ids)} tokens leave no room in a context of {runtime.context}")
    if any(not s for s in stop):
        raise UserError("stop: an empty string would stop everything")
    return _pieces(runtime, list(prompt_ids), max_tokens, sampler, stop, on_token)


def _pieces(
    runtime: Runtime,
    ids: list[int],
    max_tokens: int,
    sampler: Sampler,
    stop: Sequence[str],
    on_token: Callable[[int], None] | None,
) -> Iterator[str]:
    held = Held(stop)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    end = min(len(ids) + max_tokens, runtime.context)
    prompt = len(ids)
    while len(ids) < end:
        logits = runtime.prefill(np.array(ids)) if len(ids) == prompt else runtime.step(np.array(ids[-1:]))[-1]
        token = sampler(logits, ids)
        if on_token is not None:
            on_token(token)
        if token in runtime.eos_ids:
            break
        tail = ids[-TAIL:]
        ids.append(token)
        piece = held.push(utf8.decode(runtime.decode([*tail, token])[len(runtime.decode(tail)) :]))
        if piece:
            yield piece
        if held.stopped:
            return
    if rest := held.flush():
        yield rest


class Sampler:
    """Chooses a token: repetition penalty, temperature, top-k, top-p, min-p, in this order, then a draw."""

    def __init__(
        self,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        rules = [
            ("temperature", temperature, temperature >= 0 and np.isfinite(temperature), "must be 0 or more"),
            ("top_k", top_k, top_k >= 0, "must be 0 (off) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", min_p, 0 <= min_p <= 1, "must be between 0 and 1"),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "must be above 0 (1 is off)"),
            ("seed", seed, seed is None or seed >= 0, "must be 0 or more"),
        ]
        for name, value, holds, rule in rules:
            if not holds:
                raise UserError(f"{name}={value}: {rule}")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty = repetition_penalty
        self._rng = np.random.default_rng(seed)

    def __call__(self, logits: NDArray[np.floating], ids: Sequence[int]) -> int:
        """A token from [V] logits, given the ids so far."""
        x = np.array(logits, dtype=np.float64)
        if np.isnan(x).any():
            raise ArithmeticError("the model's logits are not numbers")
        if self.repetition_penalty != 1:
            x = repeat_less(x, ids, self.repetition_penalty)
        if self.temperature < 1e-6:  # the limit, where a division would overflow
            return int(x.argmax())
        p = self.probabilities(x)
        return int(np.searchsorted(np.cumsum(p), self._rng.random() * p.sum(), side="right").clip(max=len(p) - 1))

    def probabilities(self, x: Logits) -> Logits:
        """[V] logits to the [V] probabilities that are drawn from."""
        x = x / self.temperature
        if 0 < self.top_k < len(x):
            kept = np.argsort(-x, kind="stable")[: self.top_k]
            x = np.where(np.isin(np.arange(len(x)), kept), x, -np.inf)
        p = _softmax(x)
        if self.top_p < 1:
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]  # the token that crosses the threshold stays
            p[order[before >= self.top_p]] = 0
        if self.min_p > 0:
            p[p < self.min_p * p.max()] = 0
        return p / p.sum()


def repeat_less(x: Logits, ids: Sequence[int], penalty: float) -> Logits:
    """Logits of tokens that have occurred, divided by the penalty if positive and multiplied if not (Keskar et al.
    2019, CTRL)."""
    seen = np.unique(np.asarray(ids, dtype=np.int64))
    seen = seen[seen < len(x)]
    x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    return x


def _softmax(x: Logits) -> Logits:
    e = np.exp(x - x.max())
    return e / e.sum()


class Held:
    """Holds back text that may be the beginning of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._text = tuple(stop), ""
        self.stopped = False

    def push(self, text: str) -> str:
        """More text; what may be shown of all that there is."""
        self._text += text
        found = [at for s in self._stop if (at := self._text.find(s)) >= 0]
        if found:
            self.stopped = True
            shown, self._text = self._text[: min(found)], ""
            return shown
        keep = max((n for s in self._stop for n in range(1, len(s)) if self._text.endswith(s[:n])), default=0)
        cut = len(self._text) - keep
        shown, self._text = self._text[:cut], self._text[cut:]
        return shown

    def flush(self) -> str:
        """The rest, at the end."""
        shown, self._text = self._text, ""
        return shown
