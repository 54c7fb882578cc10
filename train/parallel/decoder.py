"""A decoder as the ranks train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from backends.torch.model import Decoder
from backends.torch.modules import Block
from spec.config import Spec
from train.parallel.mesh import Ranks
from train.parallel.precision import convert_to_fp8
from train.parallel.shard import allocate, shard


def build(
    spec: Spec,
    ranks: Ranks,
    precision: str,
    wraps: Iterable[Callable[[Block], None]] = (),
    *,
    length: int,
    kernel: str = "auto",
    strict: bool = False,
    stages: list[range] | None = None,
    offload: bool = False,
) -> tuple[Decoder, list[str]]:
    """A decoder for sequences of `length` tokens, or this rank's of its `stages`, divided among the ranks; its weights
    have their memory and no values. And the names of linears that fp8 leaves in bfloat16.

    `wraps` are done to each block. `kernel` and `strict`: the attention kernel, and whether it must not fall back.
    """
    with torch.device("meta"):  # so that no rank ever has the whole model
        decoder = Decoder(spec, length=length, attention=kernel)
    decoder.strict = strict
    if stages is not None and len(stages) > 1:
        decoder.keep(stages[ranks.place("pp")])
    kept = convert_to_fp8(decoder) if precision == "fp8" else []
    shard(decoder, ranks, precision, wraps, offload=offload)
    allocate(decoder, ranks.device, offload=offload)
    return decoder, kept
