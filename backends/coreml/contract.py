"""What a client relies on: the model's description says what the functions take and give, and coremltools' own loader,
which infers every type and shape again, accepts the program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backends.coreml import names
from backends.coreml.library import coremltools
from backends.coreml.mil.program import Function
from backends.coreml.support import cache_shape, counters
from spec.config import Spec


def differences(model: Any, functions: Mapping[str, Function], weights: Path, spec: Spec, dtype: str) -> dict[str, str]:
    """What is wrong with a package's interface, by function and part. dtype: of the logits, as in the program."""
    described = {f.name: f for f in model.description.functions} or {names.ONLY: model.description}
    if set(described) != set(functions):
        return {"description": f"names the functions {sorted(described)}, and the program has {sorted(functions)}"}
    out = {}
    for name, f in functions.items():
        for part, got, want in _parts(described[name], f, spec, dtype):
            if got != want:
                out[f"{name}, {part}"] = f"is {got}, not {want}"
    return out | _refused(model, weights)


def _parts(described: Any, f: Function, spec: Spec, dtype: str) -> Iterator[tuple[str, Any, Any]]:
    """(part, what is there, what must be): of the function, and of its description."""
    length = 1 if f.name == names.DECODE else None
    cache = cache_shape(spec)
    states = {names.KEYS: cache, names.VALUES: cache, names.POSITION: (counters(spec),)}
    yield "inputs", [(i.name, i.dtype, i.shape) for i in f.inputs], [(names.INPUT, "INT32", (1, length))]
    yield "states", [(s.name, s.dtype, s.shape) for s in f.states], [(n, "FLOAT16", s) for n, s in states.items()]
    made = {o.name: o for i in f.body for o in i.outputs}
    outputs = [(n, made[n].dtype, made[n].shape) for n in f.outputs if n in made]
    yield "outputs", outputs, [(names.LOGITS, dtype, (1, length, spec.vocab_size))]
    lengths = (1, spec.context if length is None else length)
    ids = [(i.name, _kind(i.type.multiArrayType), _ranges(i.type.multiArrayType)) for i in described.input]
    yield "description of inputs", ids, [(names.INPUT, "INT32", ((1, 1), lengths))]
    held = [(s.name, s.type.stateType.arrayType) for s in described.state]
    held = [(name, _kind(kind), tuple(kind.shape)) for name, kind in held]
    yield "description of states", held, [(n, "FLOAT16", s) for n, s in states.items()]
    found = [(o.name, _kind(o.type.multiArrayType)) for o in described.output]
    yield "description of outputs", found, [(names.LOGITS, dtype)]


def _kind(array: Any) -> str:
    return array.DESCRIPTOR.enum_types_by_name["ArrayDataType"].values_by_number[array.dataType].name


def _ranges(array: Any) -> tuple[tuple[int, int], ...]:
    """What each axis may be: the ranges, or the fixed shape."""
    if array.WhichOneof("ShapeFlexibility") == "shapeRange":
        return tuple((r.lowerBound, r.upperBound) for r in array.shapeRange.sizeRanges)
    return tuple((n, n) for n in array.shape)


def _refused(model: Any, weights: Path) -> dict[str, str]:
    """Functions that coremltools' loader does not accept. It holds one function's constants at a time."""
    coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load_mil_proto

    out = {}
    for name in model.mlProgram.functions:
        program = type(model.mlProgram)()
        program.CopyFrom(model.mlProgram)
        for other in set(program.functions) - {name}:
            del program.functions[other]
        try:
            load_mil_proto(program, model.specificationVersion, str(weights))
        except Exception as e:  # whatever the loader stumbles on
            out[name] = f"coremltools does not load it: {type(e).__name__}: {' '.join(str(e).split())}"
    return out
