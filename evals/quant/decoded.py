"""Weights as written files hold them: what every variant ends as, and what the one forward reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Floats, QuantizedTensor
from spec.config import Spec
from spec.params import params


class Unavailable(Exception):
    """A variant cannot be made here; the message says why, in one line."""


@dataclass(frozen=True)
class Job:
    """What makes a variant, and where."""

    source: Path
    folder: Path
    """For its files alone."""
    shared: Path
    """For what several variants start from: the original in a format that a tool reads."""
    ids: Path | None
    """Calibration tokens [N, T] (.npy), for those that calibrate."""
    text: str
    """The text that these come from: a file, or `stdlib`."""
    threads: int | None


@dataclass(frozen=True)
class Decoded:
    """One model, dequantized a tensor at a time; the part of a source that `evals.reference.forward` reads."""

    spec: Spec
    fetch: Callable[[str], Any]
    """A canonical tensor, whole, as float32 (or codes and scales)."""
    bits: float
    """Stored bits per weight over all matrices, scales and zero points counted."""
    file_bits: float
    """Bits in the file for each weight."""
    note: str = ""

    def names(self) -> list[str]:
        """Canonical names, in canonical order."""
        return [p.name for p in params(self.spec)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a canonical tensor."""
        return next(p.shape for p in params(self.spec) if p.name == name)

    def tensor(self, name: str) -> Floats:
        """A whole tensor. Raises `ArithmeticError` where it is not finite."""
        found = self.fetch(name)
        values = np.asarray(found.dequantize() if isinstance(found, QuantizedTensor) else found, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ArithmeticError(f"{name}: {int((~np.isfinite(values)).sum())} weights are not finite")
        return values

    def blocks(self, name: str, rows: int | None = None) -> Iterator[tuple[int, Floats]]:
        """(first row, rows) of a tensor."""
        whole = self.tensor(name)
        step = rows or max(1, len(whole))
        for start in range(0, len(whole), step):
            yield start, whole[start : start + step]


def matrices(spec: Spec) -> dict[str, int]:
    """Sizes of what quantization applies to, by canonical name."""
    return {p.name: p.size for p in params(spec) if p.matrix}


def weights(spec: Spec) -> int:
    """All weights of a model."""
    return sum(p.size for p in params(spec))
