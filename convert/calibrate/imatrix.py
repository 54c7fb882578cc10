"""Importance for a target's own types: what a calibration measured, or a file of llama.cpp's that somebody has.

Both say the same: for each matrix the mean square of each input channel, as llama.cpp computes it from sums and counts
in float32. So a conversion with `--calibrate` gives the bytes of one with the file that it wrote, and of llama.cpp's
own quantizer with that file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backends.base import Floats
from spec.config import Spec
from spec.errors import UserError
from spec.params import params

if TYPE_CHECKING:
    from convert.calibrate.store import Rounding

CHUNK = 512
"""Tokens that a file counts as one piece of text, as `llama-imatrix` does by default."""


@dataclass(frozen=True)
class Importance:
    """Mean squares of the inputs of matrices by canonical name."""

    means: Callable[[str], Floats | None]
    """[cols], or [experts, cols] with zeros for an expert that nothing is known of; none where nothing was measured."""
    counts: Callable[[str], NDArray[np.int64] | None]
    """Tokens: [1], or [experts]."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What a receipt says of a file; of a calibration it has its own record."""
    path: Path | None = None
    """That file."""

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Of these matrices those that nothing was measured for, and single experts as `NAME[expert]`."""
        out = []
        for name in names:
            counts = self.counts(name)
            if counts is None:
                out += [name] if self.means(name) is None else []
            elif not counts.any():
                out.append(name)
            else:
                out += [f"{name}[{i}]" for i in np.flatnonzero(counts == 0)]
        return out


def measured(rounding: Rounding) -> Importance:
    """What a calibration measured of the layers. Like `llama-imatrix` it leaves out the head, for which llama.cpp's
    mixtures have a type that gains nothing by it (measured: KL within half its standard error)."""

    def read_back(name: str) -> Floats | None:
        from backends.gguf.imatrix import means, sums

        if not name.startswith("layers."):
            return None
        found, counts = rounding.importance(name), rounding.counts(name)
        if found is None or counts is None or not counts.any():
            return None
        out = means(sums(np.atleast_2d(found), counts), counts)
        return out if found.ndim > 1 else out[0]

    return Importance(read_back, rounding.counts)


def open_imatrix(path: str | Path, spec: Spec) -> Importance:
    """A file of `llama-imatrix` (GGUF or .dat) or of ours, for a model. Raises `UserError` where it is none, damaged,
    or another model's."""
    from backends.gguf.imatrix import matched, read

    path = Path(path)
    if not path.is_file():
        raise UserError(f"--imatrix {path}: no such file")
    found = read(path)
    entries = matched(spec, found)
    single = {p.name: not p.name.rpartition(".experts.")[1] for p in params(spec)}

    def means(name: str) -> Floats | None:
        if name not in entries:
            return None
        out = found.means(entries[name])
        return out[0] if single[name] and len(out) == 1 else out.reshape(-1, _width(spec, name))

    def counts(name: str) -> NDArray[np.int64] | None:
        return found.counts(entries[name]) if name in entries else None

    for name in entries:
        means(name)  # numbers that are none are refused before any work
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    record = {"file": path.name, "hash": digest, "entries": len(found.entries), "chunks": found.chunks,
              "datasets": [Path(d).name for d in found.datasets]}  # fmt: skip
    return Importance(means, counts, record, path)


def _width(spec: Spec, name: str) -> int:
    return next(p.shape[-1] for p in params(spec) if p.name == name)


def export(path: Path, spec: Spec, rounding: Rounding) -> int:
    """Write what a calibration measured as llama.cpp's GGUF file, whole or not at all; returns its entries. Raises
    `UserError`."""
    from backends.gguf.imatrix import write

    partial = path.with_name(path.name + ".partial")
    tokens, text = int(rounding.record.get("tokens", 0)), str(rounding.record.get("text", ""))
    try:
        entries = write(
            partial, spec, rounding.importance, rounding.counts, datasets=(text,), tokens=tokens, chunk=CHUNK
        )
        partial.replace(path)
    except OSError as e:
        raise UserError(f"--imatrix-out {path}: {e.strerror}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return entries
