"""Mixtures of experts in transformers' architectures, as data: which keys of config.json tell what of them.

A row of `carriers.py` that has a `Mixture` computes one in some layers; `Mixture` says what its router does, and how
dense layers, the widths and the shared expert are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from backends.carriers import Fold, distinct, layer_path
from spec.config import MLP, FeedForward, MoE, Spec

Need = Literal["no", "optional", "required"]
Dense = Literal["none", "first", "steps", "list", "span"]
"""Which layers are dense: none; the first ones, by their number; those that are listed by number, or by kind; those
outside a span of layers, of which every so many are mixtures."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The experts of an architecture. An empty key: the code has no such choice."""

    experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    hidden: str = "moe_intermediate_size"
    """Width of an expert; that of dense layers is the row's own `hidden`."""
    least: int = 1
    """Experts that the code needs: it sorts its groups by the best two."""
    dense: Dense = "none"
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: str = ""
    """Whether weights are divided by their sum, by a key; an empty one: always."""
    scale: str = ""
    bias: bool = False
    """Whether the router has a bias (then always)."""
    correction: bool = False
    """Whether the choice is corrected by a number for each expert (then always)."""
    wide: tuple[str, ...] = ()
    """Ends of the names of its tensors that are float32 in models of 16 bits too."""
    shared: Need = "no"
    """Whether there is an expert for every token; 0 under its key means none."""
    shared_hidden: str = ""
    shared_times: bool = False
    """Whether that counts experts' widths."""
    shared_gate: bool = False
    alpha: str = ""
    limit: str = ""
    """Numbers of `clamped_swiglu`."""


def first(sparse: Sequence[bool]) -> dict[str, Any] | None:
    n = sparse.index(True)
    return {"first_k_dense_replace": n} if all(sparse[n:]) else None


def steps(sparse: Sequence[bool]) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, s in enumerate(sparse) if not s]}


def listed(sparse: Sequence[bool]) -> dict[str, Any]:
    return {"mlp_layer_types": ["sparse" if s else "dense" for s in sparse]}


def span(sparse: Sequence[bool]) -> dict[str, Any] | None:
    on = [i for i, s in enumerate(sparse) if s]
    for interval in range(1, len(sparse) + 1):
        if [i for i in range(on[0], on[-1] + 1) if (i + 1) % interval == 0] == on:
            return {"moe_layer_start_index": on[0], "moe_layer_end_index": on[-1], "moe_layer_interval": interval}
    return None


DENSE: Mapping[Dense, Callable[[Sequence[bool]], dict[str, Any] | None]] = {
    "none": lambda sparse: {} if all(sparse) else None,
    "first": first,
    "steps": steps,
    "list": listed,
    "span": span,
}
"""config.json's keys for which layers are mixtures; none where they cannot say it."""
PLACES = {"none": "mixtures throughout", "first": "dense layers before all mixtures",
          "span": "mixtures at even distances"}  # fmt: skip


def mixtures(spec: Spec) -> list[MoE | None]:
    """For every layer its mixture, or none where it is dense."""
    return [b.mlp if isinstance(b.mlp, MoE) else None for b in spec.layers]


def settings(spec: Spec, m: Mixture) -> dict[str, Any]:
    """Keys of config.json."""
    found = mixtures(spec)
    one = next(f for f in found if f is not None)
    r, shared = one.router, one.shared
    width = 0 if shared is None else shared.hidden // one.hidden if m.shared_times else shared.hidden
    told = DENSE[m.dense]([f is not None for f in found])
    assert told is not None, "a spec that fits"
    keys = {
        m.experts: one.experts, m.top_k: r.top_k, m.hidden: one.hidden, m.renormalise: r.renormalise, m.scale: r.scale,
        m.shared_hidden: width, m.alpha: one.alpha, m.limit: one.limit,
    }  # fmt: skip
    return {k: v for k, v in {**keys, **told}.items() if k}


def dense_hidden(spec: Spec) -> int:
    """The width of dense layers; where there are none, that of an expert stands for it."""
    return next((b.mlp.hidden for b in spec.layers if isinstance(b.mlp, MLP)), spec.layers[0].mlp.hidden)


def kernels(spec: Spec) -> dict[str, str]:
    """config.json's word where transformers' grouped products fail: they take rows of whole 16 bytes."""
    widths = [n for f in mixtures(spec) if f is not None for n in (spec.width, f.hidden)]
    return {"experts_implementation": "eager"} if any(n % 8 for n in widths) else {}


def check(spec: Spec, m: Mixture | None, arch: str) -> Iterator[str | Fold]:
    """What of a spec's mixtures an architecture lacks."""
    found = mixtures(spec)
    sparse = [f is not None for f in found]
    at = next((w for w, b in distinct(spec) if isinstance(b.mlp, MoE)), layer_path(spec, 0))
    if m is None:
        if any(sparse):
            yield f"{at}.mlp.kind: moe, which transformers' {arch} lacks"
        return
    if not any(sparse):
        yield f"{at}.mlp.kind: dense, where transformers' {arch} has experts"
        return
    if DENSE[m.dense](sparse) is None:
        yield f"{at}.mlp.kind: dense and moe as here, where transformers' {arch} has {PLACES[m.dense]}"
    different = {f.model_dump_json() for f in found if f is not None}
    if len(different) > 1:
        yield f"block.mlp.experts: {len(different)} different mixtures, of which transformers' {arch} has one"
    for where, b in distinct(spec):
        if isinstance(b.mlp, MoE):
            yield from _one(f"{where}.mlp", b.mlp, m, arch)


def _one(at: str, moe: MoE, m: Mixture, arch: str) -> Iterator[str | Fold]:
    r = moe.router
    if moe.experts < m.least:
        yield f"{at}.experts: {moe.experts}, where transformers' {arch} needs {m.least}"
    if r.score != m.score:
        yield f"{at}.router.score: {r.score}, where transformers' {arch} has {m.score}"
    if not r.renormalise and not m.renormalise:
        yield f"{at}.router.renormalise: false, where transformers' {arch} always does"
    if r.scale != 1 and not m.scale:
        yield f"{at}.router.scale: {r.scale:g}, which transformers' {arch} lacks"
    for name, has, always in (("bias", r.bias, m.bias), ("correction", r.correction, m.correction)):
        if has and not always:
            yield f"{at}.router.{name}: true, which transformers' {arch} lacks"
        elif always and not has:
            yield Fold(f"{at}.router.{name}: zeros are stored (exact)")
    yield from _shared(at, moe, m, arch)
    yield from _clamps(at, moe, m, arch)


def _shared(at: str, moe: MoE, m: Mixture, arch: str) -> Iterator[str]:
    if moe.shared is None:
        if m.shared == "required":
            yield f"{at}.shared: none, and transformers' {arch} requires it"
    elif m.shared == "no":
        yield f"{at}.shared: hidden={moe.shared.hidden}, which transformers' {arch} lacks"
    elif moe.shared.gate != m.shared_gate:
        has = "always has" if m.shared_gate else "lacks"
        yield f"{at}.shared.gate: {str(moe.shared.gate).lower()}, which transformers' {arch} {has}"
    elif m.shared_times and moe.shared.hidden % moe.hidden:
        yield f"{at}.shared.hidden: {moe.shared.hidden}, where transformers' {arch} has multiples of {moe.hidden}"


def _clamps(at: str, mlp: FeedForward, m: Mixture, arch: str) -> Iterator[str]:
    if mlp.activation == "clamped_swiglu":
        for name, key in (("alpha", m.alpha), ("limit", m.limit)):
            if not key:
                yield f"{at}.{name}: {getattr(mlp, name):g}, which transformers' {arch} lacks"
