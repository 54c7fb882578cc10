"""What becomes int8 within a budget of bits: in order of measured gains, else in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from spec.config import Spec
from spec.errors import UserError

BUDGET = 4.95
"""Bits per weight that a 4-bit level may spend over all matrices, scales counted."""

PAYS_MOST = ("head.weight", "embed.weight", "attn.v.weight", "mlp.down.weight", "mlp.shared.down.weight",
             "attn.o.weight", "attn.k.weight")  # fmt: skip
"""The fixed order: what the logits are read from, then what sums up many terms or passes straight into the residual
stream. Within a kind, outer layers come first (they are the sensitive ones)."""

Upgrades = tuple[str, ...]
"""Tensors that become int8."""


def order(spec: Spec, candidates: Sequence[str], every: bool) -> list[str]:
    """Candidates in the fixed order; `every`: those of other kinds too, behind."""
    first = [n for n in _fixed(spec) if n in set(candidates)]
    return first + ([n for n in candidates if n not in set(first)] if every else [])


def by_gain(names: Sequence[str], gains: Mapping[str, float], costs: Mapping[str, float]) -> list[str]:
    """Names by gain for each bit, the most first; those without a gain behind, in their order."""
    return sorted(names, key=lambda n: -gains[n] / costs[n] if n in gains else math.inf)


def fill(names: Sequence[str], costs: Mapping[str, float], left: float) -> Upgrades:
    """Names in order, each if it still fits into `left` bits."""
    out = []
    for name in names:
        if costs[name] <= left:
            left -= costs[name]
            out.append(name)
    return tuple(out)


def to_bits(
    bits: float, spent: float, total: int, names: Sequence[str], costs: Mapping[str, float], hint: str
) -> Upgrades:
    """`fill` for `bits` per weight over `total` weights, of which `spent` bits go whatever is upgraded. Raises
    `UserError` where that cannot be reached; `hint` says what reaches less."""
    least, most = spent / total, (spent + sum(costs[n] for n in names)) / total
    if bits < least - 1e-9:
        raise UserError(f"--bits {bits:g}: at least {math.ceil(least * 100) / 100:.2f} are reachable ({hint})")
    if bits > most + 1e-9:
        raise UserError(f"--bits {bits:g}: at most {math.floor(most * 100) / 100:.2f} are reachable, with all that may "
                        "be int8 (--quant q8 or f16 for more)")  # fmt: skip
    return fill(names, costs, bits * total - spent + 1e-6)


def to_size(
    size: int, sized: Callable[[Upgrades], int], names: Sequence[str], costs: Mapping[str, float], hint: str
) -> Upgrades:
    """`fill` with as many bits as an artifact of at most `size` bytes has; `sized` tells its bytes. Raises `UserError`
    where that cannot be reached."""
    asked, bytes_of = f"--size {megabytes(size)}", {}

    def measured(chosen: Upgrades) -> int:
        if chosen not in bytes_of:
            bytes_of[chosen] = sized(chosen)
        return bytes_of[chosen]

    low, high = 0.0, sum(costs[n] for n in names)
    best, whole = fill(names, costs, low), fill(names, costs, high + 1e-6)
    if measured(best) > size:
        raise UserError(f"{asked}: at least {megabytes(measured(best), up=True)} are reachable ({hint})")
    if measured(whole) < size:
        raise UserError(f"{asked}: at most {megabytes(measured(whole))} are reachable, with all that may be int8 "
                        "(--quant q8 or f16 for more)")  # fmt: skip
    if measured(whole) == size:
        return whole
    while high - low > min(costs.values(), default=high) / 2 and best != whole:
        middle = (low + high) / 2
        tried = fill(names, costs, middle)
        if measured(tried) <= size:
            best, low = tried, middle
        else:
            whole, high = tried, middle
    return best


def megabytes(size: int, up: bool = False) -> str:
    """Bytes as `--size` takes them: to a tenth of a megabyte, rounded up where that is a bound from below."""
    return f"{(math.ceil if up else math.floor)(size / 1e5) / 10:.1f}MB"


def _fixed(spec: Spec) -> Iterator[str]:
    layers = sorted(range(spec.depth), key=lambda i: (_rank(i, spec.depth), i))
    for kind in PAYS_MOST:
        if kind.startswith(("attn.", "mlp.")):
            yield from (f"layers.{i}.{kind}" for i in layers)
        else:
            yield kind


def _rank(i: int, depth: int) -> int:
    """0: the first and last eighth; 1: every third layer between; 2: the others (llama.cpp's mixtures do likewise)."""
    eighth = max(1, depth // 8)
    if i < eighth or i >= depth - eighth:
        return 0
    return 1 if (i - eighth) % 3 == 2 else 2
