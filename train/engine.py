"""Forward and backward passes: rows in, gradients on the parameters, summed losses out.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from backends.torch.model import Decoder
from train import parallel
from train.data.batches import Rows
from train.losses.objective import Objective
from train.parallel import Ranks, Shapes
from train.parallel.pipeline import Stage


def scaled_by(decoder: Decoder, scale: float) -> None:
    """Let the routers' own losses be multiplied by what the loss is multiplied by."""
    if decoder.balance is not None:
        decoder.balance.scale.fill_(scale)


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
    criterion: Objective = field(default_factory=Objective)
    shapes: Shapes = field(default_factory=Shapes)

    def backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor:
        """Forward and backward over A passes; the losses' sum times `scale`."""
        scaled_by(self.decoder, scale)
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
        loss = self._loss(rows, Objective())
        parallel.settle(self.decoder)
        return loss

    def _loss(self, rows: Rows, criterion: Objective) -> Tensor:
        ids, targets, segments = rows.tensors(self.ranks.device)
        compiled = self.shapes.stance(*ids.shape, segments is None, self.decoder.training)
        with compiled, parallel.autocast(self.ranks, self.precision):
            extras = criterion.extras(ids, segments)
            return self.decoder(ids, targets, segments=segments, criterion=criterion, extras=extras)


@dataclass
class Pipelined:
    """One stage of a decoder; every stage reads the same rows."""

    decoder: Decoder
    ranks: Ranks
    stage: Stage
    criterion: Objective = field(default_factory=Objective)
    shapes: Shapes = field(default_factory=Shapes)

    def backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor:
        """Forward and backward over A passes; the losses' sum times `scale`."""
        scaled_by(self.decoder, scale)
        parts = [rows.tensors(self.ranks.device) for rows in micro_batches]
        ids, targets, segments = (None if t[0] is None else torch.cat(t) for t in zip(*parts, strict=True))
        assert ids is not None
        more: dict[str, Any] = {"targets": targets, "segments": segments}
        if self.decoder.ends:
            extras = [self.criterion.extras(i, s) for i, _, s in parts]
            more["extras"] = [torch.cat(e) for e in zip(*extras, strict=True)]
        with self.shapes.stance(*ids.shape, segments is None, self.decoder.training):
            return self.stage.train(len(parts), ids, scale, criterion=self.criterion, **more)

    @torch.no_grad()
    def score(self, rows: Rows) -> Tensor:
        """The summed cross-entropy of one forward pass, whatever is trained on."""
        ids, targets, segments = rows.tensors(self.ranks.device)
        with self.shapes.stance(*ids.shape, segments is None, self.decoder.training):
            loss = self.stage.score(ids, lambda x: self.decoder(x, targets, segments=segments))
        parallel.settle(self.decoder)
        return loss
