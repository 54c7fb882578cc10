"""The decoder's layers as torch modules. They hold parameters under the canonical names and are the weight handles of
the shared forward pass: `ops.linear(x, w)` is `w(x)`, so FSDP, tensor parallelism, LoRA and quantized layers keep
working. `Attention`, `MLP` and `MoE` are only containers; `Block` runs the shared `spec.forward.block`.

Shapes: B batch, T query, D model, H q-heads, G kv-heads, K head dim, V vocab, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.torch.loss import Criterion, chunked_loss, cross_entropy_sum
from spec import config, forward
from spec.rope import RopeTable, alibi_slopes

HALF = (torch.float16, torch.bfloat16)


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, widened if it is a 16-bit float."""
    return x.float() if x.dtype in HALF else x


class Constants(nn.Module):
    """A module with float32 constants: buffers that no checkpoint holds, that a cast of the model leaves at float32
    and that come back from the meta device with their values."""

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}

    def constant(self, name: str, values: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Register a constant; it is then an attribute `name`."""
        self._constants[name] = values
        self.register_buffer(name, torch.from_numpy(values.copy()), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        super()._apply(fn, recurse)
        self.restore()
        return self

    def restore(self) -> None:
        """Give the constants their values again, on the device that they are on."""
        for name, values in self._constants.items():
            device = self._buffers[name].device  # type: ignore[union-attr]
            self._buffers[name] = torch.from_numpy(values.copy()).to(device)


class Rotation:
    """cos and sin of one table for one step, [B, T, rotary_dim]: each twice, the first sines negative.

    A plain class: FSDP casts a block's inputs to 16 bits, inside tuples and dataclasses too.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin


class Rotary(Constants):
    """A rotary table; called once a step with positions [B, T]."""

    inv_freq: Tensor

    def __init__(self, table: RopeTable) -> None:
        super().__init__()
        self.factor = table.factor
        self.constant("inv_freq", table.inv_freq)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angle = positions[..., None].to(dtype) * self.inv_freq.to(dtype)
        cos, sin = angle.cos() * self.factor, angle.sin() * self.factor
        return Rotation(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in at least float32."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: config.Norm, size: int) -> None:
        super().__init__()
        self.rms, self.eps, self.offset = norm.kind == "rmsnorm", norm.eps, norm.offset
        self.register_parameter("weight", nn.Parameter(torch.full((size,), 1 - norm.offset)) if norm.weight else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(size)) if norm.bias else None)

    def forward(self, x: Tensor) -> Tensor:
        h, size = at_least_float32(x), x.shape[-1:]
        weight = None if self.weight is None else self.weight.to(h.dtype)
        if weight is not None and self.offset:
            weight = weight + self.offset
        bias = None if self.bias is None else self.bias.to(h.dtype)
        if not self.rms:
            return F.layer_norm(h, size, weight, bias, self.eps).to(x.dtype)
        h = F.rms_norm(h, size, weight, self.eps)
        return (h if bias is None else h + bias).to(x.dtype)


class Attention(Constants):
    """The parameters of one attention; `kind` is its index among the model's distinct attention settings."""

    sinks: nn.Parameter | None
    slopes: Tensor | None

    def __init__(self, a: config.Attention, width: int, kind: int) -> None:
        super().__init__()
        assert a.kv_heads is not None and a.head_dim is not None, "a resolved layer"
        self.kind = kind
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        self.q = nn.Linear(width, q, bias=a.bias.q)
        self.k = nn.Linear(width, kv, bias=a.bias.k)
        self.v = nn.Linear(width, kv, bias=a.bias.v)
        if a.qk_norm is not None:
            head = a.qk_norm.over == "head"
            self.q_norm = Norm(a.qk_norm, a.head_dim if head else q)
            self.k_norm = Norm(a.qk_norm, a.head_dim if head else kv)
        self.register_parameter("sinks", nn.Parameter(torch.zeros(a.heads)) if a.sinks else None)
        if isinstance(a.position, config.Alibi):
            self.constant("slopes", alibi_slopes(a.position, a.heads))
        else:
            self.register_buffer("slopes", None, persistent=False)
        self.o = nn.Linear(q, width, bias=a.bias.o)


class MLP(nn.Module):
    """The parameters of one feed-forward network."""

    def __init__(self, m: config.FeedForward, width: int) -> None:
        super().__init__()
        if m.gated:
            self.gate = nn.Linear(width, m.hidden, bias=m.bias.gate)
        self.up = nn.Linear(width, m.hidden, bias=m.bias.up)
        self.down = nn.Linear(m.hidden, width, bias=m.bias.down)


class Scores(nn.Module):
    """A small linear that decides. No `nn.Linear`: what adapts or quantizes every linear of a model leaves it alone."""

    bias: nn.Parameter | None

    def __init__(self, width: int, out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., out] in at least float32, under autocast too: a choice is no matter of rounding."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else at_least_float32(self.bias)
            return F.linear(at_least_float32(x), at_least_float32(self.weight), bias)


class Router(Scores):
    """The scores' linear, and the correction that joins them for the choice."""

    correction: nn.Parameter | None
    statistics: Tensor | None
    """A leaf whose gradient counts what was routed (`balance.Routed`), where somebody wants to know."""

    def __init__(self, m: config.MoE, width: int) -> None:
        super().__init__(width, m.experts, m.router.bias)
        self.statistics = None
        # the choice of experts has no gradient, so what only the choice reads has none
        correction = nn.Parameter(torch.zeros(m.experts), requires_grad=False) if m.router.correction else None
        self.register_parameter("correction", correction)


class GroupedLinear(nn.Module):
    """The same linear of every expert, one below the other: weight [E * out, in], bias [E * out]."""

    bias: nn.Parameter | None

    def __init__(self, experts: int, into: int, out: int, bias: bool) -> None:
        super().__init__()
        self.experts, self.out = experts, out
        self.weight = nn.Parameter(torch.empty(experts * out, into))
        self.register_parameter("bias", nn.Parameter(torch.zeros(experts * out)) if bias else None)

    def forward(self, x: Tensor, counts: Tensor, owner: Tensor) -> Tensor:
        """[N, in] -> [N, out]. The first counts[0] rows are expert 0's, and so on; `owner` [N] is each row's expert.

        Of a weight that is spread over ranks, the experts of this one are meant.
        """
        weight = _local(self.weight).unflatten(0, (-1, self.out))
        if self._grouped(x):
            y = F.grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
        elif torch.compiler.is_compiling():  # every expert over every row, rather than a graph cut at the counts
            y = x.new_zeros(x.shape[0], self.out)
            for e in range(weight.shape[0]):
                y = torch.where(owner[:, None] == e, F.linear(x, weight[e].to(x.dtype)), y)
        else:
            parts = x.split(counts.tolist())
            y = torch.cat([F.linear(part, w.to(x.dtype)) for part, w in zip(parts, weight, strict=True)])
        return y if self.bias is None else y + _local(self.bias).unflatten(0, (-1, self.out))[owner].to(y.dtype)

    def _grouped(self, x: Tensor) -> bool:
        """Whether torch's grouped product takes it: rows of whole 16 bytes on both sides, and not float64; in a graph
        bfloat16 on CUDA alone (the shapes' rule of torch 2.13 knows no other)."""
        aligned = all(n * x.element_size() % 16 == 0 for n in (x.shape[-1], self.out))
        if torch.compiler.is_compiling():
            return aligned and x.dtype == torch.bfloat16 and x.is_cuda
        return aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _local(t: Tensor) -> Tensor:
    to_local = getattr(t, "to_local", None)
    return t if to_local is None else to_local()


class _Sorted:
    """Handles of all experts' layers for rows that are sorted by expert."""

    def __init__(self, experts: Experts, counts: Tensor, owner: Tensor) -> None:
        for name, part in experts.named_children():
            setattr(self, name, functools.partial(part, counts=counts, owner=owner))


class Experts(nn.Module):
    """The feed-forward networks of a layer's experts."""

    def __init__(self, m: config.MoE, width: int) -> None:
        super().__init__()
        self.exchange: Any = None
        """Carries rows to the ranks that have their experts and back (`sharing.Exchange`), where ranks share them."""
        if m.gated:
            self.gate = GroupedLinear(m.experts, width, m.hidden, m.bias.gate)
        self.up = GroupedLinear(m.experts, width, m.hidden, m.bias.up)
        self.down = GroupedLinear(m.experts, m.hidden, width, m.bias.down)

    def forward(self, ops: Any, x: Tensor, chosen: Tensor, weights: Tensor, m: config.MoE) -> Tensor:
        """x [B, T, D], chosen and weights [B, T, k] -> [B, T, D]: tokens sorted by expert, and back."""
        flat, k = x.flatten(0, -2), chosen.shape[-1]
        order = chosen.flatten().argsort(stable=True)
        owner = chosen.flatten()[order]
        counts = (owner[:, None] == torch.arange(m.experts, device=owner.device)).sum(0)

        def compute(rows: Tensor, counts: Tensor, owner: Tensor) -> Tensor:
            return forward.dense(ops.untapped(), m, _Sorted(self, counts, owner), rows)

        rows = flat[order // k]
        y = compute(rows, counts, owner) if self.exchange is None else self.exchange(rows, counts, compute)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        y = y[back].unflatten(0, (-1, k)) * weights.flatten(0, -2)[..., None].to(y.dtype)
        return y.sum(1).view_as(x)


class MoE(nn.Module):
    """The parameters of one mixture of experts."""

    def __init__(self, m: config.MoE, width: int) -> None:
        super().__init__()
        self.router = Router(m, width)
        self.experts = Experts(m, width)
        if m.shared is not None:
            self.shared = MLP(m.shared_mlp, width)
            if m.shared.gate:
                self.shared_gate = Scores(width, 1)


class Block(nn.Module):
    """One decoder layer. Holds no layer index, so that equal layers share one compiled graph."""

    def __init__(self, b: config.Block, width: int, kind: int) -> None:
        super().__init__()
        self.spec = b
        if b.pre:
            self.attn_norm = Norm(b.norm, width)
        self.attn = Attention(b.attention, width, kind)
        if b.post:
            self.attn_post_norm = Norm(b.norm, width)
        if b.pre and not b.shared_norm:
            self.mlp_norm = Norm(b.norm, width)
        self.mlp = MoE(b.mlp, width) if isinstance(b.mlp, config.MoE) else MLP(b.mlp, width)
        if b.post:
            self.mlp_post_norm = Norm(b.norm, width)

    def forward(self, ops: Any, x: Tensor, step: Any, rotation: Any, cache: Any = None) -> tuple[Tensor, Any]:
        """[B, T, D] -> [B, T, D], and the layer's cache."""
        return forward.block(ops, self.spec, self, x, step, rotation, cache)


def _bare(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return linear(x)


class Head(nn.Module):
    """The output projection. A tied one has no weight of its own and reads the embedding's, which must then share its
    FSDP group (the root)."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, spec: config.Spec, embed: nn.Embedding) -> None:
        super().__init__()
        self._tied: tuple[Any, ...] = ()
        if spec.head.tied:
            self.tie(embed)
        else:
            self.weight = nn.Parameter(torch.empty(spec.vocab_size, spec.width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(spec.vocab_size)) if spec.head.bias else None)

    @property
    def tied(self) -> bool:
        """Whether it reads the embedding's weight."""
        return bool(self._tied)

    def tie(self, embed: nn.Module) -> None:
        """Read this embedding's weight from now on."""
        self._tied = (embed,)  # in a tuple: a registered submodule would name its weight twice

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._tied:
            return self._tied[0].weight
        return super().__getattr__(name)

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        logits: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None = None,
        criterion: Criterion = cross_entropy_sum,
        extras: Sequence[Tensor] = (),
    ) -> Tensor:
        """[B, T, D] -> the bare linear's [B, T, V]; with targets [B, T] (and extras [B, T, ...]) the summed loss.

        `logits(linear, x)` turns a chunk of hidden states into logits (scale and softcap included); the whole batch's
        logits never exist.
        """
        weight = self._tied[0].weight if self._tied else self.weight
        if targets is None:
            return F.linear(x, weight, self.bias)
        finish = logits if logits is not None else _bare

        def chunk_logits(chunk: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return finish(lambda h: F.linear(h, weight, bias), chunk)

        rows = [targets.flatten(), *(e.flatten(0, 1) for e in extras)]
        return chunked_loss(x.flatten(0, -2), weight, self.bias, rows, chunk_logits, criterion)
