"""The model that a distillation learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from backends.torch.model import Decoder
from spec.config import Spec
from spec.errors import UserError
from train.data.tokenizer import TextTokenizer, difference
from train.parallel import Ranks

if TYPE_CHECKING:
    from convert.sources import Source


def load(path: str, spec: Spec, tokenizer: TextTokenizer, length: int, dtype: torch.dtype, ranks: Ranks) -> Decoder:
    """A frozen decoder from a checkpoint of ours, a Hugging Face folder, a GGUF file, or hf:owner/name.

    Its layers are sharded over `dp`, as those of a trained model are; what is around them every rank has whole, since
    the loss projects with the head chunk by chunk. Raises `UserError` where it cannot be read, has other tokens than
    the run, or a shorter context than `length`.
    """
    from train.checkpoint.init import fill

    with opened(path) as source:
        fits(source, spec, length)
        _same_tokens(source, tokenizer)
        theirs = source.spec
    with torch.device("meta"):
        decoder = Decoder(theirs, length=length).to(dtype).requires_grad_(False)
    if ranks.degrees.dp > 1:
        _shard(decoder, ranks)
    decoder.to_empty(device=ranks.device)
    fill(decoder, path)
    return decoder.eval()


def opened(path: str) -> Source:
    """The teacher's source. Raises `UserError`."""
    from train.checkpoint import init

    return init.opened(path, "loss.teacher")


def fits(source: Source, spec: Spec, length: int) -> None:
    """Raise `UserError` where a teacher has other logits than `spec`, or a shorter context than `length`."""
    where, own = f"loss.teacher: {source.path}", source.spec.vocab_size
    if own != spec.vocab_size:
        raise UserError(f"{where} has {own} logits, and the spec has vocab_size {spec.vocab_size} (set it to {own})")
    if source.spec.context < length:
        raise UserError(f"{where} has a context of {source.spec.context} tokens, and sequences have {length} "
                        f"(data.length {source.spec.context})")  # fmt: skip


def _shard(decoder: Decoder, ranks: Ranks) -> None:
    from torch.distributed.fsdp import fully_shard

    assert ranks.mesh is not None, "several ranks"
    for block in decoder.layers:
        fully_shard(block, mesh=ranks.mesh["dp"], reshard_after_forward=True)


def _same_tokens(source: Source, tokenizer: TextTokenizer) -> None:
    where = f"loss.teacher: {source.path}"
    if source.tokenizer is None:
        raise UserError(f"{where} has no tokenizer to compare with the run's (put its tokenizer.json there)")
    if found := difference(source.tokenizer.json, tokenizer):
        raise UserError(f"{where} {found}; give the run the teacher's: --tokenizer {source.path}")
