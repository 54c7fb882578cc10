"""The loss without the logits: a chunk of rows at a time is projected, scored and differentiated, then forgotten.

Gradients are taken chunk by chunk during the forward pass, so nothing is computed twice and only one chunk's logits
exist at a time (as in Hsu et al. 2024, Liger Kernel). N rows, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Targets with this value count nowhere."""

CHUNK_ELEMENTS = {"cpu": 2**20}
"""Logits that may exist at once, by device type: on a CPU what its caches hold; elsewhere 2^28, so that a GPU's matrix
products stay large."""

LEAST_ROWS = 256
"""Rows that are projected at once however large the vocabulary is: fewer would spend their time on adding up the
weight's gradients."""


Criterion = Callable[..., Tensor]
"""(logits [N, V], targets [N], *extras [N, ...]) -> summed loss of the valid targets."""

ChunkLogits = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(hidden states [N, D], weight [V, D], bias [V]) -> logits [N, V]."""


def rows_at_once(vocab: int, device: str) -> int:
    """Rows of a chunk, on a device of this type."""
    return max(LEAST_ROWS, CHUNK_ELEMENTS.get(device, 2**28) // vocab)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) in float32 (float64 for float64 logits) over the targets that are not `IGNORE`."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum")


def chunked_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Sequence[Tensor], logits: ChunkLogits, criterion: Criterion
) -> Tensor:
    """Summed loss of hidden states [N, D] against `rows` (targets [N] and what else the criterion reads, [N, ...]);
    differentiable once in x, weight and bias."""
    return _eager(x, weight, bias, rows, logits, criterion)


@torch.compiler.disable(reason="it takes gradients inside the forward pass")
def _eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Sequence[Tensor], logits: ChunkLogits, criterion: Criterion
) -> Tensor:
    size = rows_at_once(weight.shape[0], x.device.type)
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(x, weight, bias, rows, logits, criterion, size)  # type: ignore[no-any-return]
    return _total([criterion(logits(c, weight, bias), *r) for c, *r in _chunks(x, rows, size)], x)


def _chunks(x: Tensor, rows: Sequence[Tensor], size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(x.split(size), *(r.split(size) for r in rows), strict=True)) if len(x) else []


def _total(losses: list[Tensor], x: Tensor) -> Tensor:
    zero = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.stack(losses).sum() if losses else zero


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Sequence[Tensor],
        logits: ChunkLogits,
        criterion: Criterion,
        size: int,
    ) -> Tensor:
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        w = weight.detach().requires_grad_(need_w)
        b = None if bias is None else bias.detach().requires_grad_(need_b)
        losses: list[Tensor] = []
        grad_x: list[Tensor] = []
        sums: list[Tensor | None] = [None, None]
        for chunk, *row in _chunks(x, rows, size):
            h = chunk.detach().requires_grad_(need_x)
            wanted = [t for t, need in ((h, need_x), (w, need_w), (b, need_b)) if need and t is not None]
            with torch.enable_grad():
                loss = criterion(logits(h, w, b), *row)
            grads = iter(torch.autograd.grad(loss, wanted) if wanted else ())
            losses.append(loss.detach())
            if need_x:
                grad_x.append(next(grads))
            for n, need in enumerate((need_w, need_b)):
                if need:
                    sums[n] = _accumulate(sums[n], next(grads), last=len(losses) * size >= len(x))
        ctx.shape, ctx.dtypes = x.shape, (weight.dtype, bias.dtype if bias is not None else None)
        ctx.save_for_backward(torch.cat(grad_x) if grad_x else None, *sums)
        return _total(losses, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # in the wider of both: a 16-bit float would round 1 / (a step's tokens)
        grads = (None if g is None else (g.to(grad.dtype) * grad).to(g.dtype) for g in ctx.saved_tensors)
        return *grads, None, None, None, None


def _accumulate(total: Tensor | None, grad: Tensor, last: bool) -> Tensor:
    """Sum of the chunks' gradients, kept in at least float32 until the last one."""
    dtype = grad.dtype
    if total is None:
        return grad if last or dtype not in (torch.float16, torch.bfloat16) else grad.float()
    total += grad
    return total.to(dtype) if last else total
