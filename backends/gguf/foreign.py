"""The spec of a GGUF file that another program wrote: a `Carrier`'s row read backwards.

The architecture says what the graph computes, metadata gives the numbers, and which tensors are there says what is
optional. What llama.cpp insists on and a model lacks is filled with neutral values by this program (`names`); they are
recognised and left out again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.gguf.carriers import CARRIERS, Carrier, Need
from backends.gguf.container import Header, read_rows
from backends.gguf.fit import CHECKS, NEUTRAL_CAP, Fit
from backends.gguf.foreign_experts import mixtures
from backends.gguf.foreign_rotary import rotations
from backends.gguf.keys import REQUIRED as _REQUIRED
from backends.gguf.keys import Keys
from backends.gguf.pack import dense, unpack
from backends.gguf.rotary import Rotary
from spec.config import Spec
from spec.errors import UserError, nearest
from spec.load import parse

NO_SINK = -1e30
"""A sink that takes no part: the softmax's term is 0."""


@dataclass(frozen=True)
class Foreign:
    """What a file turned out to be."""

    spec: Spec
    fit: Fit
    """Its carrier, as the file uses it, without rotary tensors."""
    spare: frozenset[str]
    """Tensors that are no part of the function: divisors of frequencies, which the spec says, and layers that guess
    further tokens."""
    notes: tuple[str, ...]


def read_foreign(header: Header, path: Path) -> Foreign:
    """The spec of a file. Raises `UserError` for an architecture that is not in the table, and `SpecError` with every
    key that is missing, unknown or of a value that a spec cannot say."""
    known = {c.arch: c for c in CARRIERS}
    if header.arch not in known:
        raise UserError(f"{path}: general.architecture: {header.arch!r} is none that is read "
                        f"({nearest(header.arch, known)}; known: {', '.join(sorted(known))})")  # fmt: skip
    if header.keys.get("general.type", "model") != "model":
        raise UserError(f"{path}: general.type: {header.keys['general.type']!r}, and only a model is read")
    return _Reading(known[header.arch], header, path).foreign()


class _Reading:
    """One file being read. H heads, K head dim."""

    def __init__(self, c: Carrier, header: Header, path: Path) -> None:
        self.c, self.header, self.path = c, header, path
        self.k = Keys(header.keys, c.arch, str(path), dict(c.keys))
        self.notes: list[str] = []
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.header.tensors

    def vector(self, name: str) -> NDArray[np.float32] | None:
        """A small tensor, flat."""
        info = self.header.tensors.get(name)
        if info is None:
            return None
        self.used.add(name)
        if info.rows * info.shape[-1] > 1 << 24:
            raise UserError(f"{self.path}: {name}: shape {list(info.shape)} is no vector's")
        with info.file.open("rb") as f:
            return dense(unpack(read_rows(f, info, 0, info.rows), info.type)).reshape(-1)

    def part(self, need: Need, names: list[str], neutral: float = 0.0) -> list[bool]:
        """Whether each of these vectors is a part of the model. Of those that the graph insists on, none is if all
        hold the neutral value."""
        present = [self.has(n) for n in names]
        if need != "required" or not all(present):
            return present
        values = (self.vector(n) for n in names)
        return [not all((v == neutral).all() for v in values if v is not None)] * len(names)

    def foreign(self) -> Foreign:
        c, k = self.c, self.k
        depth, width, context = (k.whole(n) for n in ("block_count", "embedding_length", "context_length"))
        depth = (depth or 0) - (k.whole("nextn_predict_layers", 0) or 0)
        self.spare = self._spare(depth)
        eps = k.number("attention.layer_norm_rms_epsilon" if c.norm == "rmsnorm" else "attention.layer_norm_epsilon")
        embed = self.header.tensors.get("token_embd.weight")
        if embed is None or len(embed.shape) != 2:
            raise UserError(f"{self.path}: no token_embd.weight: not a language model")
        if depth < 1 or not width or not context or depth > 4096:
            k.check()
            raise UserError(f"{self.path}: {depth} layers of width {width} and {context} tokens are no model")
        heads = k.layers("attention.head_count", depth, int)
        kv = k.layers("attention.head_count_kv", depth, int, heads)
        k.check()
        experts = mixtures(self, depth)
        hidden = k.layers("feed_forward_length", depth, int, 0 if all(experts) else _REQUIRED)
        k.check()
        assert heads and kv and hidden
        if not min(*heads, *kv, *(h for h, m in zip(hidden, experts, strict=True) if m is None), depth) > 0:
            raise UserError(f"{self.path}: a layer without heads or MLP is none that a spec has")
        head_dim = k.whole("attention.key_length", width // heads[0])
        for key in ("value_length", "key_length_swa", "value_length_swa"):
            if k.whole(f"attention.{key}", head_dim) != head_dim:
                k.bad(f"attention.{key}", f"is not the length of a head, {head_dim}")
        k.check()
        norm = {"kind": c.norm, "eps": eps, "bias": any(self.part(c.norm_bias, self._norm_biases(depth)))}
        windows = self._windows(depth, context)
        positions = self._positions(depth, head_dim, context, windows)
        k.check()
        attention = self._attention(depth, head_dim, width, heads[0], eps)
        blocks = [
            {
                "attention": {
                    **a, "heads": heads[i], "kv_heads": kv[i], "head_dim": head_dim, "position": positions[i],
                    "window": windows[i],
                },
                "mlp": experts[i] or {
                    "kind": "dense", "hidden": hidden[i], "gated": c.gated, "activation": c.activation, "bias": mlp,
                },
                "norm": norm, "placement": c.placement, **self._flow(i),
            }
            for i, (a, mlp) in enumerate(zip(attention, self._mlp_biases(depth), strict=True))
        ]  # fmt: skip
        residual = k.number("residual_scale", 0.0) if c.residual_scale else 1.0
        data: dict[str, Any] = {
            "name": self._name(), "vocab_size": embed.shape[0], "width": width, "depth": depth, "context": context,
            "embedding": self._embedding(norm, width),
            **layered([{**b, "residual_scale": residual or 1.0} for b in blocks]),
            "final_norm": norm, "head": self._head(),
        }  # fmt: skip
        k.done()
        return self._checked(parse(data, str(self.path)))

    def _spare(self, depth: int) -> frozenset[str]:
        """Tensors of layers that guess further tokens, which come behind the model's own and take no part in it."""
        layers = ((n, re.match(r"blk\.(\d+)\.", n)) for n in self.header.tensors)
        found = frozenset(n for n, m in layers if m is not None and int(m[1]) >= depth)
        declared = f"{self.c.arch}.nextn_predict_layers" in self.header.keys
        if found and declared:
            self.notes.append(f"{len(found)} tensors of layers that predict further tokens are left out")
        return found if declared else frozenset()

    def _name(self) -> str:
        text = str(self.header.keys.get("general.name", self.path.stem))
        return "".join(ch for ch in text if ch.isprintable() and ch != "\ufeff")[:128] or self.path.stem[:128]

    def _norm_biases(self, depth: int) -> list[str]:
        norms = [f"blk.{i}.{n}.bias" for i in range(depth) for n in ("attn_norm", self.c.mlp_norm)]
        return ["output_norm.bias", *(n for n in norms if self.has(n))]

    def _windows(self, depth: int, context: int) -> list[int | None]:
        """The window of each layer; `self.local` are those that the graph treats as layers with one."""
        c, k = self.c, self.k
        self.local = [False] * depth
        if c.window == "no" and not c.window_unused:
            if k.data.get(f"{c.arch}.attention.sliding_window", context) >= context:
                k.raw("attention.sliding_window")  # longer than any text
            return [None] * depth
        size = k.whole("attention.sliding_window", c.window_size or (None if c.window == "required" else 0))
        if size is None:
            k.bad("attention.sliding_window", "is missing")
        if not size:
            return [None] * depth
        if c.window_unused:
            if size >= context:
                return [None] * depth
            self.notes.append(f"{c.arch}.attention.sliding_window: {size}: the model's window; llama.cpp ignores it "
                              "with this architecture, so its answers differ beyond it")  # fmt: skip
            return [size] * depth
        pattern = k.raw("attention.sliding_window_pattern", c.window_period or None)
        if type(pattern) is int and pattern >= 0:
            still = 0 if c.window_after else pattern - 1
            self.local = [pattern == 0 or i % pattern != still for i in range(depth)]
        elif isinstance(pattern, list):
            self.local = k.layers("attention.sliding_window_pattern", depth, bool) or self.local
        else:
            k.bad("attention.sliding_window_pattern", "does not say which layers have the window")
        if all(self.local) and size == context:
            return [None] * depth  # stands for none where the graph insists on a window
        return [size if here else None for here in self.local]

    def _positions(self, depth: int, head_dim: int, context: int, windows: list[int | None]) -> list[Any]:
        c, k = self.c, self.k
        none = {"kind": "none"}
        if c.rope == "none":
            bias = {"no": 0.0, "8": 8.0, "key": None}[c.alibi]
            bias = k.number("attention.max_alibi_bias", 0.0) if bias is None else bias
            return [{"kind": "alibi", "max_bias": bias} if bias else none] * depth
        turning = [True] * depth
        if c.no_position == "all":
            turning = [bool(k.flag("rope.scaling.finetuned", True))] * depth
        elif c.no_position == "layer":
            turning = k.layers("attention.rope_pattern", depth, bool, [True] * depth) or turning
        elif c.no_position == "global":
            turning = self.local
        found = rotations(c, k, self.vector, head_dim, context, any(self.local))
        if not found:
            return [none] * depth
        full, local = found
        return [none if not t else local if here else full for t, here in zip(turning, self.local, strict=True)]

    def _attention(self, depth: int, head_dim: int, width: int, heads: int, eps: float) -> list[dict[str, Any]]:
        c, k = self.c, self.k
        scale = k.number("attention.scale", 0.0) or None if c.scale else None
        if depth == c.wide_scale_depth:
            scale = (width // heads) ** -0.5
        if scale is not None and abs(scale / head_dim**-0.5 - 1) <= 1e-7:
            scale = None
        softcap = k.number("attn_logit_softcapping", 50.0) if c.softcap == "required" else None
        clip = k.number("attention.clamp_kqv", 0.0) or None if c.clip else None
        self.fused = c.fused_qkv or self.has("blk.0.attn_qkv.weight")
        part = {"q": "qkv", "k": "qkv", "v": "qkv"} if self.fused else {"q": "q", "k": "k", "v": "v"}
        biases = {n: self.part(c.qkv_bias, [f"blk.{i}.attn_{p}.bias" for i in range(depth)]) for n, p in part.items()}
        biases["o"] = self.part(c.o_bias, [f"blk.{i}.attn_output.bias" for i in range(depth)])
        sinks = [False] * depth
        if c.sinks != "no":
            names = [f"blk.{i}.attn_sinks.weight" for i in range(depth)]
            sinks = self.part(c.sinks, names, float(np.float32(NO_SINK)))
        out = []
        for i in range(depth):
            qk = None
            if c.qk_norm == "required" or (c.qk_norm == "optional" and self.has(f"blk.{i}.attn_q_norm.weight")):
                over = "width" if c.qk_over == "width" else "head"
                bias = c.qk_bias != "no" and self.has(f"blk.{i}.attn_q_norm.bias")
                qk = {"kind": c.qk_kind, "over": over, "eps": eps, "bias": bias}
            out.append({
                "bias": {n: b[i] for n, b in biases.items()}, "scale": scale, "clip": clip, "sinks": sinks[i],
                "softcap": None if softcap is None or softcap >= NEUTRAL_CAP else softcap, "qk_norm": qk,
            })  # fmt: skip
        return out

    def _mlp_biases(self, depth: int) -> list[dict[str, bool]]:
        names = ("gate", "up", "down") if self.c.gated else ("up", "down")
        found = {n: self.part(self.c.mlp_bias, [f"blk.{i}.ffn_{n}.bias" for i in range(depth)]) for n in names}
        return [{n: b[i] for n, b in found.items()} for i in range(depth)]

    def _flow(self, i: int) -> dict[str, bool]:
        c = self.c
        if "parallel" in c.flow:
            parallel = bool(self.k.flag("use_parallel_residual"))
            return {"parallel": parallel, "shared_norm": False}
        shared = c.flow == ("shared",) or ("shared" in c.flow and not self.has(f"blk.{i}.{c.mlp_norm}.weight"))
        return {"parallel": shared, "shared_norm": shared}

    def _embedding(self, norm: dict[str, Any], width: int) -> dict[str, Any]:
        c = self.c
        scale = {"no": None, "sqrt_width": width**0.5}.get(c.embed_scale)
        if c.embed_scale == "key":
            scale = self.k.number("embedding_scale", 0.0)
        positions = c.positions == "required" or (c.positions == "optional" and self.has("position_embd.weight"))
        return {
            "scale": None if not scale or scale == 1 else scale,
            "positions": {} if positions else None,
            "norm": norm if c.embed_norm else None,
        }

    def _head(self) -> dict[str, Any]:
        c, k = self.c, self.k
        scale = None
        if c.logit_scale != "no":
            value = k.number("logit_scale") if c.logit_scale_required else k.number("logit_scale", 0.0)
            scale = None if not value else value if c.logit_scale == "times" else 1 / value
        softcap = None
        if c.logit_softcap != "no":
            softcap = k.number("final_logit_softcapping", 30.0 if c.logit_softcap == "required" else 0.0) or None
        return {
            "tied": c.tied == "forced" or (c.tied == "optional" and not self.has("output.weight")),
            "bias": c.head_bias != "no" and self.part(c.head_bias, ["output.bias"])[0],
            "scale": None if scale == 1 else scale,
            "softcap": None if softcap is None or softcap >= NEUTRAL_CAP else softcap,
        }

    def _checked(self, spec: Spec) -> Foreign:
        """With what the table itself says about such a spec, in the other direction."""
        c = self.c
        carrier = replace(c, fused_qkv=self.fused, window="optional" if c.window_unused else c.window)
        refusals = [f for check in CHECKS for f in check(spec, carrier) if isinstance(f, str)]
        if refusals:
            raise UserError("\n".join(f"{self.path}: {r}" for r in dict.fromkeys(refusals)))
        rotary = frozenset(n for n in self.used if n.startswith("rope_"))
        return Foreign(spec, Fit(carrier, (), (), Rotary()), rotary | self.spare, tuple(self.notes))


def layered(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """`block`, `pattern` and `overrides` for these layers: a pattern where they repeat within a dozen, else runs."""
    base = blocks[0]
    if all(b == base for b in blocks):
        return {"block": base}
    for period in range(2, min(12, len(blocks) // 2) + 1):
        if all(b == blocks[i % period] for i, b in enumerate(blocks)):
            return {"block": base, "pattern": [patch(base, b) for b in blocks[:period]]}
    overrides: dict[str, Any] = {}
    start = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[start]:
            if blocks[start] != base:
                overrides[str(start) if i == start + 1 else f"{start}..{i - 1}"] = patch(base, blocks[start])
            start = i
    return {"block": base, "overrides": overrides}


def patch(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What has to be laid over `base` to make `other`; another kind replaces the whole."""
    out: dict[str, Any] = {}
    for key, value in other.items():
        mine = base.get(key)
        if value == mine:
            continue
        both = isinstance(value, dict) and isinstance(mine, dict) and value.get("kind") == mine.get("kind")
        out[key] = patch(mine, value) if both else value  # type: ignore[arg-type]
    return out
