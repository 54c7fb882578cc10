"""Forward and backward passes: rows in, gradients on the parameters, summed losses out.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backends.torch.model import Decoder
from train import parallel
from train.data.batches import Rows
from train.losses.objective import Objective
from train.parallel import Ranks, Shapes
from train.parallel.pipeline import Stage


@dataclass
class Engine(ABC):
    """What the loop asks of a model, whole or in stages. Losses are this rank's share: summed over all ranks, each
    target counts once."""

    decoder: Decoder
    ranks: Ranks
    criterion: Objective = field(default_factory=Objective, kw_only=True)
    shapes: Shapes = field(default_factory=Shapes, kw_only=True)

    def backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor:
        """Forward and backward over A passes; the losses' sum times `scale`."""
        if self.decoder.balance is not None:  # the routers' own losses
            self.decoder.balance.scale.fill_(scale)
        return self._backward(micro_batches, scale)

    @torch.no_grad()
    def score(self, rows: Rows) -> Tensor:
        """The summed cross-entropy of one forward pass, whatever is trained on, without gradients."""
        loss = self._score(rows)
        parallel.settle(self.decoder)
        return loss

    @abstractmethod
    def _backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor: ...

    @abstractmethod
    def _score(self, rows: Rows) -> Tensor: ...

    def _stance(self, ids: Tensor, segments: Tensor | None) -> Any:
        """Around a pass over rows of this shape: compiled where it may be."""
        return self.shapes.stance(*ids.shape, segments is None, self.decoder.training)


@dataclass
class Whole(Engine):
    """A decoder that this rank has from ids to loss, sharded or not."""

    precision: str

    def _backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor:
        total = torch.zeros((), device=self.ranks.device)
        for n, rows in enumerate(micro_batches, 1):
            parallel.accumulating(self.decoder, last=n == len(micro_batches))
            loss = self._loss(rows, self.criterion) * scale
            loss.backward()
            total += loss.detach()
        return total

    def _score(self, rows: Rows) -> Tensor:
        return self._loss(rows, Objective())

    def _loss(self, rows: Rows, criterion: Objective) -> Tensor:
        ids, targets, segments = rows.tensors(self.ranks.device)
        with self._stance(ids, segments), parallel.autocast(self.ranks, self.precision):
            extras = criterion.extras(ids, segments)
            return self.decoder(ids, targets, segments=segments, criterion=criterion, extras=extras)


@dataclass
class Pipelined(Engine):
    """One stage of a decoder; every stage reads the same rows."""

    stage: Stage

    def _backward(self, micro_batches: Sequence[Rows], scale: float) -> Tensor:
        parts = [rows.tensors(self.ranks.device) for rows in micro_batches]
        ids, targets, segments = (None if t[0] is None else torch.cat(t) for t in zip(*parts, strict=True))
        assert ids is not None
        more: dict[str, Any] = {"targets": targets, "segments": segments}
        if self.decoder.ends:
            extras = [self.criterion.extras(i, s) for i, _, s in parts]
            more["extras"] = [torch.cat(e) for e in zip(*extras, strict=True)]
        with self._stance(ids, segments):
            return self.stage.train(len(parts), ids, scale, criterion=self.criterion, **more)

    def _score(self, rows: Rows) -> Tensor:
        ids, targets, segments = rows.tensors(self.ranks.device)
        with self._stance(ids, segments):
            return self.stage.score(ids, lambda x: self.decoder(x, targets, segments=segments))
