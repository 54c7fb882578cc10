"""The first check: what the artifact holds is the canonical rounding of the source, bit for bit.

Every stored tensor is decoded from the file. Portable levels are compared with `convert.quantize` on the source's
rows, float levels with the exact rounding, native types with the format's own quantizer. Small models are compared
whole; of large ones a seeded sample of row blocks of every tensor (rounding is the slow part), and then the hashes in
the receipt, made from what was quantized, cover the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.base import QuantizedTensor, Values
from convert.quantize import quantize
from convert.verify.emulate import to_bf16, to_f16
from convert.verify.report import Check, Status
from spec.params import params

Array = NDArray[Any]

BUDGET = 96_000_000
"""Weights that are rounded again; models up to this size are compared whole."""
BLOCK = 1 << 20
"""Weights in one block of rows."""

FLOATS = {"f32": lambda x: x.astype(np.float32), "f16": to_f16, "bf16": to_bf16}
"""Portable float levels."""
BITS = {"q8": 8, "q4": 4}
"""Portable quantized levels."""


class Stored(Protocol):
    """An artifact's weights in canonical names, rows and units: folds and permutations undone."""

    def level(self, name: str) -> str:
        """How a tensor is stored: a portable level, or a native type by its own name."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Decoded rows; a vector is one row block."""
        ...

    def native(self, name: str, start: int, block: Array) -> Array:
        """What the format's own quantizer makes of float32 rows of the source that begin at `start`, dequantized."""
        ...

    def planned(self) -> Mapping[str, str]:
        """The level each tensor should have, by the recipe."""
        ...

    def hashes(self) -> Mapping[str, str]:
        """Content hashes of the receipt by canonical name; empty where there are none."""
        ...

    def content_hash(self, name: str) -> str:
        """The content hash of the tensor as it is stored."""
        ...


@dataclass
class _Tally:
    weights: int = 0
    compared: int = 0
    wrong: dict[str, str] = field(default_factory=dict)

    def differs(self, name: str, how: str) -> None:
        self.wrong.setdefault(name, how)


def check_packing(stored: Stored, source: Any) -> Check:
    """Compare every tensor of the artifact with the canonical rounding of the source.

    source: as `convert.sources.open_source` returns it.
    """
    tally = _Tally()
    plan, hashes = stored.planned(), stored.hashes()
    matrices = sum(p.size for p in params(source.spec))
    share = min(1.0, BUDGET / max(1, matrices))
    hashed = 0
    for p in params(source.spec):
        tally.weights += p.size
        kept, want = stored.level(p.name), plan[p.name]
        if kept != want:
            tally.differs(p.name, f"stored as {kept}, the recipe says {want}")
            continue
        for start, block in _sample(source, p.name, p.shape, share):
            tally.compared += block.size
            how = _compare(stored.rows(p.name, start, start + len(block)), stored, p.name, start, block, kept)
            if how:
                tally.differs(p.name, how)
                break
        if share < 1 and p.name in hashes and p.name not in tally.wrong:
            hashed += 1
            if stored.content_hash(p.name) != hashes[p.name]:
                tally.differs(p.name, "its content hash is not the receipt's")
    details: dict[str, Any] = {"weights": tally.weights, "compared": tally.compared, "hashed_tensors": hashed}
    if tally.wrong:
        name, how = next(iter(tally.wrong.items()))
        more = f" (and {len(tally.wrong) - 1} more tensors)" if len(tally.wrong) > 1 else ""
        details["wrong"] = dict(list(tally.wrong.items())[:20])
        return Check("packing", Status.FAIL, len(tally.wrong), 0, f"{name}: {how}{more}", details=details)
    part = f"{tally.compared / tally.weights:.0%} of {tally.weights:,} weights equal bit for bit"
    flags: tuple[str, ...] = ()
    if share < 1:
        covered = hashed == len(list(params(source.spec)))
        part += ", the rest by the receipt's hashes" if covered else ""
        flags = () if covered else ("compared by a sample of rows of every tensor",)
    return Check("packing", Status.PASS, 0, 0, part, flags, details=details)


def _sample(source: Any, name: str, shape: tuple[int, ...], share: float) -> Iterator[tuple[int, Array]]:
    """Row blocks of a tensor: all, or its first, its last and a seeded choice between, about `share` of the weights."""
    step = max(1, BLOCK // max(1, prod(shape[1:])))
    if len(shape) == 1:
        yield 0, source.tensor(name)
        return
    count = -(-shape[0] // step)
    rng = np.random.default_rng(abs(hash_seed(name)))
    chosen = {0, count - 1, *np.flatnonzero(rng.random(count) < share).tolist()}
    for i, (start, block) in enumerate(source.blocks(name, step)):
        if share == 1 or i in chosen:
            yield start, block


def hash_seed(name: str) -> int:
    """A number that depends on the name alone, on every machine."""
    import zlib

    return zlib.crc32(name.encode())


def _compare(got: Values, stored: Stored, name: str, start: int, block: Array, level: str) -> str:
    """An empty string where a block is what it should be, else what differs."""
    if level in BITS:
        want = quantize(block, BITS[level])
        if not isinstance(got, QuantizedTensor):
            return "not on the portable grid"
        for what, a, b in (("scales", got.scales, want.scales), ("codes", got.codes, want.codes)):
            if (how := _difference(what, a, b, start)):
                return how
        return ""
    decoded = got.dequantize() if isinstance(got, QuantizedTensor) else got
    expected = FLOATS[level](block) if level in FLOATS else stored.native(name, start, block)
    return _difference("values", decoded, expected, start)


def _difference(what: str, got: Array, want: Array, start: int) -> str:
    if got.shape != want.shape:
        return f"{what} of shape {got.shape}, not {want.shape}"
    wrong = got != want
    if not wrong.any():
        return ""
    at = np.unravel_index(int(wrong.argmax()), wrong.shape)
    where = ", ".join(str(i + (start if n == 0 else 0)) for n, i in enumerate(int(i) for i in at))
    return f"{int(wrong.sum())} {what} differ, first [{where}]: {got[at]:.6g}, not {want[at]:.6g}"
