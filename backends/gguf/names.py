"""Where every canonical tensor lies in a GGUF file: names, fused tensors, row order, folds, and neutral fillings.

Every rewrite here works on whole rows, so blocks of rows can be written in any order and quantized rows move as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from backends.carriers import ByHash
from backends.gguf.carriers import Carrier
from backends.gguf.fit import Fit, choose, folded_logit_scale
from backends.gguf.mixtures import shared_width
from spec.config import MLP, Block, MoE, Norm, Rope, Spec
from spec.layout import rope_order
from spec.params import Param, params

TOP = {
    "embed": "token_embd",
    "positions": "position_embd",
    "embed_norm": "token_embd_norm",
    "final_norm": "output_norm",
    "head": "output",
}
LAYER = {
    "attn_norm": "attn_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.o": "attn_output",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
"""Canonical module to llama.cpp's name; `.weight` and `.bias` are the same on both sides."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one canonical tensor inside a GGUF tensor: row `to[r]` there is row `skip + r` here, `* times + add`
    (vectors only)."""

    name: str
    to: NDArray[np.intp]
    skip: int = 0
    times: float = 1.0
    add: float = 0.0


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of the file. Rows that no piece covers hold `fill`."""

    name: str
    shape: tuple[int, ...]
    """NumPy order: [rows, cols], [experts, rows, cols] or [n]."""
    matrix: bool
    """Whether it is written in whole rows; else number by number, as float32."""
    pieces: tuple[Piece, ...] = ()
    fill: float = 0.0
    type: str = ""
    """Its ggml type, whatever the level."""
    like: str = ""
    """A canonical tensor whose type it takes: a matrix of zeros that no tensor provides."""
    value: NDArray[np.float32] | None = field(default=None, repr=False)
    """A constant tensor (rotary divisors)."""


def slots(spec: Spec, fit: Fit) -> list[Slot]:
    """Every tensor of the file, in the order in which it is stored."""
    if fit is choose(spec):
        return list(_chosen(ByHash(spec)))
    return _slots(spec, fit)


@lru_cache(maxsize=4)
def _chosen(key: ByHash) -> list[Slot]:
    return _slots(key.spec, choose(key.spec))


def _slots(spec: Spec, fit: Fit) -> list[Slot]:
    known = {p.name: p for p in params(spec)}
    out = list(_top(spec, fit, known))
    for i, b in enumerate(spec.layers):
        out.extend(_layer(spec, fit, i, b, known))
    for name, value in fit.rotary.tensors.items():
        out.append(Slot(name, value.shape, matrix=False, value=value))
    return out


def _top(spec: Spec, fit: Fit, known: dict[str, Param]) -> Iterator[Slot]:
    c, d = fit.carrier, spec.width
    yield _whole("token_embd.weight", known["embed.weight"])
    if spec.embedding.positions is not None:
        skip = spec.embedding.positions.offset
        rows = np.arange(spec.context)
        yield Slot("position_embd.weight", (spec.context, d), True, (Piece("positions.weight", rows, skip),))
    if spec.embedding.norm is not None:
        yield from _norm("embed_norm", "token_embd_norm", spec.embedding.norm, d, c.norm_bias != "no", known)
    if spec.final_norm is not None:
        times = folded_logit_scale(spec, c)
        bias = c.norm_bias == "required" or spec.final_norm.bias
        yield from _norm("final_norm", "output_norm", spec.final_norm, d, bias, known, times)
    if not spec.head.tied:
        yield _whole("output.weight", known["head.weight"])
    elif c.tied == "no":
        yield _whole("output.weight", known["embed.weight"])
    if spec.head.bias or c.head_bias == "required":
        yield _vector("output.bias", [("head.bias", spec.vocab_size)], known)


def _whole(name: str, p: Param) -> Slot:
    return Slot(name, p.shape, p.matrix, (Piece(p.name, np.arange(p.shape[0])),))


def _vector(name: str, parts: list[tuple[str, int]], known: dict[str, Param], fill: float = 0.0) -> Slot:
    """Vectors one after the other; those that the spec lacks are left at `fill`."""
    pieces, at = [], 0
    for part, n in parts:
        if part in known:
            pieces.append(Piece(part, np.arange(at, at + n)))
        at += n
    return Slot(name, (at,), False, tuple(pieces), fill)


def _norm(
    name: str, external: str, n: Norm, size: int, bias: bool, known: dict[str, Param], times: float = 1.0
) -> Iterator[Slot]:
    rows = np.arange(size)
    gain = (Piece(f"{name}.weight", rows, times=times, add=n.offset * times),) if n.weight else ()
    yield Slot(f"{external}.weight", (size,), False, gain, fill=times)
    if bias:
        shift = (Piece(f"{name}.bias", rows, times=times),) if f"{name}.bias" in known else ()
        yield Slot(f"{external}.bias", (size,), False, shift)


def _layer(spec: Spec, fit: Fit, i: int, b: Block, known: dict[str, Param]) -> Iterator[Slot]:
    c, m, d = fit.carrier, b.mlp, spec.width
    bias = c.norm_bias == "required" or b.norm.bias
    blk, lay = f"blk.{i}", f"layers.{i}"

    def norm(name: str, source: str | None = None) -> Iterator[Slot]:
        yield from _norm(f"{lay}.{source or name}", f"{blk}.{LAYER[name]}", b.norm, d, bias, known)

    if b.pre:
        yield from norm("attn_norm")
    yield from _attention(fit, i, b, known)
    if b.post:
        yield from norm("attn_post_norm")
    if b.pre and not b.shared_norm:
        yield from _norm(f"{lay}.mlp_norm", f"{blk}.{c.mlp_norm}", b.norm, d, bias, known)
    elif b.pre and "parallel" in c.flow:
        yield from norm("mlp_norm", "attn_norm")
    yield from _mixture(c, blk, f"{lay}.mlp", m, d, known) if isinstance(m, MoE) else _dense(c, blk, lay, m, d, known)
    if b.post:
        yield from norm("mlp_post_norm")


def _fused(name: str, source: str, hidden: int, d: int) -> Slot:
    """Gate and up as one tensor, gate first."""
    rows = np.arange(hidden)
    pieces = (Piece(f"{source}.gate.weight", rows), Piece(f"{source}.up.weight", rows + hidden))
    return Slot(f"{name}.weight", (2 * hidden, d), True, pieces)


def _dense(c: Carrier, blk: str, lay: str, m: MLP, d: int, known: dict[str, Param]) -> Iterator[Slot]:
    if m.gated and c.fused_gate:
        yield _fused(f"{blk}.ffn_up", f"{lay}.mlp", m.hidden, d)
    else:
        for n in ("gate", "up") if m.gated else ("up",):
            yield _whole(f"{blk}.ffn_{n}.weight", known[f"{lay}.mlp.{n}.weight"])
    yield _whole(f"{blk}.ffn_down.weight", known[f"{lay}.mlp.down.weight"])
    sizes = {**({"gate": m.hidden} if m.gated else {}), "up": m.hidden, "down": d}
    for n, size in sizes.items():
        if f"{lay}.mlp.{n}.bias" in known or c.mlp_bias == "required":
            yield _vector(f"{blk}.ffn_{n}.bias", [(f"{lay}.mlp.{n}.bias", size)], known)


def _mixture(c: Carrier, blk: str, lay: str, m: MoE, d: int, known: dict[str, Param]) -> Iterator[Slot]:
    x, e = c.experts, m.experts
    assert x is not None, "a carrier with experts"
    yield replace(_whole(f"{blk}.ffn_gate_inp.weight", known[f"{lay}.router.weight"]), matrix=True, type="f32")
    if m.router.bias or x.bias == "required":
        yield _vector(f"{blk}.ffn_gate_inp.bias", [(f"{lay}.router.bias", e)], known)
    if m.router.correction or x.correction == "required":
        yield _vector(f"{blk}.{x.correction_name}", [(f"{lay}.router.correction", e)], known)
    shapes = {"gate": (m.hidden, d), "up": (m.hidden, d), "down": (d, m.hidden)}
    for n, shape in shapes.items():
        whole = _whole(f"{blk}.ffn_{n}_exps.weight", known[f"{lay}.experts.{n}.weight"])
        yield replace(whole, shape=(e, *shape))
        bias = f"{lay}.experts.{n}.bias"
        if bias in known or x.expert_bias == "required":
            vector = _vector(f"{blk}.ffn_{n}_exps.bias", [(bias, e * shape[0])], known)
            yield replace(vector, shape=(e, shape[0]))
    width = shared_width(m, x)
    shapes = {"gate": (width, d), "up": (width, d), "down": (d, width)} if width else {}
    for n, shape in shapes.items():
        if x.shared_fused and n != "down":
            if n == "up":
                yield _fused(f"{blk}.ffn_up_shexp", f"{lay}.shared", width, d)
        elif m.shared is None:
            yield Slot(f"{blk}.ffn_{n}_shexp.weight", shape, True, like=f"{lay}.experts.{n}.weight")
        else:
            yield _whole(f"{blk}.ffn_{n}_shexp.weight", known[f"{lay}.shared.{n}.weight"])
    if x.shared_gate:
        gate = _whole(f"{blk}.ffn_gate_inp_shexp.weight", known[f"{lay}.shared_gate.weight"])
        yield replace(gate, shape=(d,), matrix=True, type="f32")


def _attention(fit: Fit, i: int, b: Block, known: dict[str, Param]) -> Iterator[Slot]:
    c, a = fit.carrier, b.attention
    assert a.head_dim and a.kv_heads
    blk, lay, k = f"blk.{i}", f"layers.{i}.attn", a.head_dim
    sizes = {"q": a.heads * k, "k": a.kv_heads * k, "v": a.kv_heads * k}
    order = {n: _to(fit, b, n, size) for n, size in sizes.items()}
    starts = {"q": 0, "k": sizes["q"], "v": sizes["q"] + sizes["k"]}
    total = sum(sizes.values())
    d = known[f"{lay}.q.weight"].shape[1]
    for leaf, shape in (("weight", (total, d)), ("bias", (total,))):
        names = {n: f"{lay}.{n}.{leaf}" for n in sizes if f"{lay}.{n}.{leaf}" in known}
        required = leaf == "weight" or c.qkv_bias == "required"
        if c.fused_qkv and (names or required):
            pieces = tuple(Piece(names[n], order[n] + starts[n]) for n in names)
            yield Slot(f"{blk}.attn_qkv.{leaf}", shape, leaf == "weight", pieces)
        elif not c.fused_qkv:
            for n in names:
                piece = (Piece(names[n], order[n]),)
                yield Slot(f"{blk}.attn_{n}.{leaf}", (sizes[n], *shape[1:]), leaf == "weight", piece)
    if a.qk_norm is not None:
        yield from _qk_norm(fit, blk, lay, b, known)
    if a.sinks or c.sinks == "required":
        yield _vector(f"{blk}.attn_sinks.weight", [(f"{lay}.sinks", a.heads)], known, fill=-1e30)
    yield _whole(f"{blk}.attn_output.weight", known[f"{lay}.o.weight"])
    if a.bias.o or c.o_bias == "required":
        yield _vector(f"{blk}.attn_output.bias", [(f"{lay}.o.bias", d)], known)


def _to(fit: Fit, b: Block, part: str, rows: int) -> NDArray[np.intp]:
    """Destination of each row of q, k or v: rotated heads lie interleaved where the graph turns neighbours."""
    a = b.attention
    if part == "v" or fit.carrier.rope != "interleaved" or not isinstance(a.position, Rope):
        return np.arange(rows)
    assert a.head_dim
    return np.argsort(rope_order(rows, a.head_dim, a.position.rotary_dim(a.head_dim)))


def _qk_norm(fit: Fit, blk: str, lay: str, b: Block, known: dict[str, Param]) -> Iterator[Slot]:
    a, n, c = b.attention, b.attention.qk_norm, fit.carrier
    assert n and a.head_dim and a.kv_heads
    for part, heads in (("q", a.heads), ("k", a.kv_heads)):
        size = a.head_dim if n.over == "head" else heads * a.head_dim
        to = _to(fit, b, part, size)
        copies = heads if c.qk_over == "heads" else 1
        shape = (heads, size) if c.qk_over == "heads" else (size,)
        for leaf in ("weight", "bias") if n.bias else ("weight",):
            name = f"{lay}.{part}_norm.{leaf}"
            add = n.offset if leaf == "weight" else 0.0
            pieces = tuple(Piece(name, to + j * size, add=add) for j in range(copies)) if name in known else ()
            fill = 1.0 if leaf == "weight" else 0.0
            yield Slot(f"{blk}.attn_{part}_norm.{leaf}", shape, False, pieces, fill)
