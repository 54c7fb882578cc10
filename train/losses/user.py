"""A loss from the user's own file, held to the contract before the run begins.

Shapes: N targets, V vocab.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from backends.torch.loss import IGNORE
from spec.errors import UserError
from train import plugins
from train.config.fields import file_of

Function = Callable[[Tensor, Tensor], Tensor]
CONTRACT = "a loss takes (logits [N, V], targets [N]) and returns the sum over the targets that are not -100"


def load(kind: str, vocab: int, device: torch.device) -> Function:
    """The function of `path/to/file.py:function`. Raises `UserError` where it is missing or is no loss."""
    function = plugins.load("loss.kind", kind)
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as e:
        raise UserError(f"loss.kind: {kind}{inspect.signature(function)} cannot be called: {e} ({CONTRACT})") from None
    _probe(kind, function, vocab, device)
    return function


def _probe(kind: str, function: Function, vocab: int, device: torch.device) -> None:
    """Hold a function to the contract on a few rows: a scalar that can be differentiated, a sum over rows (the head
    gives it chunks, and ranks have shares), to which masked targets add nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, vocab, generator=generator).to(device)
    targets = torch.tensor([vocab - 1, 0, IGNORE, vocab // 2], device=device)

    def call(*rows: int) -> float:
        chunk = logits[slice(*rows)].requires_grad_()
        try:
            loss = function(chunk, targets[slice(*rows)])
        except Exception as e:  # whatever the user's code raises
            where = plugins.place(e, Path(file_of(kind)))
            raise UserError(f"loss.kind: {where}: {type(e).__name__}: {e} ({CONTRACT})") from None
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            shown = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UserError(f"loss.kind: {kind} returned {shown}, no scalar tensor ({CONTRACT})")
        if not loss.requires_grad:
            raise UserError(f"loss.kind: {kind} returned a number that has no gradient ({CONTRACT})")
        return loss.item()

    whole, first, rest = call(0, 4), call(0, 2), call(2, 4)
    if not abs(whole - (first + rest)) <= 1e-4 * (abs(first) + abs(rest)):  # NaN is wrong too
        raise UserError(
            f"loss.kind: {kind} is no sum over targets: {whole:g} for four rows, {first:g} + {rest:g} for two and two "
            "(reduction='sum'; the trainer divides by the targets of the whole step)"
        )
    masked = call(2, 3)
    if masked != 0:
        raise UserError(f"loss.kind: {kind} gives {masked:g} for a masked target (-100), which must add nothing")
