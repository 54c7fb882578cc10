"""Forward and backward passes: rows in, gradients on the parameters, summed losses out.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from backends.torch.loss import Criterion, cross_entropy_sum
from backends.torch.model import Decoder
from train import parallel
from train.data.batches import Rows
from train.parallel import Ranks
from train.parallel.pipeline import Stage


class Engine(Protocol):
    """What the loop asks of a model, whole or in stages. Losses are this rank's share: summed over all ranks, each
    target counts once."""

    def backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor:
        """Forward and backward over A passes; the losses' sum times `scale`."""
        ...

    def score(self, rows: Rows) -> Tensor:
        """The summed loss of one forward pass, without gradients."""
        ...


@dataclass
class Whole:
    """A decoder that this rank has from ids to loss, sharded or not."""

    decoder: Decoder
    ranks: Ranks
    precision: str
    criterion: Criterion = cross_entropy_sum

    def backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor:
        """Forward and backward over A passes; the losses' sum times `scale`."""
        total = torch.zeros((), device=self.ranks.device)
        for n, rows in enumerate(micro_batches, 1):
            parallel.accumulating(self.decoder, last=n == len(micro_batches))
            loss = self._loss(rows, self.criterion) * scale
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def score(self, rows: Rows) -> Tensor:
        """The summed cross-entropy of one forward pass, whatever is trained on."""
        loss = self._loss(rows, cross_entropy_sum)
        parallel.settle(self.decoder)
        return loss

    def _loss(self, rows: Rows, criterion: Criterion) -> Tensor:
        ids, targets, segments = rows.tensors(self.ranks.device)
        with parallel.autocast(self.ranks, self.precision):
            return self.decoder(ids, targets, segments=segments, criterion=criterion)


@dataclass
class Pipelined:
    """One stage of a decoder; every stage reads the same rows."""

    decoder: Decoder
    ranks: Ranks
    stage: Stage
    criterion: Criterion = cross_entropy_sum

    def backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor:
        """Forward and backward over A passes; the losses' sum times `scale`."""
        parts = [rows.tensors(self.ranks.device) for rows in micro_batches]
        ids, targets, segments = (None if t[0] is None else torch.cat(t) for t in zip(*parts, strict=True))
        assert ids is not None
        more = {"targets": targets, "segments": segments}
        return self.stage.train(len(parts), ids, scale, criterion=self.criterion, **more)

    @torch.no_grad()
    def score(self, rows: Rows) -> Tensor:
        """The summed cross-entropy of one forward pass, whatever is trained on."""
        ids, targets, segments = rows.tensors(self.ranks.device)
        loss = self.stage.score(ids, lambda x: self.decoder(x, targets, segments=segments))
        parallel.settle(self.decoder)
        return loss
