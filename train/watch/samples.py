"""Texts that the model writes while it learns.

T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from backends.generate import generate
from backends.text import Text
from backends.torch.model import Decoder
from backends.torch.runtime import TorchRuntime
from spec.errors import UserError
from train import parallel
from train.config import Samples
from train.parallel import Ranks


class Writing(TorchRuntime):
    """A decoder in training as a runtime. All ranks call it alike, since each has a shard of the weights; rank 0's
    logits count everywhere, so that all choose the same tokens."""

    def __init__(self, decoder: Decoder, ranks: Ranks, text: Text, autocast: AbstractContextManager[Any]) -> None:
        super().__init__(decoder, text, "the model in training")
        self._ranks, self._autocast = ranks, autocast
        self.room = decoder.length
        """Tokens of the next sequence, at most: what its cache holds."""

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Start a new sequence: [T] -> [V] logits after the last token."""
        with self._autocast:
            logits, self._cache = self.decoder.prefill_cache(self._ids(ids, 1)[None], self.room)
        return self._shared(logits)[0]

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Continue it: [T] -> [1, V], the logits after the last token."""
        assert self._cache is not None, "prefill comes first"
        with self._autocast:
            logits = self.decoder.step(self._ids(ids, 1, self._cache.length)[None], self._cache, last=True)
        return self._shared(logits[0])

    def _shared(self, logits: Tensor) -> NDArray[np.float32]:
        logits = logits.float().contiguous()
        if self._ranks.world > 1:
            dist.broadcast(logits, 0)
        return logits.cpu().numpy()


class Sampler:
    """Continues the run's prompts."""

    def __init__(
        self,
        c: Samples,
        decoder: Decoder,
        ranks: Ranks,
        tokenizer: Text,
        begin: Sequence[int],
        autocast: AbstractContextManager[Any] | None = None,
    ) -> None:
        """`begin`: the ids with which a document begins, where a prompt is empty. Raises `UserError` for a prompt that
        leaves no room in the context."""
        self._c, self._decoder = c, decoder
        self._runtime = Writing(decoder, ranks, tokenizer, autocast or nullcontext())
        self._prompts = [(p, tokenizer.encode(p) if p else list(begin)) for p in c.prompts]
        for n, (prompt, ids) in enumerate(self._prompts):
            if not ids:
                raise UserError(f"samples.prompts[{n}]: {prompt!r} has no tokens (write a few words)")
            if len(ids) >= decoder.length:
                raise UserError(f"samples.prompts[{n}]: {len(ids)} tokens leave no room in {decoder.length}")

    def write(self) -> list[tuple[str, str]]:
        """Each prompt with what the model writes after it. All ranks take part; torch's generators stay untouched."""
        was = self._decoder.training, self._decoder.attention
        self._decoder.eval()
        self._decoder.attention = "auto"  # a kernel that was asked for is one for training, and may have no cache
        try:
            return [(prompt, self._continue(ids, n)) for n, (prompt, ids) in enumerate(self._prompts)]
        finally:
            self._decoder.train(was[0])
            self._decoder.attention = was[1]
            self._runtime.close()
            parallel.settle(self._decoder)

    def _continue(self, ids: list[int], n: int) -> str:
        c = self._c
        self._runtime.room = min(len(ids) + c.tokens, self._runtime.context)
        pieces = generate(self._runtime, ids, max_tokens=c.tokens, temperature=c.temperature, seed=c.seed + n)
        try:
            return "".join(pieces)
        except ArithmeticError:
            return "(no text: the model's logits are not numbers)"
