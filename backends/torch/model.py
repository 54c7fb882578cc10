"""The decoder as a torch module: the shared forward pass over modules that bear the canonical names.

Shapes: B batch, T tokens, D model, V vocab.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch.attention import Request, chosen, plan
from backends.torch.balance import Balance
from backends.torch.cache import Cache, full
from backends.torch.loss import Criterion, cross_entropy_sum
from backends.torch.modules import Block, Head, Norm, Rotary
from backends.torch.ops import TorchOps
from spec import forward
from spec.config import Attention, Spec
from spec.errors import UserError
from spec.ops import Step
from spec.params import Param, params
from spec.rope import rope_tables


def assemble(module: nn.Module, spec: Spec, length: int) -> list[Attention]:
    """Give a module the decoder's layers, under the canonical names, and the rotary tables for sequences of `length`.

    Returns the distinct attention settings, which `Attention.kind` counts.
    """
    positions = spec.embedding.positions
    if positions is not None and length + positions.offset > spec.position_rows:
        rows = spec.position_rows - positions.offset
        raise UserError(f"length: {length} tokens need more than the {rows} learned positions (use {rows})")
    kinds = list(dict.fromkeys(b.attention for b in spec.layers))
    module.embed = nn.Embedding(spec.vocab_size, spec.width)
    if positions is not None:
        module.positions = nn.Embedding(spec.position_rows, spec.width)
    if spec.embedding.norm is not None:
        module.embed_norm = Norm(spec.embedding.norm, spec.width)
    module.layers = nn.ModuleList(Block(b, spec.width, kinds.index(b.attention)) for b in spec.layers)
    if spec.final_norm is not None:
        module.final_norm = Norm(spec.final_norm, spec.width)
    module.head = Head(spec, module.embed)
    module.rope = nn.ModuleList(Rotary(t) for t in rope_tables(spec, length))
    return kinds


def computed_in(weight: Tensor, device: torch.device) -> torch.dtype:
    """The dtype of queries and keys: autocast's where it is on, else the weights'."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype


def angles_in(weight: Tensor) -> torch.dtype:
    """The dtype of rotary angles, by the weights'."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class Decoder(nn.Module):
    """A decoder transformer.

    `length` is the longest sequence it will see, in tokens (default: the spec's context); the length-dependent rotary
    scalings choose their tables by it. `attention` names the kernel (`attention.Setting`); the choice and its reason
    are logged. Parameters have the names of `spec.params`; they are uninitialised until `init_weights` or a checkpoint
    fills them.
    """

    embed: nn.Embedding
    layers: nn.ModuleList
    head: Head
    rope: nn.ModuleList

    def __init__(self, spec: Spec, *, length: int | None = None, attention: str = "auto") -> None:
        super().__init__()
        self.spec, self.length, self.attention = spec, length or spec.context, attention
        self.kinds = assemble(self, spec, self.length)
        self.span = range(spec.depth)
        self.strict = False
        """Whether attention on a GPU must not fall back to the reference mathematics."""
        self.share: Any = None
        """This rank's part (`sharing.Share`), where several ranks compute each layer together."""
        self.balance: Balance | None = None
        """What routers are trained for beside the loss."""

    def keep(self, span: range) -> None:
        """Become the stage of a pipeline that holds these layers: the first one embeds, the last one has the head."""
        self.span = span
        for i in set(range(self.spec.depth)) - set(span):
            self.layers.register_module(str(i), None)  # the others keep their names
        gone = () if self.begins else ("embed", "positions", "embed_norm")
        for name in (*gone, *(() if self.ends else ("final_norm", "head"))):
            self._modules.pop(name, None)

    @property
    def begins(self) -> bool:
        """Whether it takes token ids."""
        return self.span.start == 0

    @property
    def ends(self) -> bool:
        """Whether it has the head."""
        return self.span.stop == self.spec.depth

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        last: bool = False,
        criterion: Criterion = cross_entropy_sum,
        extras: Sequence[Tensor] = (),
        hidden: bool = False,
        taps: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """ids [B, T] -> logits [B, T, V]; with targets [B, T] (-100 = ignored) the float32 sum of their losses.

        `segments` [B, T] packs several documents into a row: the tokens of one bear one number, which does not come
        back after another's, and none sees another's. `positions` [B, T] default to the place within the document.
        With a `cache` the tokens continue it. `last` keeps only the last position's logits, [B, 1, V].
        `criterion(logits [N, V], targets [N], *extras)` replaces the summed cross-entropy; `extras` [B, T, ...] are cut
        into the same rows. `hidden` stops before the head, [B, T, D]. `taps` receives every named intermediate. A
        pipeline's stage takes the residual stream [B, T, D] in place of ids, or gives it in place of logits.

        Of ranks that share each layer, every one gives the loss of its part of the T tokens, or all logits; between
        stages its part travels, [B, T/n, D].

        Raises `UserError` for sequences beyond `length` or beyond the cache's end.
        """
        step, start = self._step(self._tokens(ids), positions, segments, cache)
        weight = self.embed.weight if self.begins else ids
        dtype = computed_in(weight, ids.device)
        request = Request(step, start, dtype, self.training, torch.is_grad_enabled(), strict=self.strict)
        plans = [plan(a, self.attention, request) for a in self.kinds]
        routed = None
        if self.balance is not None and targets is not None and self.training:
            routed = self.balance.of(targets, segments, self._part)
        ops = self._ops(request.tokens, plans, self.training, angles_in(weight), taps, routed)
        tables: Any = self.rope
        part, here = self._part, replace(step, positions=self._part(step.positions))
        x = forward.begin(ops, self.spec, self, part(ids), here) if self.begins else ids
        x, _ = forward.blocks(ops, self.spec, self, x, step, tables, cache, self.span)
        if not self.ends:
            return x
        x = forward.end(ops, self.spec, self, x)
        if hidden:
            return x
        if targets is None and self.share is not None:
            x = self.share.gather(x, request.tokens).to_local()
        if last:
            x = ops.last(x, step)
        if targets is None:
            return forward.logits(ops, self.spec, self, x)

        def chunk_logits(linear: Callable[[Tensor], Tensor], chunk: Tensor) -> Tensor:
            return forward.logits(ops, self.spec, SimpleNamespace(head=linear), chunk)

        return self.head(x, part(targets), chunk_logits, criterion, [part(e) for e in extras])

    def _tokens(self, ids: Tensor) -> Tensor:
        """Something [B, T] of what the forward pass was given."""
        if ids.dim() != 3:
            return ids
        return ids[..., 0] if self.share is None else ids[..., 0].repeat(1, self.share.size)

    def _part(self, x: Tensor) -> Tensor:
        """This rank's part of the tokens of x [B, T, ...]."""
        return x if self.share is None else self.share.part(x, 1)

    def _ops(self, tokens: int, *options: Any) -> TorchOps:
        if self.share is None:
            return TorchOps(*options)
        from backends.torch.sharing import SharedOps

        return SharedOps(self.share, tokens, *options)

    def _step(
        self, ids: Tensor, positions: Tensor | None, segments: Tensor | None, cache: Cache | None
    ) -> tuple[Step[Tensor], int]:
        if ids.dim() != 2:
            raise UserError(f"ids: shape {tuple(ids.shape)} is not [batch, tokens]")
        if cache is not None and segments is not None:
            raise UserError("segments: documents cannot be packed into a cache (give each a row)")
        (batch, tokens), start = ids.shape, 0 if cache is None else cache.length
        if cache is not None and start + tokens > cache.capacity:
            raise full(start, tokens, cache.capacity)
        if cache is not None and batch != cache.batch:
            raise UserError(f"ids: {batch} rows, and the cache was made for {cache.batch}")
        if start + tokens > self.length:
            raise UserError(f"ids: {start + tokens} tokens exceed the declared length of {self.length}")
        slots = torch.arange(start, start + tokens, device=ids.device).expand(batch, tokens)
        if positions is None:
            positions = slots if segments is None else within_documents(segments)
        layout = "cached" if cache is not None else "causal" if segments is None else "packed"
        return Step(layout, positions, slots, segments), start

    def new_cache(self, batch: int = 1, length: int | None = None) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens (default: the declared length)."""
        length = length or self.length
        if length > self.length:
            raise UserError(f"cache: {length} slots exceed the declared length of {self.length}")
        return Cache(batch, length, [b.attention.window for b in self.spec.layers])

    @torch.no_grad()
    def step(self, ids: Tensor, cache: Cache, *, last: bool = False) -> Tensor:
        """Continue (or begin) a cached sequence by ids [B, T]: logits [B, T, V], or [B, 1, V] with `last`.

        Compiled blocks run eagerly here, since the cache's shapes change with every token.
        """
        with torch.compiler.set_stance("force_eager"):
            return self(ids, cache=cache, last=last)

    def prefill_cache(self, ids: Tensor, length: int | None = None) -> tuple[Tensor, Cache]:
        """Begin a sequence with ids [B, T]: the last token's logits [B, V], and the cache."""
        cache = self.new_cache(ids.shape[0], length)
        return self.step(ids, cache, last=True)[:, 0], cache

    def kernels(self, tokens: int, *, packed: bool = False, dtype: torch.dtype | None = None) -> dict[str, str]:
        """Which kernel a training step over `tokens` tokens will use and why, for each distinct attention setting."""
        weight = next(self.parameters())
        return chosen(
            self.kinds,
            self.attention,
            tokens,
            device=weight.device,
            dtype=dtype or weight.dtype,
            packed=packed,
            training=self.training,
            strict=self.strict,
        )

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter as `spec.init` says.

        Each parameter has its own generator, seeded by `seed` and its name: the values depend on neither the device
        nor how the parameters are sharded.
        """
        own = dict(self.named_parameters())
        for p in params(self.spec):
            if p.name in own:
                assign(own[p.name], initial(self.spec, p, seed))


def within_documents(segments: Tensor) -> Tensor:
    """[B, T] place of each token in its document, where documents are runs of equal segments."""
    places = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - torch.where(first, places, 0).cummax(1).values


def initial(spec: Spec, p: Param, seed: int) -> Tensor:
    """Initial values of one parameter, float32 on the CPU."""
    i = spec.init
    if p.role in ("bias", "sinks"):
        return torch.zeros(p.shape)
    if p.role == "gain":
        return torch.full(p.shape, 1.0 - _gain_offset(spec, p.name))
    std = i.embed_std if p.role == "embedding" and i.embed_std is not None else i.std
    if i.depth_scaled and p.name.endswith((".o.weight", ".down.weight")):
        std /= (2 * spec.depth) ** 0.5
    digest = hashlib.sha256(f"{seed}:{p.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(p.shape).normal_(0.0, std, generator=generator)


def _gain_offset(spec: Spec, name: str) -> float:
    if not name.startswith("layers."):
        norm = spec.embedding.norm if name.startswith("embed_norm") else spec.final_norm
    else:
        _, i, rest = name.split(".", 2)
        b = spec.layers[int(i)]
        norm = b.attention.qk_norm if rest.startswith("attn.") else b.norm
    return norm.offset if norm is not None else 0.0


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Copy whole values into a parameter, or its shard of them into a distributed one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    values = values.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        shard = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(values)
