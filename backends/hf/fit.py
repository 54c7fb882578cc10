"""Whether a carrier's code computes a spec: what must be rewritten on the way, and what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from backends.carriers import ByHash, Fold, best, distinct, layer_path
from backends.hf import mixture, rotary
from backends.hf.carriers import ACTIVATIONS, BY_ARCH, CARRIERS, Carrier
from backends.hf.shipped import Origin, origins, ship
from spec.config import Alibi, Block, NoPosition, Norm, Rope, Spec

CLOSE = 1e-7
"""Relative difference that float32 cannot see."""


@dataclass(frozen=True)
class Fit:
    """A carrier for a spec; it carries it if `refusals` is empty."""

    carrier: Carrier
    source: Spec
    refusals: tuple[str, ...]
    folds: tuple[Fold, ...]

    @property
    def cost(self) -> int:
        return sum(f.cost for f in self.folds)

    @cached_property
    def spec(self) -> Spec:
        """What the carrier computes with the stored weights: the source's spec with everything it always has."""
        return ship(self.source, self.carrier)

    @cached_property
    def origins(self) -> dict[str, Origin]:
        """For every tensor of `spec`, where its values come from."""
        return origins(self.source, self.spec)

    @property
    def session(self) -> int | None:
        """Length of the sessions whose rotary tables are fixed in the artifact."""
        return rotary.session(self.source, self.carrier)


Found = Iterator[str | Fold]


def examine(spec: Spec, c: Carrier) -> Fit:
    """Compare every field of the spec with what the carrier's code has."""
    found: list[str | Fold] = []
    for check in CHECKS:
        found.extend(check(spec, c))
    refusals = (f for f in found if isinstance(f, str))
    folds = (f for f in found if isinstance(f, Fold))
    return Fit(c, spec, tuple(dict.fromkeys(refusals)), tuple(dict.fromkeys(folds)))


def choose(spec: Spec, architecture: str = "", without: frozenset[str] = frozenset()) -> Fit:
    """The carrier with the fewest rewrites, or, where none carries the spec, the one that comes nearest; among the
    rows of one architecture, if one is named, else of all but some, if one of those carries it."""
    found = _choose(ByHash(spec), architecture, frozenset())
    if found.carrier.arch in without and not architecture:
        other = _choose(ByHash(spec), architecture, without)
        found = found if other.refusals else other
    return replace(found, source=spec)  # of the same function, another initialisation and dropout


@lru_cache(maxsize=32)
def _choose(key: ByHash, architecture: str, without: frozenset[str]) -> Fit:
    rows = BY_ARCH[architecture] if architecture else CARRIERS
    return best(examine(key.spec, c) for c in rows if c.arch not in without)


def _norm(path: str, n: Norm, c: Carrier) -> Found:
    if n.kind != c.norm:
        yield f"{path}.kind: {n.kind}, where transformers' {c.arch} has {c.norm}"
        return
    if c.eps is not None and n.eps != c.eps:
        yield f"{path}.eps: {n.eps:g}, where transformers' {c.arch} has {c.eps:g}"
    if n.bias and not c.norm_bias:
        yield f"{path}.bias: true, which transformers' {c.arch} lacks"
    if c.norm_bias and not n.bias:
        yield Fold(f"{path}: zero biases are stored (exact)")
    yield from _gain(path, n, c, c.norm_weight)


def _gain(path: str, n: Norm, c: Carrier, learned: bool) -> Found:
    if n.weight and not learned:
        yield f"{path}.weight: true, which transformers' {c.arch} lacks"
    elif learned and not n.weight:
        yield Fold(f"{path}: gains of one are stored (exact)")
    elif n.weight and n.offset != c.offset:
        yield Fold(f"{path}: gains are stored for an offset of {c.offset:g} instead of {n.offset:g}, rounded once")


def norms(spec: Spec, c: Carrier) -> Found:
    eps: dict[float, str] = {}
    for where, b in distinct(spec):
        yield from _norm(f"{where}.norm", b.norm, c)
        eps.setdefault(b.norm.eps, f"{where}.norm")
        if b.placement != c.placement:
            yield f"{where}.placement: {b.placement}, where transformers' {c.arch} is {c.placement}"
        if (q := b.attention.qk_norm) is not None:
            eps.setdefault(q.eps, f"{where}.attention.qk_norm")
    if spec.final_norm is None:
        yield f"final_norm: none, and transformers' {c.arch} always ends with a norm"
    else:
        yield from _norm("final_norm", spec.final_norm, c)
        eps.setdefault(spec.final_norm.eps, "final_norm")
    e = spec.embedding.norm
    if c.embed_norm and e is None:
        yield f"embedding.norm: none, and transformers' {c.arch} always has one"
    elif e is not None and not c.embed_norm:
        yield f"embedding.norm: {e.kind}, which transformers' {c.arch} lacks"
    elif e is not None:
        yield from _norm("embedding.norm", e, c)
        eps.setdefault(e.eps, "embedding.norm")
    if len(eps) > 1:
        paths = ", ".join(f"{p}.eps={v:g}" for v, p in eps.items())
        yield f"{list(eps.values())[1]}.eps: transformers' {c.arch} has one epsilon for all norms ({paths})"


def flow(spec: Spec, c: Carrier) -> Found:
    for where, b in distinct(spec):
        kind = "shared" if b.shared_norm else "parallel" if b.parallel else "sequential"
        if kind == "shared" and "shared" not in c.flow and "parallel" in c.flow:
            yield Fold(f"{where}.shared_norm: the norm is stored for both branches (exact)")
        elif kind not in c.flow:
            path = "shared_norm" if kind == "shared" else "parallel"
            yield f"{where}.{path}: {b.parallel}, where transformers' {c.arch} is {' or '.join(c.flow)}"
    if len({(b.parallel, b.shared_norm) for b in spec.layers}) > 1:
        yield "block.parallel: differs from layer to layer, which no transformers architecture carries"


def attention(spec: Spec, c: Carrier) -> Found:
    windows = [b.attention.window for b in spec.layers]
    for where, b in distinct(spec):
        a, at = b.attention, f"{where}.attention"
        assert a.head_dim and a.kv_heads and a.scale
        if c.square and a.heads * a.head_dim != spec.width:
            yield f"{at}.head_dim: heads * head_dim must be width={spec.width} in transformers' {c.arch}"
        if c.divisible and spec.width % a.heads:
            yield f"{at}.heads: {a.heads}, which must divide width={spec.width} in transformers' {c.arch}"
        if not c.gqa and a.kv_heads != a.heads:
            yield f"{at}.kv_heads: {a.kv_heads}, where transformers' {c.arch} has as many as heads={a.heads}"
        if c.mqa and a.kv_heads != 1:
            yield f"{at}.kv_heads: {a.kv_heads}, where transformers' {c.arch} has one without its newer decoder"
        if c.scale == "" and abs(a.scale / a.head_dim**-0.5 - 1) > CLOSE:
            yield f"{at}.scale: {a.scale:g}, where transformers' {c.arch} has head_dim^-0.5 = {a.head_dim**-0.5:g}"
        if c.scale == "inverse_square" and abs(a.scale * math.sqrt(max(1, round(a.scale**-2))) - 1) > CLOSE:
            yield f"{at}.scale: {a.scale:g}, where transformers' {c.arch} takes n^-0.5 for a whole number n"
        for name, value, key in (("softcap", a.softcap, c.softcap), ("clip", a.clip, c.clip)):
            if value is not None and not key:
                yield f"{at}.{name}: {value:g}, which transformers' {c.arch} lacks"
        if a.sinks and c.sinks == "no":
            yield f"{at}.sinks: true, which transformers' {c.arch} lacks"
        if not a.sinks and c.sinks == "required":
            yield Fold(f"{at}: sinks of -32768 stand for none (exact)", cost=2)
        if a.window is not None and c.window == "no":
            yield f"{at}.window: {a.window}, which transformers' {c.arch} lacks"
        if a.window == 1 and c.window != "no":
            yield f"{at}.window: 1, for which transformers' cache keeps the wrong keys (2 or more)"
        yield from _qk_norm(at, b, c)
    if c.window == "all" and len(set(windows)) > 1:
        yield f"{layer_path(spec, 0)}.attention.window: differs from layer to layer; transformers' {c.arch} has one"
    for path, values in _per_layer(spec, c):
        if len(values) > 1:
            shown = ", ".join(map(str, values))
            yield f"{path}: differs from layer to layer ({shown}); transformers' {c.arch} has one"


def _qk_norm(at: str, b: Block, c: Carrier) -> Found:
    q = b.attention.qk_norm
    if q is None:
        if c.qk_norm == "required":
            yield f"{at}.qk_norm: none, and transformers' {c.arch} requires it"
        return
    if c.qk_norm == "no":
        yield f"{at}.qk_norm: {q.kind} over {q.over}, which transformers' {c.arch} lacks"
    elif (q.kind, q.over) != (c.qk_kind, c.qk_over):
        yield f"{at}.qk_norm: {q.kind} over {q.over}, where transformers' {c.arch} has {c.qk_kind} over {c.qk_over}"
    elif q.bias and not c.qk_bias:
        yield f"{at}.qk_norm.bias: true, which transformers' {c.arch} lacks"
    else:
        yield from _gain(f"{at}.qk_norm", q, c, True)
        if c.qk_bias and not q.bias:
            yield Fold(f"{at}.qk_norm: zero biases are stored (exact)")


def _per_layer(spec: Spec, c: Carrier) -> Iterator[tuple[str, Sequence[object]]]:
    """Fields of which transformers has one value for all layers."""
    attentions = [b.attention for b in spec.layers]
    plain = ("heads", "kv_heads", "head_dim", "softcap", "clip")
    for name, values in [
        *((name, [getattr(a, name) for a in attentions]) for name in plain),
        ("scale", [a.scale for a in attentions] if c.scale else []),
        ("qk_norm", ["none" if a.qk_norm is None else "some" for a in attentions]),
        ("window", [a.window for a in attentions if a.window is not None] if c.window == "layers" else []),
    ]:  # fmt: skip
        yield f"block.attention.{name}", sorted(set(values), key=str)
    yield "block.mlp.hidden", sorted({b.mlp.hidden for b in spec.layers if b.mlp.kind == "dense"})
    yield "block.mlp.activation", sorted({f"{b.mlp.activation}/{b.mlp.gated}" for b in spec.layers})
    yield "block.residual_scale", sorted({b.residual_scale for b in spec.layers})


def positions(spec: Spec, c: Carrier) -> Found:
    p = spec.embedding.positions
    if c.positions is None and p is not None:
        yield f"embedding.positions: learned, which transformers' {c.arch} lacks"
    elif c.positions is not None and p is None:
        yield f"embedding.positions: none, and transformers' {c.arch} requires learned ones"
    elif p is not None and p.offset != c.positions:
        yield f"embedding.positions.offset: {p.offset}, where transformers' {c.arch} has {c.positions}"
    kinds = {type(b.attention.position) for b in spec.layers}
    if c.alibi:
        for where, b in distinct(spec):
            a = b.attention.position
            if not isinstance(a, Alibi):
                yield f"{where}.attention.position: {a.kind}, where transformers' {c.arch} always has alibi"
            elif a.max_bias != 8:
                yield f"{where}.attention.position.max_bias: {a.max_bias:g}, where transformers' {c.arch} has 8"
        return
    if Alibi in kinds:
        yield f"{layer_path(spec, 0)}.attention.position: alibi, which transformers' {c.arch} lacks"
    elif c.rope == "none":
        if Rope in kinds:
            yield f"{layer_path(spec, 0)}.attention.position: rope, which transformers' {c.arch} lacks"
    else:
        yield from _still(spec, c)
        yield from rotary.refusals(spec, c)


def _still(spec: Spec, c: Carrier) -> Iterator[str]:
    """Layers without positions."""
    for i, b in enumerate(spec.layers):
        still, local = isinstance(b.attention.position, NoPosition), b.attention.window is not None
        path = f"{layer_path(spec, i)}.attention.position"
        any_window = any(b.attention.window is not None for b in spec.layers)
        if c.no_position == "global" or (c.no_position == "windowed" and any_window):
            if still == local:
                yield f"{path}: transformers' {c.arch} rotates exactly the layers that have a window"
                return
        elif still and c.no_position in ("no", "windowed"):
            yield f"{path}: none, and transformers' {c.arch} always rotates"
            return


def biases(spec: Spec, c: Carrier) -> Found:
    groups = {part: parts for _, parts in c.biases for part in parts.split()}
    wanted = dict.fromkeys(groups, False)
    for where, b in distinct(spec):
        for part, path, has in _biases(where, b):
            if has and part not in groups:
                yield f"{where}.{path}: true, which transformers' {c.arch} lacks"
            wanted[part] = wanted.get(part, False) or has
    if spec.head.bias and "head" not in groups:
        yield f"head.bias: true, which transformers' {c.arch} lacks"
    wanted["head"] = spec.head.bias
    for key, parts in c.biases:
        group = parts.split()
        on = not key or any(wanted[p] for p in group)
        absent = [p for p in group if any(not has for _, b in distinct(spec) for n, _, has in _biases("", b) if n == p)]
        absent += ["head"] if "head" in group and not spec.head.bias else []
        if on and absent:
            yield Fold(f"{', '.join(absent)}: zero biases are stored (exact)")


def _biases(where: str, b: Block) -> Iterator[tuple[str, str, bool]]:
    for n in ("q", "k", "v", "o"):
        yield n, f"attention.bias.{n}", getattr(b.attention.bias, n)
    for n in ("gate", "up", "down") if b.mlp.gated else ("up", "down"):
        yield n, f"mlp.bias.{n}", getattr(b.mlp.bias, n)


def mlp(spec: Spec, c: Carrier) -> Found:
    for where, b in distinct(spec):
        m, at = b.mlp, f"{where}.mlp"
        kind = "gated" if c.gated else "plain"
        if m.gated != c.gated:
            yield f"{at}.gated: {str(m.gated).lower()}, where transformers' {c.arch} is {kind}"
        if c.activation and m.activation != c.activation:
            yield f"{at}.activation: {m.activation}, where transformers' {c.arch} has {c.activation}"
        elif not c.activation and (m.activation not in ACTIVATIONS or m.activation in c.lacks):
            yield f"{at}.activation: {m.activation}, which transformers' {c.arch} lacks"
        if c.hidden_times and m.kind == "dense" and m.hidden != c.hidden_times * spec.width:
            yield f"{at}.hidden: {m.hidden}, where transformers' {c.arch} has {c.hidden_times} * width"


def experts(spec: Spec, c: Carrier) -> Found:
    yield from mixture.check(spec, c.mixture, c.arch)


def ends(spec: Spec, c: Carrier) -> Found:
    e, h = spec.embedding, spec.head
    if c.embed_scale == "sqrt_width":
        if e.scale is None or abs(e.scale / math.sqrt(spec.width) - 1) > CLOSE:
            root = math.sqrt(spec.width)
            yield f"embedding.scale: {e.scale}, where transformers' {c.arch} has sqrt(width) = {root:g}"
    elif e.scale not in (None, 1) and not c.embed_scale:
        yield f"embedding.scale: {e.scale:g}, which transformers' {c.arch} lacks"
    if any(b.residual_scale != 1 for b in spec.layers) and not c.residual_scale:
        yield f"block.residual_scale: {spec.layers[0].residual_scale:g}, which transformers' {c.arch} lacks"
    if h.scale not in (None, 1) and not c.logit_scale:
        yield f"head.scale: {h.scale:g}, which transformers' {c.arch} lacks"
    if h.softcap is not None and not c.logit_softcap:
        yield f"head.softcap: {h.softcap:g}, which transformers' {c.arch} lacks"


CHECKS = (norms, flow, attention, positions, biases, mlp, experts, ends)
