"""From the portable graph to an engine, by NVIDIA's ONNX parser and builder.

`trt` is the `tensorrt` module, imported by the caller: nothing here needs it to be installed. On machines without a GPU
the same functions run with TensorRT-RTX's builder (parity_tests/tensorrt_rtx.py).

Shapes: B batch, T new tokens, L filled cache slots with them, S cache slots, G kv-heads, K head dim, V vocab.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.tensorrt.graph import written_out
from spec.config import MoE, Spec
from spec.errors import UserError

log = logging.getLogger(__name__)

BATCH = 4
"""Most sequences at once."""
CHUNK = 512
"""Most tokens of a prompt at once; longer prompts go through the cache in pieces."""
ROOM = 2 << 30
"""Bytes that scores, masks and logits of a piece may take: `limits` shortens pieces for long contexts."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine's dynamic sizes."""

    context: int
    """S: slots of the caches."""
    batch: int
    chunk: int

    def profiles(self) -> tuple[dict[str, tuple[int, int, int]], ...]:
        """Least, likeliest and most of `batch`, `tokens` and `total`: first for single tokens, then for prompts."""
        batch, most = (1, 1, self.batch), self.context
        return (
            {"batch": batch, "tokens": (1, 1, 1), "total": (1, max(1, most // 2), most)},
            {"batch": batch, "tokens": (1, self.chunk, self.chunk), "total": (1, self.chunk, most)},
        )


def limits(spec: Spec, compute: str) -> Limits:
    """The bounds for a spec: pieces of a prompt are as long as `ROOM` lets the largest intermediates be."""
    size = 4 if compute == "f32" else 2
    mixtures = [b.mlp for b in spec.layers if isinstance(b.mlp, MoE)]
    wide = max((m.experts * (3 * m.hidden * size + spec.width * (size + 8)) for m in mixtures), default=0)
    heads = max((b.attention.heads for b in spec.layers if written_out(b.attention, compute)), default=0)
    # bytes of a token's mask, scores (twice), logits, and what all experts make of it
    row = spec.context * (1 + 8 * heads) + 4 * spec.vocab_size + wide
    chunk = CHUNK
    while chunk > 1 and BATCH * chunk * row > ROOM:
        chunk //= 2
    return Limits(spec.context, BATCH, min(chunk, spec.context))


SIZES: dict[str, tuple[str, ...]] = {
    "input_ids": ("batch", "tokens"),
    "attention_mask": ("batch", "total"),
    "write_indices": ("batch",),
}
"""The graph's inputs by what their dimensions mean. Every other input is a layer's cache, [B, G, S, K]."""


def shape(name: str, declared: Shape, sizes: dict[str, int]) -> Shape:
    """An input's shape at given sizes; `declared` has -1 where it is dynamic."""
    named = SIZES.get(name, ("batch",))
    return tuple(n if n >= 0 else sizes[named[i]] for i, n in enumerate(declared))


def messages(trt: Any) -> Any:
    """A logger for NVIDIA's objects that passes what they say on to `logging` and keeps the errors.

    One for each module: the libraries stay with the first that they are given.
    """
    if trt not in _loggers:
        severity = trt.ILogger.Severity

        class Messages(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, level: Any, message: str) -> None:
                if level != severity.VERBOSE:
                    log.debug("%s", message)
                if level in (severity.INTERNAL_ERROR, severity.ERROR):
                    self.errors.append(" ".join(message.split()))  # they are raised too

        _loggers[trt] = Messages()
    return _loggers[trt]


_loggers: dict[Any, Any] = {}


def build(trt: Any, graph: Path, bounds: Limits, *, model: bytes | None = None, timing: Path | None = None) -> Any:
    """A serialized engine, as a buffer, from the portable graph with fixed caches.

    The network is strongly typed: every tensor has the type that the graph says, and TF32 is off. model: what to parse
    instead of the file's own text, on the same weights. timing: a file of measured kernels, read where there is one and
    written again. Raises `UserError` with what the parser or the builder refuses.
    """
    logger = messages(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network, _parser = parse(trt, builder, graph, model)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for sizes in bounds.profiles():
        index = config.add_optimization_profile(_profile(builder, network, sizes))
        assert index >= 0, f"TensorRT refuses the profile {sizes}: {_told(logger)}"
    kept = _timing(config, timing)  # must live until the engine is built
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{graph}: TensorRT builds no engine of it: {_told(logger)}")
    if timing is not None and kept is not None:
        with suppress(OSError):  # the next build measures again
            timing.parent.mkdir(parents=True, exist_ok=True)
            partial = timing.with_name(f"{timing.name}.{os.getpid()}")
            partial.write_bytes(kept.serialize())
            partial.replace(timing)
    return plan


def parse(trt: Any, builder: Any, graph: Path, model: bytes | None = None) -> tuple[Any, Any]:
    """The strongly typed network of a graph, and the parser, which holds its weights. Raises `UserError`."""
    logger = messages(trt)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph)) if model is None else parser.parse(model, str(graph))
    if not parsed:
        found = [parser.get_error(i) for i in range(parser.num_errors)]
        what = "; ".join(f"{e.node_name() or 'graph'} ({e.node_operator()}): {e.desc()}" for e in found[:3])
        raise UserError(f"{graph}: TensorRT's parser refuses it: {what or _told(logger)}")
    _decompose(trt, network)
    return network, parser


def _told(logger: Any) -> str:
    return logger.errors[-1][:500] if logger.errors else "no reason given"


def _decompose(trt: Any, network: Any) -> None:
    """Let attention be made of smaller operations where no fused kernel fits (float32, odd head dims)."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings return the base class
            layer.attention.decomposable = True


def _profile(builder: Any, network: Any, sizes: dict[str, tuple[int, int, int]]) -> Any:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        declared = tuple(tensor.shape)
        if -1 in declared:
            low, likely, high = (shape(tensor.name, declared, {k: v[j] for k, v in sizes.items()}) for j in range(3))
            profile.set_shape(tensor.name, low, likely, high)
    return profile


def _timing(config: Any, timing: Path | None) -> Any:
    """What earlier builds measured, attached; none where there is no place for it or TensorRT does not take it."""
    if timing is None:
        return None
    before = b""
    with suppress(OSError):
        before = timing.read_bytes()
    cache = config.create_timing_cache(before) or config.create_timing_cache(b"")  # another TensorRT's is none
    return cache if cache is not None and config.set_timing_cache(cache, False) else None
