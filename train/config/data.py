"""The text, and how it becomes batches."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from spec.config import Model
from train.config.fields import Size


class Data(Model):
    """The text, and how it is cut into sequences."""

    source: Annotated[str, Parameter(name="--data")] = "stdlib"
    """A text file, a folder of text files, or `stdlib`: the Python standard library's own source."""
    length: Annotated[Size | None, Parameter(name="--data.length")] = None
    """Tokens in a sequence; none = the spec's context."""
    document_mask: Annotated[bool, Parameter(name="--data.document_mask")] = False
    """Whether documents packed into one sequence are hidden from each other, positions beginning anew in each."""
    validation: Annotated[Annotated[float, Field(ge=0, lt=1)], Parameter(name="--data.validation")] = 0.05
    """Share of the documents held out for validation, chosen by their hashes."""
    cache: Annotated[str | None, Parameter(name="--data.cache")] = None
    """Folder for tokenizers and tokenised text; none = the user's cache folder."""


class Batch(Model):
    """How many sequences an optimizer step sees, and how many at a time."""

    sequences: Size = 4
    """Sequences in an optimizer step, over all ranks."""
    micro: Size | None = None
    """Sequences in one forward pass on one rank; none = the rank's share of the step. Fewer accumulate gradients."""
