"""The first check: what the artifact holds is the canonical rounding of the source, bit for bit.

Every stored tensor is decoded from the file. Portable levels are compared with `convert.quantize` on the source's
rows, float levels with the exact rounding, native types with the format's own quantizer. Small models are compared
whole; of large ones a seeded sample of row blocks of every tensor, the first and last always among them, since rounding
again is the slow part. There the content hashes that the receipt took of what was rounded cover every other row.
Calibrated codes are compared with the rounding where the source has it attached; later, when that is gone, the hashes
stand for it. Either way the source's weights have the hash that the receipt names.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.base import QuantizedTensor, Values
from convert.verify.report import Check, Status
from spec.params import params

Array = NDArray[Any]

BUDGET = 96_000_000
"""Weights that are rounded again; models up to this size are compared whole."""
BLOCK = 1 << 18
"""Weights in one block of rows."""


class Stored(Protocol):
    """An artifact's weights in canonical names and rows: permutations undone, folds applied to both sides."""

    def problems(self) -> dict[str, str]:
        """What is wrong before any weight is compared: tensors missing, too many, or of another type."""
        ...

    def rows_together(self, name: str) -> int:
        """Rows of which a block for `compare` has a multiple: the format rounds so many together."""
        ...

    def compare(self, name: str, start: int, block: Values) -> str:
        """An empty string where the artifact holds the canonical rounding of rows of the source that begin at `start`
        (a vector is one row block), else what differs. Rows that come as codes and scales are these at their own
        width."""
        ...

    def calibrated(self, name: str) -> str:
        """The attribute of the source that tells how a tensor was rounded, where a text had a part in that: without it
        only the receipt's hash can be compared."""
        ...

    def made_from(self, source: Any) -> bool:
        """Whether the receipt names the weights of this source: codes that a text had a part in don't follow from
        them."""
        ...

    def hashed(self, name: str) -> bool | None:
        """Whether the whole tensor, as it is stored, has the content hash of the receipt; none without a hash."""
        ...


def check_packing(stored: Stored, source: Any, budget: int = BUDGET) -> Check:
    """Compare every tensor of the artifact with the canonical rounding of the source.

    source: as `convert.sources.open_source` returns it. budget: weights to round again.
    """
    wrong = stored.problems()
    known = list(params(source.spec))
    total, compared, hashed = sum(p.size for p in known), 0, 0
    share = min(1.0, budget / max(1, total))
    again = 0
    if not wrong and any(stored.calibrated(p.name) for p in known) and not stored.made_from(source):
        wrong["source"] = "its weights are not those that the receipt names, which were calibrated"
    if not wrong:
        for p in known:
            needed = stored.calibrated(p.name)
            if needed and getattr(source, needed, None) is None:
                hashed += p.size
                again += p.size
                if not stored.hashed(p.name):
                    wrong[p.name] = "calibrated, and its content hash is not the receipt's"
                continue
            for start, block in _sample(source, p.name, p.shape, share, stored.rows_together(p.name)):
                compared += prod(block.shape)
                how = stored.compare(p.name, start, block)
                if how:
                    wrong[p.name] = how
                    break
            if share < 1 and p.matrix and p.name not in wrong:
                same = stored.hashed(p.name)
                hashed += p.size if same else 0
                if same is False:
                    wrong[p.name] = "a row that was not compared differs: its content hash is not the receipt's"
    details: dict[str, Any] = {"weights": total, "compared": compared, "hashed": hashed, "tensors": len(known)}
    if wrong:
        name, how = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
        details["wrong"] = dict(list(wrong.items())[:20])
        return Check("packing", Status.FAIL, len(wrong), 0, f"{name}: {how}{more}", details=details)
    if again:
        what = (f"{again:,} weights have the receipt's content hashes (calibrated, and the rounding is not here"
                f"); {compared:,} equal bit for bit")  # fmt: skip
        return Check("packing", Status.PASS, 0, 0, what, details=details)
    if compared == total:
        return Check("packing", Status.PASS, 0, 0, f"{total:,} weights equal bit for bit", details=details)
    what = f"{compared:,} of {total:,} weights, a sample of every tensor, equal bit for bit"
    if hashed:
        what += f"; {hashed:,} by content hash"
    return Check("packing", Status.PASS, 0, 0, what, details=details)


def _sample(
    source: Any, name: str, shape: tuple[int, ...], share: float, together: int
) -> Iterator[tuple[int, Values]]:
    """Row blocks of a tensor: all, or its first, its last and a seeded choice between, about `share` of the weights.
    Each has whole groups of `together` rows."""
    if len(shape) == 1:
        yield 0, source.tensor(name)
        return
    step = together * max(1, BLOCK // (together * max(1, prod(shape[1:]))))
    count = -(-shape[0] // step)
    rng = np.random.default_rng(zlib.crc32(name.encode()))  # the same on every machine
    chosen = {0, count - 1, *np.flatnonzero(rng.random(count) < share).tolist()}
    for i, (start, block) in enumerate(source.values(name, step)):
        if share == 1 or i in chosen:
            yield start, block


def compare_values(got: Values, want: Values, start: int) -> str:
    """An empty string where two row blocks are equal bit for bit: codes and scales where both have them."""
    if isinstance(got, QuantizedTensor) and isinstance(want, QuantizedTensor) and got.bits >= want.bits:
        got = got.grouped(want.group)  # a container of smaller groups repeats scales
        how = difference("scales", got.scales, want.scales, start)
        return how or difference("codes", got.codes, want.codes, start)
    dense = [v.dequantize() if isinstance(v, QuantizedTensor) else v for v in (got, want)]
    return difference("values", dense[0], dense[1], start)


def difference(what: str, got: Array, want: Array, start: int) -> str:
    """An empty string where two arrays are equal, else how many elements differ and the first of them."""
    if got.shape != want.shape:
        return f"{what} of shape {list(got.shape)}, not {list(want.shape)}"
    wrong = got != want
    if not wrong.any():
        return ""
    at = np.unravel_index(int(wrong.argmax()), wrong.shape)
    where = ", ".join(str(int(i) + (start if n == 0 else 0)) for n, i in enumerate(at))
    return f"{int(wrong.sum()):,} {what} differ, first [{where}]: {got[at]:.6g}, not {want[at]:.6g}"
