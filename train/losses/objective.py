"""What is minimised, as a criterion of the head's chunked loss: it sees a chunk of logits at a time, never all.

Every loss here is a sum over the targets that count; the trainer divides it by how many the whole step has.
Shapes: N targets of a chunk, V vocab, B sequences, T tokens, D the teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backends.torch.loss import IGNORE, cross_entropy_sum
from backends.torch.model import Decoder
from backends.torch.ops import TorchOps
from spec import forward
from train.config import Loss


def widened(logits: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def counted(losses: Tensor, targets: Tensor) -> Tensor:
    """Sum of [N] losses over the targets that count."""
    return losses.where(targets != IGNORE, 0).sum()


class Objective:
    """A criterion of `Decoder.forward` that also remembers, on the device, the sums of what it reports apart."""

    parts: tuple[str, ...] = ()
    """What `take` gives, in this order."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(len(self.parts), device=device)

    def __call__(self, logits: Tensor, targets: Tensor, *extras: Tensor) -> Tensor:
        """The summed loss of logits [N, V] against targets [N]: plain cross-entropy."""
        return cross_entropy_sum(logits, targets)

    def extras(self, ids: Tensor, segments: Tensor | None) -> tuple[Tensor, ...]:
        """What else the criterion reads of ids [B, T], each [B, T, ...]; computed once a forward pass."""
        return ()

    def take(self) -> Tensor:
        """This rank's sums of `parts` since they were taken last."""
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        return taken

    def _note(self, *sums: Tensor) -> None:
        self._sums += torch.stack(sums).detach()


class Smoothed(Objective):
    """Cross-entropy with the target's probability partly spread over the vocabulary, plus z * log(Z)^2."""

    parts = ("cross_entropy",)

    def __init__(self, device: torch.device | str, smoothing: float, z: float) -> None:
        super().__init__(device)
        self.smoothing, self.z = smoothing, z

    def __call__(self, logits: Tensor, targets: Tensor, *extras: Tensor) -> Tensor:
        """The summed loss of logits [N, V] against targets [N]."""
        loss, plain = _Smoothed.apply(widened(logits), targets, self.smoothing, self.z)  # type: ignore[misc]
        self._note(plain)
        return loss


class _Smoothed(torch.autograd.Function):
    """Sums of (1 - s) CE + s mean_v(log Z - logits_v) + z (log Z)^2 and of CE = log Z - logits_target. The gradient is
    written out, since that is one array of the logits' size rather than five: as fast as plain cross-entropy."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, targets: Tensor, s: float, z: float) -> tuple[Tensor, Tensor]:
        log_z, at = wide.logsumexp(-1), targets.clamp(min=0)[:, None]
        plain = log_z - wide.gather(-1, at)[:, 0]
        loss = plain + z * log_z.square()
        if s:
            loss += s * (log_z - wide.mean(-1) - plain)
        ctx.save_for_backward(wide, log_z[:, None], at, targets != IGNORE)
        ctx.s, ctx.z = s, z
        return counted(loss, targets), counted(plain, targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wide, log_z, at, counts = ctx.saved_tensors
        each = (grad * counts)[:, None]
        p = (wide - log_z).exp_().mul_(each * (1 + 2 * ctx.z * log_z))
        if ctx.s:
            p -= each * (ctx.s / wide.shape[-1])
        return p.scatter_add_(-1, at, (ctx.s - 1) * each), None, None, None


class Written(Objective):
    """A function of the user's."""

    parts = ("cross_entropy",)

    def __init__(self, device: torch.device | str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(device)
        self.function = function

    def __call__(self, logits: Tensor, targets: Tensor, *extras: Tensor) -> Tensor:
        """The summed loss of logits [N, V] against targets [N]."""
        self._note(cross_entropy_sum(logits.detach(), targets))
        return self.function(widened(logits), targets)


class Distilled(Objective):
    """T^2 * KL between the teacher's and the student's distributions at temperature T (Hinton et al. 2015), plus
    the loss of the text. The teacher's hidden states are the extras; its logits exist a chunk at a time too. Stages of
    a pipeline that compute no loss have no teacher."""

    parts = ("cross_entropy", "divergence")

    def __init__(self, device: torch.device | str, text: Objective, teacher: Decoder | None, config: Loss) -> None:
        super().__init__(device)
        self.text, self.teacher, self.weight = text, teacher, config.text_weight
        self.temperature, self.reverse = config.temperature, config.divergence == "reverse"
        self._ops = TorchOps([])

    def __call__(self, logits: Tensor, targets: Tensor, *extras: Tensor) -> Tensor:
        """The summed loss of logits [N, V] against targets [N] and the teacher's hidden states [N, D]."""
        assert self.teacher is not None, "the stage that computes the loss has it"
        with torch.no_grad():
            taught = forward.logits(self._ops, self.teacher.spec, self.teacher, extras[0])
        theirs, ours = ((widened(t) / self.temperature).log_softmax(-1) for t in (taught, logits))
        of, to = (ours, theirs) if self.reverse else (theirs, ours)
        divergence = counted((of.exp() * (of - to)).sum(-1), targets) * self.temperature**2
        if not self.weight:
            self._note(cross_entropy_sum(logits.detach(), targets), divergence)
            return divergence
        text = self.text(logits, targets)
        plain = self.text.take()[0] if self.text.parts else text
        self._note(plain, divergence)
        return divergence + self.weight * text

    @torch.no_grad()
    def extras(self, ids: Tensor, segments: Tensor | None) -> tuple[Tensor, ...]:
        """The teacher's hidden states [B, T, D]."""
        return () if self.teacher is None else (self.teacher(ids, segments=segments, hidden=True),)
