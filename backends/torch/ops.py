"""The decoder's vocabulary in torch: weight handles are the layers themselves.

Shapes: B batch, T query, S key, D model, H q-heads, G kv-heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.torch.attention import KERNELS, Plan
from backends.torch.balance import Routed
from backends.torch.cache import LayerCache
from backends.torch.modules import Rotation, at_least_float32
from spec.config import Activation, Attention, Block, MoE, Norm
from spec.ops import Ops, Step

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class TorchOps(Ops[Tensor, Any, LayerCache]):
    """Operations of one forward pass (no dataclass: FSDP takes those apart).

    plans: the attention plan of each kind of attention (`Attention.kind`). training: whether dropout drops.
    angle_dtype: in which angles, cosines and sines are computed. taps: where intermediates go, by canonical name
    (`L3.attn.q_rope`). routed: what routers are trained for beside the loss.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        training: bool = False,
        angle_dtype: torch.dtype = torch.float32,
        taps: dict[str, Tensor] | None = None,
        routed: Routed | None = None,
    ) -> None:
        self.plans, self.training, self.angle_dtype, self.taps = plans, training, angle_dtype, taps
        self.routed = routed
        self.prefix = ""

    def embed(self, ids: Tensor, w: Any, offset: int = 0) -> Tensor:
        return w(ids + offset if offset else ids)

    def linear(self, x: Tensor, w: Any) -> Tensor:
        return w(x)

    def unembed(self, x: Tensor, w: Any) -> Tensor:
        return w(x)

    def last(self, x: Tensor, step: Step[Tensor]) -> Tensor:
        return x[:, -1:]

    def norm(self, x: Tensor, w: Any, norm: Norm) -> Tensor:
        return w(x)

    def act(self, x: Tensor, kind: Activation) -> Tensor:
        return ACTIVATIONS[kind](x)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    def clip(self, x: Tensor, low: float | None, high: float | None) -> Tensor:
        return x.clamp(low, high)

    def drop(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p) if self.training and p else x

    def cast(self, x: Tensor) -> Tensor:
        """The embedding's dtype is the residual stream's: FSDP's policy or the model's own dtype decides."""
        return x

    def split_heads(self, x: Tensor, head_dim: int) -> Tensor:
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def rotation(self, table: Any, step: Step[Tensor]) -> Rotation:
        """`table` is the `Rotary` module that holds the table on the device."""
        return table(step.positions, self.angle_dtype)

    def rope(self, x: Tensor, rotation: Rotation) -> Tensor:
        cos, sin = rotation.cos[:, None], rotation.sin[:, None]
        size = cos.shape[-1]
        whole = size == x.shape[-1]
        part = x if whole else x[..., :size]
        if (
            torch.compiler.is_compiling()
        ):  # which fuses this into one pass, and the shorter form below into a slower one
            (a, b), c, s = part.chunk(2, -1), cos[..., : size // 2], sin[..., size // 2 :]
            turned = torch.cat([a * c - b * s, b * c + a * s], -1)
        else:
            turned = torch.addcmul(part * cos, part.roll(size // 2, -1), sin)
        turned = turned.to(x.dtype)  # in the dtype of cos, then rounded
        return turned if whole else torch.cat([turned, x[..., size:]], -1)

    def store(
        self, k: Tensor, v: Tensor, step: Step[Tensor], cache: LayerCache | None
    ) -> tuple[Tensor, Tensor, Any, LayerCache | None]:
        if cache is None:
            return k, v, step.slots, None
        k, v, slots = cache.store(k, v)
        return k, v, slots[None], cache

    def mix(self, q: Tensor, k: Tensor, v: Tensor, step: Step[Tensor], key_slots: Any, a: Attention, w: Any) -> Tensor:
        """The plan already knows the slots: masks are built from them before the first layer."""
        plan = self.plans[w.kind]
        return self.tap(KERNELS[plan.kernel](q, k, v, plan, a, w), "attn.heads")

    def route(self, x: Tensor, w: Any, m: MoE) -> tuple[Tensor, Tensor]:
        """The chosen experts [B, T, k], and their weights in at least float32."""
        r, logits = m.router, at_least_float32(w(x))
        scores = logits.softmax(-1) if r.score == "softmax" else logits.sigmoid()
        ranked = scores if w.correction is None else scores + w.correction.to(scores.dtype)
        ranked = self.tap(ranked, "mlp.scores")
        chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : r.top_k]  # topk takes any of equals
        weights = scores.gather(-1, chosen)
        if r.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * r.scale
        if self.routed is not None and w.statistics is not None:
            weights = self.routed(weights, logits, scores, chosen, w.statistics, self.total)
        return chosen, weights

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks that have tokens of the same rows."""
        return x

    def experts(self, x: Tensor, routes: tuple[Tensor, Tensor], w: Any, m: MoE) -> Tensor:
        return w(self, x, *routes, m)

    def gate(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y.sigmoid()).to(x.dtype)

    def untapped(self) -> TorchOps:
        """The same operations, whose intermediates have no name."""
        if self.taps is None:
            return self
        return TorchOps(self.plans, self.training, self.angle_dtype)

    def call(
        self, i: int, b: Block, w: Any, x: Tensor, step: Step[Tensor], rotation: Any, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache | None]:
        self.prefix = f"L{i}." if self.taps is not None else ""
        x, cache = w(self, x, step, rotation, cache)
        self.prefix = ""
        return x, cache

    def tap(self, x: Tensor, name: str) -> Tensor:
        if self.taps is not None:
            self.taps[self.prefix + name] = x.detach()
        return x
