"""Whether a carrier's graph computes a spec: what must be rewritten on the way, and what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from backends.carriers import ByHash, Fold, best, distinct
from backends.gguf import rotary
from backends.gguf.carriers import CARRIERS, Carrier
from backends.gguf.found import Found, needs
from backends.gguf.mixtures import experts
from spec.config import Alibi, Block, MoE, Norm, Spec

NEUTRAL_CAP = 2.0**64
"""A soft cap that changes nothing: dividing by a power of two is exact and tanh of so small a number is the number."""

MAX_DEPTH = 512


@dataclass(frozen=True)
class Fit:
    """A carrier for a spec; it carries it if `refusals` is empty."""

    carrier: Carrier
    refusals: tuple[str, ...]
    folds: tuple[Fold, ...]
    rotary: rotary.Rotary

    @property
    def cost(self) -> int:
        return sum(f.cost for f in self.folds)


def examine(spec: Spec, c: Carrier) -> Fit:
    """Compare every field of the spec with what the carrier's graph has."""
    found: list[str | Fold] = []
    for check in CHECKS:
        found.extend(check(spec, c))
    turn = rotary.plan(spec, c)
    folds = [f for f in found if isinstance(f, Fold)] + [Fold(t, cost=0) for t in turn.folds]
    refusals = [f for f in found if isinstance(f, str)] + turn.refusals
    return Fit(c, tuple(dict.fromkeys(refusals)), tuple(dict.fromkeys(folds)), turn)


def choose(spec: Spec) -> Fit:
    """The carrier with the fewest rewrites, or, where none carries the spec, the one that comes nearest."""
    return _choose(ByHash(spec))


@lru_cache(maxsize=32)
def _choose(key: ByHash) -> Fit:
    return best(examine(key.spec, c) for c in CARRIERS)


def _norm(path: str, n: Norm, c: Carrier) -> Found:
    if n.kind != c.norm:
        yield f"{path}.kind: {n.kind}, where llama.cpp's {c.arch} has {c.norm}"
        return
    if n.offset:
        yield Fold(f"{path}: gains are stored with the offset added, rounded once to float32", cost=0)
    if not n.weight:
        yield Fold(f"{path}: gains of one are stored (exact)", cost=0)
    yield from needs(f"{path}.bias", n.bias, True, c.norm_bias, f"{path}: zero biases are stored (exact)", c)


def norms(spec: Spec, c: Carrier) -> Found:
    eps: dict[tuple[str, float], str] = {}
    for where, b in distinct(spec):
        yield from _norm(f"{where}.norm", b.norm, c)
        eps.setdefault((b.norm.kind, b.norm.eps), f"{where}.norm")
        if b.placement != c.placement:
            yield f"{where}.placement: {b.placement}, where llama.cpp's {c.arch} is {c.placement}"
        if (q := b.attention.qk_norm) is not None:
            eps.setdefault((q.kind, q.eps), f"{where}.attention.qk_norm")
    if spec.final_norm is None:
        yield f"final_norm: none, and llama.cpp's {c.arch} always ends with a norm"
    else:
        yield from _norm("final_norm", spec.final_norm, c)
        eps.setdefault((spec.final_norm.kind, spec.final_norm.eps), "final_norm")
    e = spec.embedding.norm
    if c.embed_norm and e is None:
        yield f"embedding.norm: none, and llama.cpp's {c.arch} always has one"
    elif e is not None and not c.embed_norm:
        yield f"embedding.norm: {e.kind}, which llama.cpp's {c.arch} lacks"
    elif e is not None:
        yield from _norm("embedding.norm", e, c)
        eps.setdefault((e.kind, e.eps), "embedding.norm")
    for kind in ("rmsnorm", "layernorm"):
        mine = {v: path for (k, v), path in eps.items() if k == kind}
        if len(mine) > 1:
            paths = ", ".join(f"{p}.eps={v:g}" for v, p in mine.items())
            yield f"{list(mine.values())[1]}.eps: a llama.cpp model has one epsilon for all of its {kind}s ({paths})"


def flow(spec: Spec, c: Carrier) -> Found:
    for where, b in distinct(spec):
        kind = "shared" if b.shared_norm else "parallel" if b.parallel else "sequential"
        if kind not in c.flow:
            field = "shared_norm" if kind == "shared" else "parallel"
            yield f"{where}.{field}: {b.parallel}, where llama.cpp's {c.arch} is {' or '.join(c.flow)}"
        elif kind == "shared" and "parallel" in c.flow:
            yield Fold(f"{where}.shared_norm: the norm is stored for both branches (exact)", cost=1)
    if len({b.parallel for b in spec.layers}) > 1:
        yield "parallel: differs from layer to layer, which no llama.cpp architecture carries"
    if spec.depth in c.not_depths or spec.depth > MAX_DEPTH:
        yield f"depth: {spec.depth}, at which llama.cpp's {c.arch} is another graph"


def attention(spec: Spec, c: Carrier) -> Found:
    for where, b in distinct(spec):
        a = b.attention
        at = f"{where}.attention"
        assert a.head_dim and a.kv_heads and a.scale
        if c.square and a.heads * a.head_dim != spec.width:
            yield f"{at}.head_dim: heads * head_dim must equal width in llama.cpp's {c.arch}, as {spec.width} here"
        if c.every_head and a.kv_heads != a.heads:
            yield f"{at}.kv_heads: {a.kv_heads}, where llama.cpp's {c.arch} has as many as heads"
        bias = a.bias.q or a.bias.k or a.bias.v
        yield from needs(f"{at}.bias", bias, "q, k, v", c.qkv_bias, f"{at}: zero biases are stored (exact)", c)
        if c.fused_qkv and bias and not (a.bias.q and a.bias.k and a.bias.v):
            yield Fold(f"{at}: zero biases are stored where q, k or v has none (exact)", cost=0)
        yield from needs(f"{at}.bias.o", a.bias.o, True, c.o_bias, f"{at}: a zero output bias is stored (exact)", c)
        own = a.head_dim**-0.5
        if spec.depth == c.wide_scale_depth:
            own = (spec.width // a.heads) ** -0.5
        if not c.scale and abs(a.scale / own - 1) > 1e-7:
            yield f"{at}.scale: {a.scale:g}, where llama.cpp's {c.arch} has {own:g}"
        yield from needs(f"{at}.softcap", a.softcap is not None, a.softcap, c.softcap,
                          f"{at}: a soft cap of 2^64 stands for none (exact)", c)  # fmt: skip
        if a.clip is not None and not c.clip:
            yield f"{at}.clip: {a.clip:g}, which llama.cpp's {c.arch} lacks"
        yield from needs(f"{at}.sinks", a.sinks, True, c.sinks, f"{at}: sinks of -1e30 stand for none (exact)", c)
        if a.window is not None and c.window == "no":
            yield f"{at}.window: {a.window}, which llama.cpp's {c.arch} lacks"
        if isinstance(a.position, Alibi) and (c.alibi == "no" or (c.alibi == "8" and a.position.max_bias != 8)):
            has = "no alibi" if c.alibi == "no" else "max_bias 8"
            yield f"{at}.position: alibi with max_bias {a.position.max_bias:g}, where llama.cpp's {c.arch} has {has}"
        if c.alibi == "8" and not isinstance(a.position, Alibi):
            yield f"{at}.position: {a.position.kind}, where llama.cpp's {c.arch} always has alibi"
        yield from _qk_norm(at, spec, b, c)
    for path, values in _per_layer(spec, c):
        if len(values) > 1:
            yield f"{path}: differs from layer to layer ({', '.join(map(str, values))}); llama.cpp's {c.arch} has one"


def _qk_norm(at: str, spec: Spec, b: Block, c: Carrier) -> Found:
    q = b.attention.qk_norm
    if q is None:
        yield from needs(f"{at}.qk_norm", False, None, c.qk_norm, "", c)
        return
    if c.qk_norm == "no":
        yield f"{at}.qk_norm: {q.kind} over {q.over}, which llama.cpp's {c.arch} lacks"
        return
    over = "head" if c.qk_over == "heads" else c.qk_over
    if (q.kind, q.over) != (c.qk_kind, over):
        yield f"{at}.qk_norm: {q.kind} over {q.over}, where llama.cpp's {c.arch} has {c.qk_kind} over {over}"
        return
    yield from needs(f"{at}.qk_norm.bias", q.bias, True, c.qk_bias, "", c)
    if q.offset:
        yield Fold(f"{at}.qk_norm: gains are stored with the offset added, rounded once to float32", cost=0)


def _per_layer(spec: Spec, c: Carrier) -> Iterator[tuple[str, Sequence[object]]]:
    """Fields of which most graphs have one value for all layers."""
    layers = spec.layers
    heads = [] if c.layer_heads else [("heads", [b.attention.heads for b in layers]),
                                      ("kv_heads", [b.attention.kv_heads for b in layers])]  # fmt: skip
    for name, values in [
        *heads,
        ("head_dim", [b.attention.head_dim for b in layers]),
        ("softcap", [b.attention.softcap for b in layers]),
        ("clip", [b.attention.clip for b in layers]),
        ("scale", [b.attention.scale for b in layers] if c.scale else []),
        ("position.max_bias", [p.max_bias if isinstance(p := b.attention.position, Alibi) else 0 for b in layers]),
        ("window", [b.attention.window for b in layers if b.attention.window is not None]),
    ]:
        yield f"block.attention.{name}", sorted(set(values), key=str)
    yield "block.mlp.hidden", sorted({b.mlp.hidden for b in layers if not isinstance(b.mlp, MoE)})
    yield "block.residual_scale", sorted({b.residual_scale for b in layers})


def mlp(spec: Spec, c: Carrier) -> Found:
    for where, b in distinct(spec):
        m, at = b.mlp, f"{where}.mlp"
        if isinstance(m, MoE):
            continue
        if (m.gated, m.activation) != (c.gated, c.activation):
            kind = "gated" if c.gated else "plain"
            mine = "gated" if m.gated else "plain"
            yield f"{at}.activation: {mine} {m.activation}, where llama.cpp's {c.arch} has {kind} {c.activation}"
        parts = {"up": m.bias.up, "down": m.bias.down, **({"gate": m.bias.gate} if m.gated else {})}
        if any(parts.values()) and c.mlp_bias == "no":
            yield f"{at}.bias: {', '.join(n for n in parts if parts[n])}, which llama.cpp's {c.arch} lacks"
        if c.mlp_bias == "required" and not all(parts.values()):
            yield Fold(f"{at}: zero biases are stored (exact)", cost=0)


def ends(spec: Spec, c: Carrier) -> Found:
    e, h = spec.embedding, spec.head
    if c.embed_scale == "sqrt_width":
        if e.scale is None or abs(e.scale / math.sqrt(spec.width) - 1) > 1e-7:
            yield f"embedding.scale: {e.scale}, where llama.cpp's {c.arch} has sqrt(width) = {math.sqrt(spec.width):g}"
    elif e.scale is not None and e.scale != 1 and c.embed_scale == "no":
        yield f"embedding.scale: {e.scale:g}, which llama.cpp's {c.arch} lacks"
    yield from needs("embedding.positions", e.positions is not None, "learned", c.positions, "", c)
    if e.positions is not None and e.positions.offset:
        yield Fold(f"embedding.positions.offset: the first {e.positions.offset} rows, never read, are left out", 0)
    if any(b.residual_scale != 1 for b in spec.layers) and not c.residual_scale:
        yield f"block.residual_scale: {spec.layers[0].residual_scale:g}, which llama.cpp's {c.arch} lacks"
    if any(b.residual_scale == 0 for b in spec.layers) and c.residual_scale:
        yield "block.residual_scale: 0, which llama.cpp reads as none"
    if h.tied and c.tied == "no":
        yield Fold("head.tied: the head is stored a second time (exact)", cost=2)
    if not h.tied and c.tied == "forced":
        yield f"head.tied: false, where llama.cpp's {c.arch} always shares the embedding"
    yield from needs("head.bias", h.bias, True, c.head_bias, "head: a zero bias is stored (exact)", c)
    if h.scale is not None and h.scale != 1 and c.logit_scale == "no":
        if spec.head.bias:
            yield f"head.scale: {h.scale:g} together with a head bias, which llama.cpp's {c.arch} lacks"
        else:
            how = "exact" if math.frexp(h.scale)[0] == 0.5 else "rounded once to float32; the norm is never quantized"
            yield Fold(f"head.scale: {h.scale:g} is folded into the final norm ({how})", cost=1)
    yield from needs("head.softcap", h.softcap is not None, h.softcap, c.logit_softcap,
                      "head: a soft cap of 2^64 stands for none (exact)", c)  # fmt: skip


def folded_logit_scale(spec: Spec, c: Carrier) -> float:
    """The factor that goes into the final norm, 1 where there is none."""
    return spec.head.scale if spec.head.scale is not None and c.logit_scale == "no" else 1.0


CHECKS = (norms, flow, attention, mlp, experts, ends)
