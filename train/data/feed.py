"""Prepared tokens as the batches of a run, and what a run will see of them."""

from __future__ import annotations

from typing import Any

from spec.errors import UserError
from train.config import TrainConfig
from train.data.batches import Batches, DataState
from train.data.packing import Sequences
from train.data.store import TokenData
from train.parallel import Ranks

ORDER = 1
"""Version of the order of tokens: raise it when shuffle, packing or mixing change."""


def feed(c: TrainConfig, found: TokenData, length: int, ranks: Ranks) -> tuple[Batches, tuple[Sequences, ...]]:
    """The batches of a run, `length` tokens a sequence, and its validation sequences.

    Raises `UserError` for a source without anything to train on, and where ranks have found different text.
    """
    if len(set(ranks.gather(found.fingerprint))) > 1:
        raise UserError(
            "data: the ranks found different text or tokenizers (give all nodes the same files and --data.cache, and "
            "hf: datasets a @REVISION)"
        )
    how = found.eos, c.data.packing, c.data.document_mask
    sources = [Sequences(s, length, *how) for s in found.train]
    held_out = [Sequences(s, length, *how) for s in found.validation]

    def count(share: int) -> int:
        return round(ranks.sum(share)[0]) // ranks.degrees.readers

    prefetch = c.data.prefetch
    if prefetch is None:
        prefetch = 0 if ranks.device.type == "cpu" else 2
    batches = Batches(
        sources,
        DataState(_fingerprint(found, sources), seed=c.seed),
        found.weights,
        count if ranks.world > 1 else None,
        prefetch,
        ranks.device,
    )
    return batches, tuple(s for s in held_out if s.pieces)


def _fingerprint(found: TokenData, sources: list[Sequences]) -> dict[str, Any]:
    """All that the order depends on, beside the seed."""
    first, total = sources[0], sum(found.weights)
    out: dict[str, Any] = {
        "the data or the tokenizer": found.fingerprint,
        "data.length": first.length,
        "data.packing": first.packing,
        "data.document_mask": first.masked,
        "the version of the order": ORDER,
    }
    if len(sources) > 1:
        out["shares of data.mixture"] = [w / total for w in found.weights]  # not the names: folders may move
    return out


def outlook(batches: Batches, steps: int, total: int) -> list[str]:
    """What `steps` steps of `total` sequences will see of each source, a line each."""
    sources = [s.sequences for s in batches.sources]
    parts = [w * s.count / s.inputs for w, s in zip(batches.weights, sources, strict=True)]  # of the sequences
    out = []
    for s, weight, part in zip(sources, batches.weights, parts, strict=True):
        about = "about " if s.packing == "documents" else ""
        epochs = steps * total * part / sum(parts) / s.count
        full = "" if s.packing == "stream" else f", {s.inputs / s.count / s.length:.0%} full"
        name = f"{s.split.name}: {weight:.1%} of the tokens, " if len(sources) > 1 else ""
        if s.split.mask is not None and (longer := s.longer):
            out.append(
                f"{s.split.name}: {longer:,} of {s.split.documents:,} chats are longer than {s.length} tokens, and are "
                "cut: answers behind the cut are learnt without what was said before (raise data.length)"
            )
        out.append(f"{name}{about}{epochs:.2f} epochs of {about}{s.count:,.0f} sequences ({s.packing}{full})")
    return out
