"""A folder of ours run by mlx alone: the forward pass of what its files say. B batch, T tokens, V vocab.

The module computes what mlx-lm's architecture would: the stored rows in their stored order, the rotary tables of
config.json, the offset that the architecture adds. Nothing that the conversion folded is undone here.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from backends.mlx.bundle import arguments
from backends.mlx.cache import Cache, new_cache
from backends.mlx.layout import BUNDLED, Fit, Piece, Stored
from backends.mlx.levels import Packing
from backends.mlx.model import Model
from backends.mlx.read import MLXArtifact, open_artifact
from backends.mlx.support import CACHES
from backends.session import NOT_BEGUN, Session, cache_types, exact_cache, session_length
from backends.text import Text
from spec.errors import UserError
from spec.rope import rope_keys

CHUNK = 512
"""Tokens computed at once: scores and logits of a long prompt are never in memory all together."""


class MLXRuntime(Session):
    """One model with one sequence in progress; see `backends.base.Runtime`."""

    def __init__(
        self,
        model: Model,
        artifact: MLXArtifact,
        text: Text | None,
        context: int,
        device: Any,
        exact: bool,
        packings: tuple[Packing | None, Packing | None] = (None, None),
    ) -> None:
        """packings: of keys and of values in the cache; none: floats."""
        super().__init__(artifact.path, text, artifact.spec.vocab_size, context, artifact.source.context)
        self.model, self.artifact, self.device, self.exact = model, artifact, device, exact
        self._packings = packings
        self._cache: list[Cache] | None = None

    def _ids(self, ids: NDArray[np.integer], dims: int, used: int) -> NDArray[np.int32]:
        return np.atleast_2d(self.checked(ids, dims, used)).astype(np.int32)

    def _run(self, ids: NDArray[np.int32], cache: list[Cache], every: bool) -> NDArray[np.float32]:
        """[B, T] ids behind the cached ones to logits [B, T, V], or [B, 1, V] of the last token."""
        out = []
        last = ids.shape[1] - 1
        with mx.stream(self.device):
            for start in range(0, ids.shape[1], CHUNK):
                x = self.model.hidden(mx.array(ids[:, start : start + CHUNK]), cache)
                if every:
                    out.append(_float32(self.model.logits(x)))
                elif start + CHUNK > last:
                    out.append(_float32(self.model.logits(x[:, -1:])))
                else:
                    mx.eval(x)
        return np.concatenate(out, 1)

    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """[B, T] -> [B, T, V], no cache kept."""
        return self._run(self._ids(ids, 2, 0), new_cache(self.model, self._packings), True)

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Start a new sequence: [T] -> [V] logits after the last token."""
        checked = self._ids(ids, 1, 0)
        self._cache = None  # the old one's memory first
        cache = new_cache(self.model, self._packings)
        logits = self._run(checked, cache, False)
        self._cache = cache
        return logits[0, 0]

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Continue it: [T] -> [T, V]."""
        if self._cache is None:
            raise UserError(NOT_BEGUN)
        return self._run(self._ids(ids, 1, self._cache[0].offset), self._cache, True)[0]

    def cache_bytes(self) -> int:
        """Bytes that keys and values of the sequence in progress take, and the room that is kept for more."""
        return sum(c.nbytes for c in self._cache or ())

    def info(self) -> dict[str, Any]:
        """Backend, runtime, device, precision, carrier."""
        compute = "f32" if self.exact else self.artifact.compute
        kinds = [compute if p is None else f"q{p.bits}-g{p.group}" for p in self._packings]
        return {
            "backend": "mlx",
            "runtime": f"Allotrope on mlx {version('mlx')}",
            "device": "gpu" if self.device == mx.gpu else "cpu",
            "precision": f"{self.artifact.level}, computing in {compute}",
            "carrier": self.artifact.fit.carrier,
            "context": self._context,
            "cache": "/".join(dict.fromkeys(kinds)),
            "exact": self.exact,
        }

    def close(self) -> None:
        """Let go of the cache."""
        self._cache = None


def _float32(x: mx.array) -> NDArray[np.float32]:
    return np.array(x.astype(mx.float32))


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    exact: bool = False,
    device: str | None = None,
    cache: str | None = None,
) -> MLXRuntime:
    """Open a folder that a conversion wrote; mlx-lm is not needed.

    context: tokens of the longest session (default: the model's). exact: float32 throughout, on the CPU, for parity.
    device: `gpu` or `cpu` (default: the GPU where MLX has one). threads is accepted for all backends' sake: MLX decides
    itself. cache: how keys and values are kept, one of `support.CACHES`, or keys/values (default: in the dtype that the
    artifact computes in). Raises `UserError`.
    """
    path = Path(path)
    exact_cache(cache, exact)
    artifact = open_artifact(path)
    packings = _packings(artifact, cache)
    tokens = session_length(context, artifact.source.context, threads)
    where = mx.cpu if exact else _device(device)
    with mx.stream(where):
        model = build(artifact, exact)
        mx.eval(model.parameters())
    return MLXRuntime(model, artifact, Text.read(path), tokens, where, exact, packings)


def _packings(artifact: MLXArtifact, asked: str | None) -> tuple[Packing | None, Packing | None]:
    """How keys and values are packed; none: in the dtype of the activations. Raises `UserError` where heads are no
    whole groups."""
    if asked is None:
        return None, None
    heads = sorted({b.attention.head_dim or 0 for b in artifact.fit.shipped.layers})

    def packing(kind: str) -> Packing | None:
        found = re.fullmatch(r"q(\d)(?:-g(\d+))?", kind)
        if found is None:
            if kind != artifact.compute:
                raise UserError(f"cache={asked!r}: this artifact keeps keys and values in {artifact.compute}, in which "
                                "it computes (or q8, q6, q5, q4, q3, q2)")  # fmt: skip
            return None
        groups = [int(found[2])] if found[2] else [64, 32]
        for group in groups:
            if not any(dim % group for dim in heads):
                return Packing(int(found[1]), group)
        odd = next(dim for dim in heads if dim % groups[-1])
        others = [g for g in (128, 64, 32) if not any(dim % g for dim in heads)]
        instead = f"try q{found[1]}-g{others[0]}" if others else f"leave it out: {artifact.compute}"
        raise UserError(f"cache={asked!r}: heads of {odd} dimensions are no whole groups of {groups[-1]} ({instead})")

    k, v = cache_types(asked, CACHES)
    return packing(k), packing(v)


def devices() -> list[str]:
    """Where MLX can run here, best first."""
    return ["gpu", "cpu"] if mx.default_device() == mx.gpu else ["cpu"]


def _device(name: str | None) -> Any:
    kinds = {"cpu": mx.cpu, "gpu": mx.gpu}
    if name is not None and name not in kinds:
        raise UserError(f"device={name!r}: MLX has cpu and gpu")
    if name == "gpu" and mx.default_device() != mx.gpu:
        raise UserError("device='gpu': this MLX has no GPU (use 'cpu')")
    return kinds[name] if name is not None else mx.default_device()


def build(artifact: MLXArtifact, exact: bool = False) -> Model:
    """The module with the artifact's weights; `exact` widens everything that is a float to float32."""
    fit = artifact.fit
    args = arguments(fit.shipped, "f32" if exact else artifact.compute)
    if fit.carrier != BUNDLED:
        args.tables = _tables(artifact)
    model = Model(args)
    files = {name: x for p in artifact.input.paths for name, x in _load(p).items()}
    weights: dict[str, mx.array] = {}
    packed: dict[str, Stored] = {}
    for slot in fit.slots:
        t = artifact.stored(slot)
        for piece in (*slot.pieces, *slot.neutral):
            if t.packing is not None:
                packed[piece.name.removesuffix(".weight")] = t
            for part, tensor in t.tensors.items():
                x = files[tensor.name]
                x = x.reshape(-1, *x.shape[2:]) if slot.experts else x
                x = _rows(x, _order(fit, piece))
                if exact and mx.issubdtype(x.dtype, mx.floating):
                    x = x.astype(mx.float32)
                if fit.offset and piece.name.endswith("norm.weight"):
                    x = x.astype(mx.float32) + fit.offset
                weights[piece.name.removesuffix("weight") + part if part else piece.name] = x

    def chosen(path: str, _: Any) -> Any:
        t = packed.get(path)
        return False if t is None or t.packing is None else t.packing.entry

    nn.quantize(model, class_predicate=chosen)
    model.load_weights(list(weights.items()))
    return model


def _load(path: Path) -> dict[str, mx.array]:
    try:
        loaded = mx.load(str(path))
    except RuntimeError as e:
        raise UserError(f"{path}: MLX cannot load it: {str(e).splitlines()[0]}") from None
    assert isinstance(loaded, dict)
    return loaded


def _tables(artifact: MLXArtifact) -> list[tuple[NDArray[np.float32], float]]:
    """Those of config.json, in the order of `spec.rope.rope_tables`."""
    first = {key: i for i, key in reversed(list(enumerate(rope_keys(artifact.fit.shipped)))) if key is not None}
    tables = [artifact.table(first[key]) for key in sorted(first)]
    return [(t.inv_freq, t.factor) for t in tables]


def _order(fit: Fit, piece: Piece) -> NDArray[np.intp]:
    """The stored rows of a piece in the order that the module takes them: as they lie. A kernel that turns neighbours
    does with them what one that turns halves does with the even ones before the odd ones."""
    to = np.sort(piece.to)
    turned = re.fullmatch(r"layers\.(\d+)\.attn\.[qk]\.\w+", piece.name)
    if not fit.traditional or turned is None:
        return to
    head_dim = fit.shipped.layers[int(turned[1])].attention.head_dim
    assert head_dim is not None
    return to.reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _rows(x: mx.array, to: NDArray[np.intp]) -> mx.array:
    """Rows of a stored tensor."""
    if len(to) == x.shape[0] and (to == np.arange(len(to))).all():
        return x
    if (np.diff(to) == 1).all():
        return x[int(to[0]) : int(to[-1]) + 1]
    return x[mx.array(to.astype(np.int32))]
