"""What degrees of parallelism a spec admits, asked before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from spec.config import MoE, Spec
from spec.errors import Problem, SpecError
from train.config import Batch
from train.parallel.mesh import Degrees, near_divisors


def check(spec: Spec, d: Degrees, length: int) -> None:
    """Raise `SpecError` for every size of the spec, or of sequences of `length` tokens, that a degree can't divide."""
    if problems := list(dict.fromkeys(_problems(spec, d, length))):
        raise SpecError(problems)


def check_batch(batch: Batch, d: Degrees) -> None:
    """Raise `SpecError` where the sequences of a step don't fall evenly on the ranks and their forward passes."""
    unit = d.data * (batch.micro or 1)
    if batch.sequences % unit:
        below, above = batch.sequences // unit * unit, -(-batch.sequences // unit) * unit
        passes = f" in passes of batch.micro={batch.micro}" if batch.micro else ""
        rule = f"does not divide evenly over {d.data} ranks (replicate x dp){passes}"
        raise SpecError([Problem("batch.sequences", batch.sequences, rule, f"try {below or above} or {above}")])


def _problems(spec: Spec, d: Degrees, length: int) -> Iterator[Problem]:
    if length > spec.context:
        rule = f"is beyond the spec's context={spec.context}, which the model is shipped with"
        yield Problem("data.length", length, rule, f"raise the spec's context, or try {spec.context}")
    if d.tp > 1:
        everything = gcd(length, *(size for _, size in _divided(spec)))
        works = [n for n in near_divisors(everything, d.tp) if n > 1]
        fix = f"try {' or '.join(map(str, works))}" if works else "use parallel.tp 1, or change the spec"
        for name, size in (("sequences of data.length", length), *_divided(spec)):
            if size % d.tp:
                yield Problem("parallel.tp", d.tp, f"does not divide {name}={size}", fix)
    if d.ep > 1:
        experts = [b.mlp.experts for b in spec.layers if isinstance(b.mlp, MoE)]
        if not experts:
            yield Problem("parallel.ep", d.ep, "divides experts, and the spec has none", "use parallel.ep 1")
        works = near_divisors(gcd(d.dp * d.tp, *experts), d.ep)
        for n in experts:
            if n % d.ep:
                fix = f"try {' or '.join(map(str, works))}"
                yield Problem("parallel.ep", d.ep, f"does not divide mlp.experts={n}", fix)


def _divided(spec: Spec) -> Iterator[tuple[str, int]]:
    """What tensor parallelism divides, by its name in the spec."""
    for b in dict.fromkeys(spec.layers):
        a, m = b.attention, b.mlp
        assert a.kv_heads is not None, "a resolved layer"
        yield "attention.heads", a.heads
        yield "attention.kv_heads", a.kv_heads
        if not isinstance(m, MoE):
            yield "mlp.hidden", m.hidden
        elif m.shared is not None:
            yield "mlp.shared.hidden", m.shared.hidden
