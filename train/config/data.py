"""The text, and how it becomes batches."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from cyclopts import Parameter
from pydantic import Field

from spec.config import Model
from train.config.fields import Count, Size
from train.config.sources import Mixed, Source, full


class Data(Source):
    """The text, and how it is cut into sequences."""

    mixture: Annotated[tuple[Mixed, ...] | None, Parameter(name="--data.mixture", parse=False)] = None
    """Several sources with weights, in a YAML file: a list of {source, weight, text, messages, ...} instead of
    `source`."""
    validation_source: Annotated[str | None, Parameter(name="--data.validation_source")] = None
    """A source of its own for validation, with the columns of `source`; nothing is held out of the others then."""
    length: Annotated[Size | None, Parameter(name="--data.length")] = None
    """Tokens in a sequence; none = the spec's context."""
    packing: Annotated[Literal["stream", "documents", "pad"], Parameter(name="--data.packing")] = "stream"
    """`stream`: documents one behind the other, cut at every `length` tokens. `documents`: whole documents, as many in
    a sequence as fit, hidden from each other. `pad`: one document a sequence. The last two cut only what is longer."""
    document_mask: Annotated[bool, Parameter(name="--data.document_mask")] = False
    """Whether documents in one sequence of a `stream` are hidden from each other, positions beginning anew in each."""
    prefetch: Annotated[Count | None, Parameter(name="--data.prefetch")] = None
    """Batches made ahead of their use, in the background; none = 2 on GPUs, 0 on CPUs, whose cores are busy anyway."""
    validation: Annotated[Annotated[float, Field(ge=0, lt=1)], Parameter(name="--data.validation")] = 0.05
    """Share of the documents held out for validation, chosen by their hashes."""
    cache: Annotated[str | None, Parameter(name="--data.cache")] = None
    """Folder for tokenizers and tokenised text; none = the user's cache folder."""
    workers: Annotated[Size | None, Parameter(name="--data.workers")] = None
    """Processes that tokenise; none = one a core. The tokens are the same with any number."""

    @property
    def sources(self) -> tuple[Mixed, ...]:
        """What is trained on: the mixture, or the one source with weight 1."""
        if self.mixture is not None:
            return self.mixture
        return (Mixed(**{name: getattr(self, name) for name in Source.model_fields}),)

    def absolute(self) -> Self:
        """The same with full paths, since a run may be resumed from another folder."""
        mixture = None if self.mixture is None else tuple(m.absolute() for m in self.mixture)
        held = None if self.validation_source is None else full(self.validation_source)
        return super().absolute().model_copy(update={"mixture": mixture, "validation_source": held})


class Batch(Model):
    """How many sequences an optimizer step sees, and how many at a time."""

    sequences: Size = 4
    """Sequences in an optimizer step, over all ranks."""
    micro: Size | None = None
    """Sequences in one forward pass on one rank; none = the rank's share of the step. Fewer accumulate gradients."""

    def at_once(self, shares: int) -> int:
        """Sequences of one forward pass, where `shares` ranks have other ones."""
        return self.micro or max(1, self.sequences // shares)

    def passes(self, shares: int) -> int:
        """Forward passes of a step."""
        return max(1, self.sequences // shares // self.at_once(shares))
