"""A spec with its weights, run by the NumPy operations. Weights are asked for layer by layer, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from backends.numpy.ops import Array, Cache, Handle, NumpyOps
from spec.config import Alibi, Block, Spec
from spec.forward import hidden, logits
from spec.ops import Step
from spec.params import block_params, params
from spec.rope import alibi_slopes, rope_tables

Weights = Callable[[str], Any]
"""A canonical name to an array-like: `shape`, and indexing by rows, is all that is used."""


def layer_handles(b: Block, width: int, fetch: Weights) -> SimpleNamespace:
    """One layer's tree of handles; `fetch` takes names relative to the layer."""
    a = b.attention
    attn = SimpleNamespace(sinks=None, slopes=None, q_norm=Handle(), k_norm=Handle())
    if isinstance(a.position, Alibi):
        attn.slopes = alibi_slopes(a.position, a.heads)
    top = SimpleNamespace(
        attn=attn,
        mlp=SimpleNamespace(),
        attn_norm=Handle(),
        mlp_norm=Handle(),
        attn_post_norm=Handle(),
        mlp_post_norm=Handle(),
    )
    for p in block_params(b, width):
        *path, leaf = p.name.split(".")
        if p.role == "sinks":
            attn.sinks = fetch(p.name)
            continue
        owner = top
        for part in path[:-1]:
            if not hasattr(owner, part):
                setattr(owner, part, SimpleNamespace())
            owner = getattr(owner, part)
        handle = getattr(owner, path[-1], None) or Handle()
        setattr(handle, leaf, fetch(p.name))
        setattr(owner, path[-1], handle)
    return top


class _Layers(Sequence[SimpleNamespace]):
    """The layers' handles, made when asked for and not kept."""

    def __init__(self, spec: Spec, fetch: Weights) -> None:
        self._spec, self._fetch = spec, fetch

    def __len__(self) -> int:
        return self._spec.depth

    def __getitem__(self, i: Any) -> Any:
        return layer_handles(self._spec.layers[i], self._spec.width, lambda name: self._fetch(f"layers.{i}.{name}"))


class _Model:
    """The whole tree; every attribute fetches its weights on access."""

    def __init__(self, spec: Spec, fetch: Weights) -> None:
        self._fetch = fetch
        self._names = {p.name for p in params(spec)}
        self._tied = spec.head.tied
        self.layers = _Layers(spec, fetch)

    def _handle(self, name: str) -> Handle:
        got = {leaf: self._fetch(f"{name}.{leaf}") for leaf in ("weight", "bias") if f"{name}.{leaf}" in self._names}
        return Handle(**got)

    @property
    def head(self) -> Handle:
        handle = self._handle("head")
        if self._tied:
            handle.weight = self._fetch("embed.weight")
        return handle

    def __getattr__(self, name: str) -> Handle:
        return self._handle(name)


class Oracle:
    """The reference. `dtype=np.float32` is the rounding control; `ops` takes another NumpyOps (mutants, emulations).

    weights: canonical name to array-like, or a mapping. length: the session's declared maximum length in tokens
    (default: the spec's context); it selects length-dependent rotary tables and bounds every sequence.
    """

    def __init__(
        self,
        spec: Spec,
        weights: Weights | Mapping[str, Any],
        dtype: DTypeLike = np.float64,
        length: int | None = None,
        ops: NumpyOps | None = None,
    ) -> None:
        self.spec = spec
        self.length = length or spec.context
        self.ops = ops or NumpyOps(dtype)
        self.tables = rope_tables(spec, self.length)
        self._w = _Model(spec, weights.__getitem__ if isinstance(weights, Mapping) else weights)

    def logits(
        self,
        ids: NDArray[np.integer],
        taps: dict[str, Array] | None = None,
        positions: Array | None = None,
        segments: Array | None = None,
    ) -> Array:
        """[B, T] ids to [B, T, V]. `taps` collects every named intermediate. `segments` [B, T] packs documents, and
        then `positions` [B, T] (restarting in each) is needed too."""
        ids = np.asarray(ids)
        slots = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        step = Step[Array](
            "causal" if segments is None else "packed", slots if positions is None else positions, slots, segments
        )
        return self._run(ids, step, None, taps)[0]

    def new_cache(self, batch: int = 1) -> list[Cache]:
        """An empty cache, one entry a layer."""
        return [Cache() for _ in range(self.spec.depth)]

    def forward(self, ids: NDArray[np.integer], cache: list[Cache]) -> tuple[Array, list[Cache]]:
        """[B, T] ids that continue the cached sequence to [B, T, V], and the longer cache."""
        ids = np.asarray(ids)
        past = 0 if cache[0].slots is None else cache[0].slots.shape[1]
        slots = np.broadcast_to(np.arange(past, past + ids.shape[1]), ids.shape)
        y, new = self._run(ids, Step[Array]("cached", slots, slots), cache, None)
        assert new is not None
        return y, new

    def _run(
        self, ids: Array, step: Step[Array], cache: list[Cache] | None, taps: dict[str, Array] | None
    ) -> tuple[Array, list[Cache] | None]:
        if step.slots.size and step.slots.max() >= self.length:
            raise ValueError(f"{int(step.slots.max()) + 1} tokens exceed the session's length of {self.length}")
        self.ops.taps = taps
        try:
            x, new = hidden(self.ops, self.spec, self._w, ids, step, self.tables, cache)
            return logits(self.ops, self.spec, self._w, x), new
        finally:
            self.ops.taps = None
