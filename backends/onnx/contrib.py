"""ONNX Runtime's contributed operators in place of the standard ones where they compute the same.

Shapes: B batch, T query, S key, D model, H q-heads, G kv-heads, K head dim, N and K rows and columns of a matrix.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from backends.onnx import mixture
from backends.onnx.builder import CONTRIB, Builder
from backends.onnx.kernels import QMOE, SWISHES, Kernel, grouped_experts, kernel
from backends.onnx.layout import Layout
from backends.onnx.portable import Keys, Past, PortableOps, Rotation, Weight
from spec.config import Activation, Attention, MoE, Norm
from spec.levels import CODES, GROUPS
from spec.ops import Step

X = ir.Value


def accuracy_level(layout: Layout) -> int:
    """MatMulNBits' and QMoE's attribute: 4 quantizes their inputs to int8 on a CPU, 1 computes in float32, 0 in the
    type of the inputs."""
    return 4 if layout.activations == "int8" else int(layout.compute == "f32")


NEVER = 2**31 - 1
"""More tokens than any cache holds."""


class OrtOps(PortableOps):
    """See `PortableOps`. Heads stay side by side, [B, T, H, K], as the fused attention wants them; what splits and
    merges them for nothing is dropped with the graph's unused nodes."""

    def __init__(self, g: Builder, layout: Layout, keys: Keys, rows_first: bool = True) -> None:
        super().__init__(g, layout, keys, rows_first)
        self._beside: dict[X, X] = {}
        self._lengths: tuple[X, X] | None = None
        self._narrowed: dict[X, X] = {}

    def fused(self, kind: str, *inputs: X | None, **attributes: Any) -> X:
        """A contributed operator with one output."""
        return self.g(kind, *inputs, domain=CONTRIB, **attributes)

    # Products

    def looked_up(self, name: str, rows: X) -> X:
        codes, scales = self.layout.parts(name)
        level = self.layout.levels[name]
        bits, group = CODES[level], GROUPS[level]
        view = f"{codes.name}.rows", "u8", (codes.shape[0], scales.shape[1] * group * bits // 8)
        table = self.g.stored(codes, view)
        return self.fused(
            "GatherBlockQuantized", table, rows, self.g.stored(scales),
            bits=bits, block_size=group, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def linear(self, x: X, w: Weight) -> X:
        assert w.weight is not None
        level = self.layout.levels[w.weight]
        if level not in CODES or w.experts:
            return super().linear(x, w)
        codes, scales = self.layout.parts(w.weight)
        (n, groups), group = scales.shape, GROUPS[level]
        bias = None if w.bias is None else self.narrow(self.vector(w.bias))
        return self.fused(
            "MatMulNBits", x, self.g.stored(codes), self.g.stored(scales), None, None, bias,
            K=groups * group, N=n, bits=CODES[level], block_size=group, accuracy_level=accuracy_level(self.layout),
        )  # fmt: skip

    # Norms and activations

    def norm(self, x: X, w: Weight, norm: Norm) -> X:
        if x in self._beside:  # over each head: the same on heads that lie side by side
            return self._across(super().norm(self._beside[x], w, norm))
        return super().norm(x, w, norm)

    def add_norm(self, x: X, y: X, w: Weight, norm: Norm) -> tuple[X, X]:
        if self.compute != "f32":  # gains rounded to 16 bits cost as much as all the other roundings together
            return super().add_norm(x, y, w, norm)
        gain, bias = self.gain(w, norm), None if w.bias is None else self.vector(w.bias)
        if norm.kind == "layernorm":
            kind, inputs = "SkipLayerNormalization", (x, y, gain, bias)
        elif bias is None:
            kind, inputs = "SkipSimplifiedLayerNormalization", (x, y, gain)
        else:
            return super().add_norm(x, y, w, norm)
        out = self.g.several(kind, 4, *inputs, domain=CONTRIB, epsilon=norm.eps)
        return out[3], out[0]

    def act(self, x: X, kind: Activation) -> X:
        if kind in SWISHES:
            return self.fused("QuickGelu", x, alpha=SWISHES[kind])
        return super().act(x, kind)

    # Mixture of experts

    def experts(self, x: X, routes: tuple[X, X], w: Any, m: MoE) -> X:
        levels = {part: self.layout.levels[h.weight] for part, h in vars(w).items() if h.weight is not None}
        if not grouped_experts(m, self.layout.profile, self.compute, levels, self.layout.activations):
            return super().experts(x, routes, w, m)
        share = self.narrow(mixture.spread(self, routes, m))  # its largest are the chosen, whatever the router is
        kind: dict[str, Any] = {"activation_type": QMOE.get(m.activation)}
        if m.gated:
            clamped = m.activation == "clamped_swiglu"
            kind = {
                "activation_type": "swiglu", "swiglu_fusion": 1, "swiglu_limit": m.limit if clamped else None,
                "activation_alpha": m.alpha if clamped else SWISHES[m.activation], "activation_beta": float(clamped),
            }  # fmt: skip
        return self.fused(
            "QMoE", x, share, *self._joined(w.gate if m.gated else None, w.up, m), *self._joined(None, w.down, m),
            *[None] * 6, share, k=m.router.top_k, normalize_routing_weights=0, weights_prepacked=0,
            block_size=GROUPS[levels["up"]], accuracy_level=accuracy_level(self.layout),
            expert_weight_bits=CODES[levels["up"]], fc2_expert_weight_bits=CODES[levels["down"]], **kind,
        )  # fmt: skip

    def _joined(self, gate: Weight | None, w: Weight, m: MoE) -> tuple[X, X, X | None]:
        """Codes [E, N, K * bits / 8], scales [E, N, groups] and biases [E, N] of one of QMoE's two matrices; a gate's
        rows lie between those of `w`."""
        each, g = 1 if gate is None else 2, self.g
        first = w if gate is None else gate
        assert first.weight is not None
        codes, scales = self.layout.parts(first.weight)
        n, groups = scales.shape[0] // m.experts * each, scales.shape[1]
        level = self.layout.levels[first.weight]
        end = ".experts" if gate is None else ".pairs"
        nbytes = groups * GROUPS[level] * CODES[level] // 8
        held = g.stored(codes, (codes.name + end, "u8", (m.experts, n, nbytes)))
        scaled = g.stored(scales, (scales.name + end, scales.dtype, (m.experts, n, groups)))
        if w.bias is None:
            return held, scaled, None
        biases = [self.vector(h.bias) for h in (gate, w) if h is not None and h.bias is not None]
        columns = [g("Reshape", b, g.ints(m.experts, n // each, 1)) for b in biases]
        return held, scaled, self.narrow(g("Reshape", g("Concat", *columns, axis=-1), g.ints(m.experts, n)))

    # Heads and attention

    def _across(self, x: X) -> X:
        """[B, T, H, K] -> [B, H, T, K], remembering where it came from."""
        y = self.g("Transpose", x, perm=[0, 2, 1, 3])
        self._beside[y] = x
        return y

    def split_heads(self, x: X, head_dim: int) -> X:
        return self._across(self.g("Reshape", x, self.g.ints(0, 0, -1, head_dim)))

    def merge_heads(self, x: X) -> X:
        if x not in self._beside:
            return super().merge_heads(x)
        return self.g("Reshape", self._beside[x], self.g.ints(0, 0, -1))

    def attend(
        self, q: X, k: X, v: X, step: Step[X], cache: Past | None, rotation: Rotation | None, a: Attention, w: Any
    ) -> tuple[X, Past | None]:
        if kernel(a, "ort", self.compute) is not Kernel.GROUPED:
            return super().attend(q, k, v, step, cache, rotation, a, w)
        assert cache is not None and a.head_dim is not None
        last, total = self._filled()
        turned = (None, None) if rotation is None else tuple(self._table(t) for t in (rotation.cos, rotation.sin))
        sinks = None if w.sinks is None else self.narrow(self.vector(w.sinks))
        y, key, value = self.g.several(
            "GroupQueryAttention", 3, *(self.merge_heads(t) for t in (q, k, v)), cache.key, cache.value, last, total,
            *turned, None, None, sinks, domain=CONTRIB,
            num_heads=a.heads, kv_num_heads=a.kv_heads, scale=a.scale, do_rotary=int(rotation is not None),
            local_window_size=a.window or -1, softcap=a.softcap or 0.0,
        )  # fmt: skip
        return self.tap(self.split_heads(y, a.head_dim), "attn.heads"), Past(key, value)

    def _table(self, x: X) -> X:
        """A table of cosines or sines in the compute type, which the fused rotation wants."""
        if x not in self._narrowed:
            scope, self.g.scope = self.g.scope, ""
            self._narrowed[x] = self.narrow(x)
            self.g.scope = scope
        return self._narrowed[x]

    def _filled(self) -> tuple[X, X]:
        """For each row the slot of its last token [B], and the longest row's tokens, int32.

        GroupQueryAttention takes padding on the right only, and no mask to see that by. Padding on the left makes the
        total impossible, so that it refuses.
        """
        if self._lengths is None:
            g = self.g
            scope, g.scope = g.scope, ""
            assert self.keys.mask is not None
            last = g("Sub", g("ReduceSum", self.keys.mask, g.ints(1), keepdims=0), g.constant(1, "i64"))
            begun = g("ReduceMin", g("Slice", self.keys.mask, g.ints(0), g.ints(1), g.ints(1)), keepdims=0)
            total = g("Squeeze", g("Shape", self.keys.mask, start=1, end=2))
            total = g("Where", g("Greater", begun, g.constant(0, "i64")), total, g.constant(NEVER, "i64"))
            last, total = self.to(last, "i32"), self.to(total, "i32")
            self._lengths = g.name(last, "last_slots"), g.name(total, "total_tokens")
            g.scope = scope
        return self._lengths
