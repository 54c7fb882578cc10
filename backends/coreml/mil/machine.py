"""Runs a program's functions over states, operation by operation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from backends.coreml.mil import types
from backends.coreml.mil.ops import OPS
from backends.coreml.mil.program import FLOATS, Function, Instruction, Output, Ref, Value
from backends.coreml.mil.weights import Array, Blob
from spec.errors import UserError

CONSTANT_BYTES = 4 << 30
"""Widened constants that are kept between calls; what goes beyond is widened again each time."""
_INTEGERS: dict[str, Any] = {
    "INT32": np.int32, "INT16": np.int16, "UINT16": np.uint16, "INT8": np.int8, "UINT8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """How floats are held, and whether results that the program declares float16 are rounded to it."""

    name: str
    dtype: Any
    half: bool = False


PRECISIONS = {
    "f16": Precision("f16", np.float32, half=True),
    "f32": Precision("f32", np.float32),
    "f64": Precision("f64", np.float64),
}
"""`f16` runs the program as typed: float16 results rounded after every operation (which accumulates in float32), and
so are the states; `f32` and `f64` take the same steps with no rounding to float16 anywhere."""

States = dict[str, Array]


class Machine:
    """Functions of one package, with their constants. Raises `UserError` for a program that MIL's rules forbid: types
    when it is made, shapes other than the declared ones when it runs."""

    def __init__(self, functions: Mapping[str, Function], precision: str = "f16") -> None:
        self.functions = dict(functions)
        self.precision = PRECISIONS[precision]
        self._plans = {name: Plan(f) for name, f in self.functions.items()}
        self._constants: dict[Any, Array] = {}
        self._held = 0
        unknown = {i.type for f in functions.values() for i in f.body} - {*OPS, "const", "read_state", "write_state"}
        if unknown:
            raise UserError(f"the program uses operations that the interpreter lacks: {', '.join(sorted(unknown))}")
        for f in functions.values():
            types.check(f)

    def new_states(self, function: str) -> States:
        """Zeros, as Core ML makes them."""
        return {s.name: np.zeros(_fixed(s), self.precision.dtype) for s in self.functions[function].states}

    def run(self, function: str, inputs: Mapping[str, Array], states: States) -> dict[str, Array]:
        """One call. `states` are updated."""
        f, plan, env = self.functions[function], self._plans[function], dict(inputs)
        for i in f.inputs:
            _shaped(env[i.name], i)
        with np.errstate(all="ignore"):  # infinities and NaNs are the program's results, for the caller to see
            for n, i in enumerate(f.body):
                self._step(i, n, plan, env, states)
                for name in plan.last[n]:
                    del env[name]
        return {name: env[name] for name in f.outputs}

    def _step(self, i: Instruction, n: int, plan: Plan, env: dict[str, Any], states: States) -> None:
        if i.type == "const" or i.type.startswith("constexpr_"):
            env[i.outputs[0].name] = _shaped(self._constant(i), i.outputs[0])
            return
        if i.type == "read_state":
            env[i.outputs[0].name] = _shaped(states[i.args["input"].name], i.outputs[0])
            return
        if i.type == "write_state":
            name, x = i.args["input"].name, self._argument(i.args["data"], env)
            assert x.shape == states[name].shape, f"write_state: {x.shape} into {name} of {states[name].shape}"
            states[name] = x if x is states[name] else x.copy()  # later updates in place must not reach `x`
            return
        args = {key: self._argument(a, env) for key, a in i.args.items()}
        if n in plan.in_place:
            args["in_place"] = True
        op = OPS[i.type]
        found = op.run(**args)
        for o, value in zip(i.outputs, found if isinstance(found, list) else [found], strict=True):
            env[o.name] = _shaped(self._typed(value, o, op.rounds), o)
            if n in plan.reads_state and i.type != "slice_update":  # a view would see later updates
                env[o.name] = env[o.name].copy()

    def _typed(self, value: Any, o: Output, rounds: bool) -> Array:
        if o.dtype not in FLOATS:
            return np.asarray(value, _INTEGERS[o.dtype])
        x = np.asarray(value, self.precision.dtype)
        if rounds and self.precision.half and o.dtype == "FLOAT16":
            x = x.astype(np.float16).astype(self.precision.dtype)
        return x

    def _argument(self, a: Any, env: Mapping[str, Any]) -> Any:
        if isinstance(a, list):
            return [self._argument(x, env) for x in a]
        return env[a.name] if isinstance(a, Ref) else self._loaded(a)

    def _loaded(self, value: Value) -> Any:
        """A constant in the machine's dtype."""
        x = value.read() if isinstance(value, Blob) else value
        return x.astype(self.precision.dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    def _constant(self, i: Instruction) -> Any:
        # functions share tensors of the weight file, not names
        blobs = tuple(v for v in i.args.values() if isinstance(v, Blob))
        key = (i.type, *blobs) if blobs else id(i)
        if key in self._constants:
            return self._constants[key]
        args = {k: self._loaded(v) for k, v in i.args.items()}
        x = args["val"] if i.type == "const" else self._typed(OPS[i.type].run(**args), i.outputs[0], OPS[i.type].rounds)
        size = x.nbytes if isinstance(x, np.ndarray) else 0
        if self._held + size <= CONSTANT_BYTES:
            self._constants[key] = x
            self._held += size
        return x


class Plan:
    """What is known of a function before it runs: when a result is used last, and which updates may be in place."""

    def __init__(self, f: Function) -> None:
        uses: dict[str, int] = {}
        for n, i in enumerate(f.body):
            uses |= dict.fromkeys(i.refs(), n)
            for o in i.outputs:
                uses.setdefault(o.name, n)
        states = {s.name for s in f.states}
        keep = states | set(f.outputs) | {i.name for i in f.inputs}
        self.last: list[list[str]] = [[] for _ in f.body]
        for name, n in uses.items():
            if name not in keep:
                self.last[n].append(name)
        self.reads_state: set[int] = set()
        self.in_place: set[int] = set()
        self._find(f, uses)

    def _find(self, f: Function, uses: Mapping[str, int]) -> None:
        """A read, updated and written back with nothing else in between, changes the state itself: else every layer
        would copy the states of all layers."""
        count = Counter(name for i in f.body for name in i.refs())
        source: dict[str, str] = {}  # a read's result -> its state
        for n, i in enumerate(f.body):
            if i.type == "read_state":
                source[i.outputs[0].name] = i.args["input"].name
                continue
            read = [r for r in i.refs() if r in source]
            if not read:
                continue
            self.reads_state.add(n)
            if i.type != "slice_update" or i.args["x"] != Ref(read[0]):
                continue
            state, result = source[read[0]], i.outputs[0].name
            others = [r for r, s in source.items() if s == state and uses[r] > n]
            written = next((m for m in range(n + 1, len(f.body)) if state in f.body[m].refs()), None)
            back = written is not None and f.body[written].type == "write_state"
            if back and not others and count[result] == 1 and uses[result] == written and uses[read[0]] == n:
                self.in_place.add(n)


def _shaped(value: Any, o: Output) -> Any:
    """The value, which has the declared shape. Raises `UserError`."""
    shape = getattr(value, "shape", ())
    if len(shape) != len(o.shape) or any(n not in (None, m) for n, m in zip(o.shape, shape, strict=True)):
        declared = ", ".join("any" if n is None else str(n) for n in o.shape)
        raise UserError(f"{o.name}: has the shape {list(shape)}, and [{declared}] is declared")
    return value


def _fixed(s: Output) -> tuple[int, ...]:
    assert None not in s.shape, f"state {s.name} varies in shape"
    return tuple(n for n in s.shape if n is not None)
