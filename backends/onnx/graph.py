"""The whole graph: inputs, the one forward pass, outputs. Names of inputs and outputs are onnxruntime-genai's.

Shapes: B batch, T tokens of this call, P tokens in the cache before it, S tokens in the cache, G kv-heads, K head dim,
V vocab.

    cache "dynamic" (caches grow)                       cache "static" (caches of S slots, written in place)
    input_ids [B, T] int64                              input_ids [B, T] int64
    attention_mask [B, P + T] int64, 0 for padding      attention_mask [B, L] int64: only L >= P + T counts
                                                        write_indices [B] int64: P of each row
    past_key_values.{i}.key, .value [B, G, P, K]        past_key_values.{i}.key, .value [B, G, S, K]
    logits [B, T, V] float32                            logits [B, T, V] float32
    present.{i}.key, .value [B, G, P + T, K]            present.{i}.key, .value [B, G, S, K]

Dynamic: a token's position is the number of real tokens before it, so padding on either side and between does no harm;
the logits of padding mean nothing. Static: a token's position is its slot; the first L slots are attended to, so a row
may be padded on the right, and its next call overwrites the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import onnx_ir as ir

from backends.base import Planned
from backends.onnx.builder import CONTRIB, DTYPES, Builder
from backends.onnx.layout import Layout, Profile, layout
from backends.onnx.portable import Keys, Past, PortableOps, Weight
from spec.config import Alibi, Block, MoE, Spec
from spec.forward import hidden, logits
from spec.ops import Step
from spec.params import params
from spec.rope import rope_tables

X = ir.Value
CacheKind = Literal["dynamic", "static"]


def model(
    spec: Spec,
    planned: Sequence[Planned],
    *,
    profile: Profile = "portable",
    compute: str = "f32",
    activations: str = "",
    cache: CacheKind = "dynamic",
    slots: int | None = None,
    rows_first: bool = True,
    loops: bool = True,
) -> ir.Model:
    """The model of a spec whose tensors are stored at the planned levels, its weights in `layout.DATA` beside it.

    profile: `portable` (standard operators only) or `ort`. compute: dtype of activations and caches, `f32`, `f16` or
    `bf16`. activations: how products with codes take their inputs, `int8` or `float` (see `kernels.activations_of`).
    cache: see above; `static` (portable only) has opset 24 and `slots`, the length of the caches (default: the
    spec's context). rows_first, loops: how quantized embeddings are read and experts are run (see `PortableOps`).
    """
    places = layout(spec, planned, profile, compute, activations)
    g = Builder()
    b = _Graph(g, spec, places, None if cache == "dynamic" else slots or spec.context)
    ids = b.input("input_ids", "i64", ["batch", "tokens"])
    mask = b.input("attention_mask", "i64", ["batch", "total"])
    keys, step = b.growing(ids, mask) if b.slots is None else b.fixed(ids, mask)
    pasts = [b.past(i) for i in range(spec.depth)]
    if profile == "portable":
        ops = PortableOps(g, places, keys, rows_first, loops)
    else:
        from backends.onnx.contrib import OrtOps

        assert cache == "dynamic", "the fused attention keeps its own caches"
        ops = OrtOps(g, places, keys, rows_first)
    w = handles(spec)
    x, presents = hidden(ops, spec, w, ids, step, rope_tables(spec), pasts)
    assert presents is not None
    y = logits(ops, spec, w, x)
    if compute != "f32":
        g.rename(y, f"logits.{compute}")
    b.output(ops.widen(y), "logits", "f32", ["batch", "tokens", spec.vocab_size])
    for i, present in enumerate(presents):
        b.present(i, present)
    return b.finish(24 if cache == "static" else 23)


class _Graph:
    """Inputs and outputs around the forward pass."""

    def __init__(self, g: Builder, spec: Spec, places: Layout, slots: int | None) -> None:
        self.g, self.spec, self.places, self.slots = g, spec, places, slots
        self.inputs: list[X] = []
        self.outputs: list[X] = []

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> X:
        value = ir.Value(name=name, type=ir.TensorType(DTYPES[dtype]), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, x: X, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        self.g.rename(x, name)
        x.type, x.shape = ir.TensorType(DTYPES[dtype]), ir.Shape(shape)
        self.outputs.append(x)

    def _cache(self, i: int, grown: str) -> list[int | str]:
        a = self.spec.layers[i].attention
        assert a.kv_heads is not None and a.head_dim is not None, "a resolved layer"
        return ["batch", a.kv_heads, self.slots or grown, a.head_dim]

    def past(self, i: int) -> Past:
        """Layer i's cache as it comes in."""
        shape, dtype = self._cache(i, "past"), self.places.compute
        return Past(*(self.input(f"past_key_values.{i}.{kind}", dtype, shape) for kind in ("key", "value")))

    def present(self, i: int, present: Past) -> None:
        """Layer i's cache as it goes out."""
        for kind, x in (("key", present.key), ("value", present.value)):
            self.output(x, f"present.{i}.{kind}", self.places.compute, self._cache(i, "total"))

    def growing(self, ids: X, mask: X) -> tuple[Keys, Step[X]]:
        """Positions from the attention mask: the number of real tokens before each."""
        g = self.g
        count = g("CumSum", mask, g.constant(1, "i64"))
        slots = g("Max", g("Sub", count, g.constant(1, "i64")), g.constant(0, "i64"))  # [B, S]
        tokens, total = g("Shape", ids, start=1, end=2), g("Shape", mask, start=1, end=2)
        past = g("Sub", total, tokens)
        own = g.name(g("Slice", slots, past, total, g.ints(1)), "positions")  # [B, T]
        place = g("Range", g.constant(0, "i64"), g("Squeeze", total), g.constant(1, "i64"))
        place = g("Unsqueeze", place, g.ints(0))
        real = g("Greater", mask, g.constant(0, "i64"))
        keys = Keys(slots, real, place, g("Slice", place, past, total, g.ints(1)), mask=mask)
        return keys, Step("cached", own, own)

    def fixed(self, ids: X, mask: X) -> tuple[Keys, Step[X]]:
        """Positions from how many slots of each row are filled."""
        g = self.g
        write_indices = self.input("write_indices", "i64", ["batch"])
        zero, one = g.constant(0, "i64"), g.constant(1, "i64")
        tokens = g("Range", zero, g("Squeeze", g("Shape", ids, start=1, end=2)), one)
        own = g.name(g("Add", g("Unsqueeze", write_indices, g.ints(1)), g("Unsqueeze", tokens, g.ints(0))), "positions")
        length = g("Shape", mask, start=1, end=2)
        every = g("Unsqueeze", g("Range", zero, g("Squeeze", length), one), g.ints(0))
        return Keys(every, write_indices=write_indices, length=length), Step("cached", own, own)

    def finish(self, opset: int) -> ir.Model:
        """The model, without nodes that nothing needs."""
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        graph = ir.Graph(
            self.inputs, self.outputs, nodes=self.g.nodes, initializers=list(self.g.initializers.values()),
            opset_imports={"": opset, CONTRIB: 1}, name="decoder",
        )  # fmt: skip
        if not any(n.domain == CONTRIB for n in graph):
            del graph.opset_imports[CONTRIB]
        made = ir.Model(graph, ir_version=11, producer_name="allotrope")
        RemoveUnusedNodesPass()(made)
        return made


def handles(spec: Spec) -> SimpleNamespace:
    """The tree of weight handles that `spec.forward` walks."""
    named = {p.name for p in params(spec)}

    def handle(name: str, size: int = 0, weight: str | None = None) -> Weight:
        parts = [n if n in named else None for n in (weight or f"{name}.weight", f"{name}.bias")]
        return Weight(parts[0], parts[1], size)

    def feed_forward(at: str, experts: int = 0) -> SimpleNamespace:
        parts = {n: handle(f"{at}.{n}") for n in ("gate", "up", "down")}
        return SimpleNamespace(**{n: replace(h, experts=experts) for n, h in parts.items()})

    def mixture(at: str, m: MoE) -> SimpleNamespace:
        correction = f"{at}.router.correction" if m.router.correction else None
        return SimpleNamespace(
            router=replace(handle(f"{at}.router"), correction=correction),
            experts=feed_forward(f"{at}.experts", m.experts),
            shared=feed_forward(f"{at}.shared"),
            shared_gate=handle(f"{at}.shared_gate"),
        )

    def layer(i: int, b: Block) -> SimpleNamespace:
        a, at = b.attention, f"layers.{i}"
        assert a.kv_heads is not None and a.head_dim is not None, "a resolved layer"
        whole = a.qk_norm is not None and a.qk_norm.over == "width"
        attn = SimpleNamespace(
            q_norm=handle(f"{at}.attn.q_norm", a.head_dim * (a.heads if whole else 1)),
            k_norm=handle(f"{at}.attn.k_norm", a.head_dim * (a.kv_heads if whole else 1)),
            sinks=f"{at}.attn.sinks" if a.sinks else None,
            slopes=f"{at}.attn.slopes" if isinstance(a.position, Alibi) else None,
            **{n: handle(f"{at}.attn.{n}") for n in "qkvo"},
        )
        norms = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
        return SimpleNamespace(
            attn=attn,
            mlp=mixture(f"{at}.mlp", b.mlp) if isinstance(b.mlp, MoE) else feed_forward(f"{at}.mlp"),
            **{n: handle(f"{at}.{n}", spec.width) for n in norms},
        )

    return SimpleNamespace(
        embed=handle("embed"),
        positions=handle("positions"),
        embed_norm=handle("embed_norm", spec.width),
        final_norm=handle("final_norm", spec.width),
        head=handle("head", weight="embed.weight" if spec.head.tied else None),
        layers=[layer(i, b) for i, b in enumerate(spec.layers)],
    )
