"""Running a package: with Apple's framework on macOS, elsewhere with the interpreter. T tokens, V vocab."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backends.coreml import names, package
from backends.coreml.library import coremltools
from backends.coreml.mil.machine import Machine, States
from backends.coreml.read import CoreMLArtifact
from backends.session import NOT_BEGUN, Session, session_length
from backends.text import Text
from spec.errors import UserError

CHUNK = 256
"""Tokens of one call: logits come for all of them."""
Floats = NDArray[np.float32]


def devices() -> list[str]:
    """Where a package runs on this machine."""
    return [Apple.device if sys.platform == "darwin" else Interpreter.device]


class Engine(Protocol):
    """One sequence in progress."""

    device: str

    def reset(self) -> None:
        """Forget it."""
        ...

    def run(self, ids: NDArray[np.int32]) -> Floats:
        """Continue it: [1, T] -> [T, V]."""
        ...


class Interpreter:
    """The saved program, operation by operation in NumPy."""

    device = "interpreter (emulated)"

    def __init__(self, artifact: CoreMLArtifact, precision: str) -> None:
        self._functions = [artifact.default, *({names.DECODE} & set(artifact.functions))]
        self._machine = Machine(artifact.functions, precision)
        self._states: States = {}
        self.reset()

    def reset(self) -> None:
        """Zero the states."""
        self._states = self._machine.new_states(self._functions[0])

    def run(self, ids: NDArray[np.int32]) -> Floats:
        """[1, T] -> [T, V]; a single token goes to the decode function, where there is one."""
        function = self._functions[-1 if ids.shape[1] == 1 else 0]
        out = self._machine.run(function, {names.INPUT: ids}, self._states)
        return out[names.LOGITS][0].astype(np.float32)


class Apple:
    """Core ML itself."""

    device = "Core ML, CPU and GPU"

    def __init__(self, path: Path, artifact: CoreMLArtifact) -> None:
        ct = coremltools()
        self._models = {}
        for name in [artifact.default, *({names.DECODE} & set(artifact.functions))]:
            function = {"function_name": name} if len(artifact.functions) > 1 else {}
            source: dict[str, Any] = {"model": str(path)}
            if path.suffix != ".mlpackage":  # under its partial name: coremltools makes a package that Core ML compiles
                source = {"model": package.read_model(path), "weights_dir": str(path / package.WEIGHTS)}
            self._models[name] = ct.models.MLModel(**source, compute_units=ct.ComputeUnit.CPU_AND_GPU, **function)
        self._default = artifact.default
        self.reset()

    def reset(self) -> None:
        """New states."""
        self._state = self._models[self._default].make_state()

    def run(self, ids: NDArray[np.int32]) -> Floats:
        """[1, T] -> [T, V]"""
        model = self._models.get(names.DECODE) if ids.shape[1] == 1 else None
        found = (model or self._models[self._default]).predict({names.INPUT: ids}, state=self._state)
        return np.asarray(found[names.LOGITS])[0].astype(np.float32)


class CoreMLRuntime(Session):
    """A package with one sequence in progress; see `backends.base.Runtime`."""

    def __init__(self, path: Path, artifact: CoreMLArtifact, engine: Engine, context: int, exact: bool) -> None:
        text = Text.read(path / package.TOKENIZER)
        super().__init__(path, text, artifact.spec.vocab_size, context, artifact.spec.context)
        self.path, self.artifact, self.engine, self.exact = path, artifact, engine, exact
        self._used: int | None = None

    def _ids(self, ids: NDArray[np.integer], dims: int, used: int = 0) -> NDArray[np.int32]:
        return self.checked(ids, dims, used).astype(np.int32)

    def _continue(self, ids: NDArray[np.int32], used: int) -> Floats:
        """[T] -> [T, V], in calls of at most `CHUNK` tokens."""
        parts = [self.engine.run(ids[None, a : a + CHUNK]) for a in range(0, len(ids), CHUNK)]
        self._used = used + len(ids)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def logits(self, ids: NDArray[np.integer]) -> Floats:
        """[B, T] -> [B, T, V]: rows one after the other, each from empty states; no sequence is kept."""
        rows = self._ids(ids, 2)
        out = np.empty((*rows.shape, self.vocab_size), np.float32)
        for n, row in enumerate(rows):
            self.engine.reset()
            out[n] = self._continue(row, 0)
        self._used = None
        return out

    def prefill(self, ids: NDArray[np.integer]) -> Floats:
        """Start a new sequence: [T] -> [V] logits after the last token."""
        row = self._ids(ids, 1)
        self._used = None
        self.engine.reset()
        return self._continue(row, 0)[-1]

    def step(self, ids: NDArray[np.integer]) -> Floats:
        """Continue it: [T] -> [T, V]."""
        if self._used is None:
            raise UserError(NOT_BEGUN)
        return self._continue(self._ids(ids, 1, self._used), self._used)

    def info(self) -> dict[str, Any]:
        """What runs, where, and how."""
        a = self.artifact
        return {
            "backend": "coreml",
            "runtime": f"coremltools {coremltools().__version__}",
            "device": self.engine.device,
            "emulated": isinstance(self.engine, Interpreter),
            "precision": "float32 throughout" if self.exact else f"{a.compute}, states f16",
            "level": a.level,
            "functions": sorted(a.functions),
            "context": self._context,
            "exact": self.exact,
        }

    def close(self) -> None:
        """Let go of the sequence."""
        self._used = None


def load(
    path: str | Path, *, threads: int | None = None, context: int | None = None, exact: bool = False
) -> CoreMLRuntime:
    """Open a package.

    Off macOS, and everywhere with `exact`, the interpreter runs the saved program: as typed, every float16 result
    rounded, or with `exact` in float32 throughout, states too. context: tokens of a session (default and most: the
    spec's, for which states and rotary tables are made). threads: NumPy's own setting rules; checked only. Raises
    `UserError`.
    """
    path = Path(path)
    artifact = CoreMLArtifact(path)
    tokens = session_length(context, artifact.spec.context, threads)
    if sys.platform == "darwin" and not exact:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine: Engine = Apple(path, artifact)
        except Exception as e:  # coremltools passes on what the framework says, as bare exceptions
            raise UserError(f"{path}: Core ML cannot load it: {' '.join(str(e).split())}") from None
    else:
        try:
            engine = Interpreter(artifact, "f32" if exact else "f16")
        except UserError as e:
            raise UserError(f"{path}: {e}") from None
    return CoreMLRuntime(path, artifact, engine, tokens, exact)
