"""What transformers passes as attention_mask, position_ids and past_key_values, as a step of the shared forward pass.

Padding is a document of its own: key j is visible to query i iff both are tokens or both are padding, and j is not
later. Slots and positions count a row's tokens alone, so a padded row computes what the row alone would, wherever the
padding stands, windows and ALiBi included.

Shapes: B batch, T query, S key, G kv-heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from backends.torch.attention import Keys
from backends.torch.cache import visible
from spec.errors import UserError
from spec.ops import Step


@dataclass(frozen=True)
class Inputs:
    """One call's place in its sequences."""

    step: Step[Tensor]
    start: int
    """Columns already in the cache."""
    keys: Keys | None = None


def place(
    shape: tuple[int, int],
    device: torch.device,
    mask: Tensor | None,
    positions: Tensor | None,
    past: Cache | None,
    length: int,
) -> Inputs:
    """Read T = shape[1] new columns after those in `past`.

    mask [B, S] is 1 for tokens and 0 for padding, over the past's columns too. `positions` [B or 1, T] default to the
    place among the row's tokens; without a mask and a cache, where they do not go on by one another document begins
    (as in transformers). Raises `UserError` for other shapes, and beyond `length` tokens.
    """
    (batch, tokens), start = shape, 0 if past is None else int(past.get_seq_length())
    if positions is not None:
        if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != tokens:
            raise UserError(f"position_ids: shape {tuple(positions.shape)} is not [{batch}, {tokens}]")
        positions = positions.expand(batch, tokens)
    columns = torch.arange(start, start + tokens, device=device).expand(batch, tokens)
    if mask is None and past is None and positions is not None and restarts(positions):
        within(int(positions.max()), length)
        segments = torch.nn.functional.pad((positions[:, 1:] != positions[:, :-1] + 1).cumsum(1), (1, 0))
        return Inputs(Step("packed", positions, columns, segments), 0)
    if mask is not None:
        mask = _checked(mask, batch, start + tokens)
        if bool(mask.all()) or (past is None and bool((mask[:, 1:] <= mask[:, :-1]).all())):
            mask = None  # no padding, or only after the tokens, which see none of it
    if mask is None:
        within(start + tokens - 1 if positions is None else int(positions.max()), length)
        layout = "causal" if past is None else "cached"
        return Inputs(Step(layout, columns if positions is None else positions, columns), start)
    slots = (mask.cumsum(1) - 1).clamp(min=0)
    own, segments = slots[:, start:], mask[:, start:]
    positions = own if positions is None else positions
    within(int(positions.masked_fill(segments == 0, 0).max()), length)
    holes = bool(((mask[:, 1:] > mask[:, :-1]).sum(1) + mask[:, 0] > 1).any())
    if past is None and not holes:
        return Inputs(Step("packed", positions, own, segments), 0)
    return Inputs(Step("cached", positions, own, segments), start, Keys(slots, mask))  # a packed document is one run


def restarts(positions: Tensor) -> bool:
    """Whether positions [B, T] are those of several documents in a row."""
    return positions.dim() == 2 and bool((positions[:, 1:] != positions[:, :-1] + 1).any())


def within(position: int, length: int) -> None:
    """Raises `UserError` for a position beyond the declared length."""
    if position >= length:
        raise UserError(f"input_ids: {position + 1} tokens exceed the spec's context of {length}")


def _checked(mask: Tensor, batch: int, columns: int) -> Tensor:
    if mask.dim() != 2 or tuple(mask.shape) != (batch, columns):
        raise UserError(
            f"attention_mask: shape {tuple(mask.shape)} is not [{batch}, {columns}] (one column for each token of the "
            "cache and of input_ids; masks of queries by keys are not read)"
        )
    return (mask != 0).long()


class PastLayer:
    """One layer of a transformers cache, where the shared forward pass expects our own."""

    def __init__(self, past: Cache, layer: int, inputs: Inputs, window: int | None) -> None:
        self.past, self.layer, self.inputs, self.window = past, layer, inputs, window

    def store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append keys and values [B, G, T, K]; all that the plan's mask counts, and their columns."""
        k, v = self.past.update(k, v, self.layer)
        window = self.window if self.inputs.keys is None else None  # rows of a padded batch have other windows
        seen = visible(self.inputs.start, self.inputs.step.slots.shape[1], window)
        return k[:, :, seen.start : seen.stop], v[:, :, seen.start : seen.stop], torch.arange(0, device=k.device)


def past_layers(past: Cache, inputs: Inputs, windows: Sequence[int | None]) -> list[Any]:
    """Every layer of a cache. Raises `UserError` for one that drops keys."""
    sliding = [i for i, slides in enumerate(past.is_sliding) if slides]
    if sliding:
        raise UserError(f"past_key_values: layer {sliding[0]} slides (use a DynamicCache or StaticCache of this model)")
    return [PastLayer(past, i, inputs, w) for i, w in enumerate(windows)]
