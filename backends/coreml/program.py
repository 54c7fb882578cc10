"""From a spec and its stored tensors to a saved package."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from backends.coreml import names
from backends.coreml.clock import Clock
from backends.coreml.emitter import Emitter, Tensor
from backends.coreml.library import coremltools
from backends.coreml.ops import Cache, Handle, MILOps
from backends.coreml.package import DATE, WEIGHTS, read_model, write_model
from backends.coreml.support import cache_shape, counters
from spec.config import Alibi, Spec
from spec.forward import hidden, logits
from spec.ops import Step
from spec.params import params
from spec.rope import alibi_slopes, rope_tables


def constants(spec: Spec) -> dict[str, Any]:
    """What is computed from the spec: rotary tables [context, dim / 2] of the session of `context` tokens, and ALiBi
    slopes [H] for each layer, float32."""
    out: dict[str, Any] = {}
    position = np.arange(spec.context, dtype=np.float64)[:, None]
    for n, table in enumerate(rope_tables(spec, spec.context)):
        angle = position * table.inv_freq.astype(np.float64)
        for name, f in zip(names.rope_names(n), (np.cos, np.sin), strict=True):
            out[name] = (f(angle) * table.factor).astype(np.float32)
    for i, b in enumerate(spec.layers):
        if isinstance(b.attention.position, Alibi):
            out[names.slopes_name(i)] = alibi_slopes(b.attention.position, b.attention.heads)
    return out


def handles(spec: Spec) -> SimpleNamespace:
    """The tree of weight handles that `spec.forward` walks."""
    root: dict[str, Any] = {"final_norm": Handle(), "embed_norm": Handle(), "head": Handle()}
    layers = [SimpleNamespace(attn=SimpleNamespace(sinks=None, slopes=None, q_norm=Handle(), k_norm=Handle()),
                              mlp=SimpleNamespace(experts=SimpleNamespace(), shared=SimpleNamespace()),
                              attn_norm=Handle(), mlp_norm=Handle(), attn_post_norm=Handle(), mlp_post_norm=Handle())
              for _ in spec.layers]  # fmt: skip
    tree = SimpleNamespace(**root, layers=layers)
    for p in params(spec):
        parts = p.name.split(".")
        owner: Any = tree
        if parts[0] == "layers":
            owner, parts = layers[int(parts[1])], parts[2:]
        if p.role == "sinks":
            owner.attn.sinks = p.name
            continue
        for step in parts[:-2]:
            owner = getattr(owner, step)
        if not isinstance(getattr(owner, parts[-2], None), Handle):
            setattr(owner, parts[-2], Handle())
        held = getattr(owner, parts[-2])
        setattr(held, parts[-1], p.name)
        if parts[1] == "experts":
            held.experts = names.experts_in(spec, p.name)
    for i, b in enumerate(spec.layers):
        if isinstance(b.attention.position, Alibi):
            layers[i].attn.slopes = names.slopes_name(i)
    if spec.head.tied:
        tree.head.weight = "embed.weight"
    return tree


def build(spec: Spec, tensors: Mapping[str, Tensor], compute: str, length: int | None, fused: bool = True) -> Any:
    """A MIL program of one function; `length` is the fixed number of tokens of a call, or none for any."""
    ct = coremltools()
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import get_new_symbol, types

    emit = Emitter({**tensors, **constants(spec)}, compute)
    cache = cache_shape(spec)
    specs = [
        Builder.TensorSpec((1, length or get_new_symbol()), dtype=types.int32),
        Builder.StateTensorSpec(cache, dtype=types.fp16),
        Builder.StateTensorSpec(cache, dtype=types.fp16),
        Builder.StateTensorSpec((counters(spec),), dtype=types.fp16),
    ]

    def forward(inputIds: Any, keyCache: Any, valueCache: Any, position: Any) -> Any:
        clock = Clock(emit, inputIds, position)
        ops = MILOps(emit, clock, fused)
        step = Step("cached", clock.queries, clock.queries)
        caches = [Cache(i, keyCache, valueCache) for i in range(spec.depth)]
        tree = handles(spec)
        x, _ = hidden(ops, spec, tree, inputIds, step, rope_tables(spec, spec.context), caches)
        return logits(ops, spec, tree, x)

    return Builder.program(input_specs=specs, opset_version=ct.target.iOS18)(forward)


def save(spec: Spec, tensors: Mapping[str, Tensor], compute: str, functions: str, out: Path) -> None:
    """Build the program and write it to `out`, a path that does not exist and ends with .mlpackage."""
    if functions == "one":
        write(build(spec, tensors, compute, None), spec.context, out)
        return
    with tempfile.TemporaryDirectory(dir=out.parent, prefix="decode-") as folder:  # gone before the other is written
        other = Path(folder) / "decode.mlpackage"
        write(build(spec, tensors, compute, 1), None, other)
        decode, digest = read_model(other), _digest(other)
    write(build(spec, tensors, compute, None), spec.context, out)
    # both were built from the same constants in the same order
    assert _digest(out) == digest, "the two functions have different weight files"
    _join(out, decode)


def _digest(path: Path) -> bytes:
    with (path / WEIGHTS / "weight.bin").open("rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def write(program: Any, longest: int | None, out: Path) -> None:
    """Serialise a program of `build` as it is, for calls of one token, or of up to `longest`.

    None of coremltools' rewriting passes runs. They would merge constants that are nearly equal, fold some that the
    artifact's reader looks for, and choose dtypes, all of which the program settles itself.
    """
    ct = coremltools()
    length = 1 if longest is None else ct.RangeDim(1, longest, default=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 2.4 deprecates what coremltools 9 does
        ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            inputs=[ct.TensorType(names.INPUT, shape=(1, length), dtype=np.int32)],
            package_dir=str(out),
            skip_model_load=True,
        )
    model = read_model(out)
    model.description.metadata.userDefined.pop(DATE, None)  # equal conversions give equal files
    write_model(out, model)


def _join(path: Path, decode: Any) -> None:
    """Make a written package one of two functions over its weight file, with the function of another model."""
    model = read_model(path)
    whole = model.description
    for name, source in ((names.PREFILL, model), (names.DECODE, decode)):
        one = whole.functions.add(name=name)
        for part in ("input", "output", "state"):
            getattr(one, part).extend(getattr(source.description, part))
    for part in ("input", "output", "state"):
        whole.ClearField(part)
    whole.defaultFunctionName = names.PREFILL
    program = model.mlProgram.functions
    program[names.PREFILL].CopyFrom(program[names.ONLY])
    program[names.DECODE].CopyFrom(decode.mlProgram.functions[names.ONLY])
    del program[names.ONLY]
    write_model(path, model)
