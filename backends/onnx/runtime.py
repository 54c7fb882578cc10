"""Running a folder in ONNX Runtime. B batch, T tokens, V vocab, G kv-heads, K head dim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from backends.base import NotComparable
from backends.onnx.kernels import Kernel, kernel
from backends.onnx.layout import MODEL
from backends.onnx.read import Artifact, open_artifact
from backends.session import NOT_BEGUN, Session, session_length
from backends.text import Text
from spec.errors import UserError

CHUNK = 256
"""Tokens a call: logits and masks of all of them are in memory at once."""
ROOM = 256
"""Slots that the caches have at first; they double."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's execution providers by our devices."""

NUMPY = {"f32": np.float32, "f16": np.float16}
ELEMENTS = {"f32": 1, "f16": 10, "bf16": 16}
"""Element types as NumPy's and by ONNX's numbers."""

Value = ort.OrtValue


class Caches:
    """Keys and values of one batch of sequences: `past_key_values.*` in, `present.*` out.

    GroupQueryAttention writes into buffers that are longer than the sequence, so those layers' caches stay where they
    are (on a CPU they double when they are full, elsewhere they hold the whole session); the others grow with each
    call.
    """

    def __init__(self, artifact: Artifact, compute: str, device: str, batch: int, context: int) -> None:
        self._compute, self._device, self._batch, self._context = compute, device, batch, context
        layers = [b.attention for b in artifact.spec.layers]
        self._shapes = [(a.kv_heads or 0, a.head_dim or 0) for a in layers]
        self._fixed = [kernel(a, artifact.profile, artifact.compute) is Kernel.GROUPED for a in layers]
        self.used, self._room = 0, 0
        self._values = {(i, kind): self._empty(i, 0) for i in range(len(layers)) for kind in ("key", "value")}

    def _empty(self, i: int, slots: int) -> Value:
        shape = (self._batch, self._shapes[i][0], slots, self._shapes[i][1])
        if self._device == "cpu":
            return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY[self._compute]))
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, ELEMENTS[self._compute], self._device)

    def _grow(self, least: int) -> None:
        """Longer buffers, of at least so many slots, for the layers that write in place."""
        self._room = max(ROOM, 2 * self._room, least) if self._device == "cpu" else self._context
        for (i, kind), old in self._values.items():
            if self._fixed[i]:
                new = self._empty(i, self._room)
                if self.used:  # on a CPU, where both are views
                    new.numpy()[:, :, : self.used] = old.numpy()[:, :, : self.used]
                self._values[i, kind] = new

    def bind(self, io: Any, tokens: int) -> None:
        """Inputs and outputs of a call with that many tokens."""
        if self.used + tokens > self._room:
            self._grow(self.used + tokens)
        for (i, kind), value in self._values.items():
            io.bind_ortvalue_input(f"past_key_values.{i}.{kind}", value)
            if self._fixed[i]:
                io.bind_ortvalue_output(f"present.{i}.{kind}", value)
            else:
                io.bind_output(f"present.{i}.{kind}", self._device)

    def take(self, presents: Sequence[Value], tokens: int) -> None:
        """What the call returned, in the order of `bind`."""
        self.used += tokens
        for (i, kind), value in zip(list(self._values), presents, strict=True):
            if not self._fixed[i]:
                self._values[i, kind] = value


class OnnxRuntime(Session):
    """A graph in ONNX Runtime with one sequence in progress; see `backends.base.Runtime`."""

    def __init__(
        self, artifact: Artifact, session: Any, context: int, device: str, exact: bool, threads: int | None
    ) -> None:
        text, spec = Text.read(artifact.path), artifact.spec
        super().__init__(artifact.path, text, spec.vocab_size, context, spec.context)
        self.artifact, self.spec, self.exact, self.threads = artifact, spec, exact, threads
        self._session: Any = session
        self._device = device
        self.compute = "f32" if exact else artifact.compute
        self._caches: Caches | None = None

    def _new(self, batch: int) -> Caches:
        return Caches(self.artifact, self.compute, self._device, batch, self._context)

    def _call(self, ids: NDArray[np.int64], caches: Caches) -> NDArray[np.float32]:
        """[B, T] that continue the caches -> [B, T, V]."""
        io = self._session.io_binding()
        io.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        io.bind_cpu_input("attention_mask", np.ones((len(ids), caches.used + ids.shape[1]), np.int64))
        io.bind_output("logits", "cpu")
        caches.bind(io, ids.shape[1])
        try:
            self._session.run_with_iobinding(io)
        except Exception as e:  # ONNX Runtime's exceptions derive from nothing narrower
            raise UserError(f"{self.artifact.path}: ONNX Runtime: {_message(e)}") from None
        logits, *presents = io.get_outputs()
        caches.take(presents, ids.shape[1])
        return logits.numpy()

    def _chunked(self, ids: NDArray[np.int64], caches: Caches) -> Iterator[NDArray[np.float32]]:
        for i in range(0, ids.shape[1], CHUNK):
            yield self._call(ids[:, i : i + CHUNK], caches)

    def logits(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """[B, T] -> [B, T, V], no cache kept. GroupQueryAttention continues one sequence only, so long batches run
        row by row."""
        checked = self.checked(ids, 2)
        whole = [checked] if checked.shape[1] <= CHUNK else list(checked[:, None])
        rows = [np.concatenate(list(self._chunked(part, self._new(len(part)))), 1) for part in whole]
        return np.concatenate(rows)

    def prefill(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Start a new sequence: [T] -> [V] logits after the last token."""
        checked = self.checked(ids, 1)
        self._caches = None  # the old one's memory first
        caches, last = self._new(1), np.empty(0, np.float32)
        for chunk in self._chunked(checked[None], caches):
            last = chunk[0, -1].copy()
        self._caches = caches
        return last

    def step(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Continue it: [T] -> [T, V]."""
        if self._caches is None:
            raise UserError(NOT_BEGUN)
        checked = self.checked(ids, 1, self._caches.used)
        return np.concatenate(list(self._chunked(checked[None], self._caches)), 1)[0]

    def info(self) -> dict[str, Any]:
        """What runs, where, and how."""
        return {
            "backend": "onnx",
            "runtime": f"onnxruntime {ort.__version__}",
            "device": self._device,
            "precision": f"{self.artifact.level} weights, {self.compute} compute",
            "profile": self.artifact.profile,
            "threads": self.threads,
            "context": self._context,
            "exact": self.exact,
        }

    def close(self) -> None:
        """Let go of the session and the caches."""
        self._caches = self._session = None


def _message(e: Exception) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    exact: bool = False,
    device: str | None = None,
) -> OnnxRuntime:
    """Open a folder in ONNX Runtime.

    context: tokens of the longest sequence (default: the spec's). exact: the same graph and data in float32 throughout,
    on the CPU. device: `cpu` or `cuda` (default: CUDA for a graph that computes in 16 bits, where there is one).
    Raises `UserError`; `NotComparable` for a bfloat16 graph without CUDA, since ONNX Runtime's CPU has no kernels.
    """
    artifact = open_artifact(path)
    tokens = session_length(context, artifact.spec.context, threads)
    where = _device(device, "f32" if exact else artifact.compute)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about its own choices
    if threads is not None:
        options.intra_op_num_threads = threads
    full = {"use_tf32": "0"}  # float32 means float32
    providers = [PROVIDERS["cpu"]] if where == "cpu" else [(PROVIDERS["cuda"], full), PROVIDERS["cpu"]]
    source: Any = str(artifact.path / MODEL)
    if exact:
        from backends.onnx.exact import exact_model

        source = exact_model(artifact.path, artifact.compute)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(artifact.path))
    try:
        session = ort.InferenceSession(source, options, providers=providers)
    except Exception as e:  # ONNX Runtime's exceptions derive from nothing narrower
        raise UserError(f"{artifact.path}: ONNX Runtime cannot load it: {_message(e)}") from None
    return OnnxRuntime(artifact, session, tokens, where, exact, threads)


def devices() -> list[str]:
    """Where ONNX Runtime can run here, best first."""
    present = ort.get_available_providers()
    return [d for d in ("cuda", "cpu") if PROVIDERS[d] in present]


def _device(name: str | None, compute: str) -> str:
    present = devices()
    if name is not None and name not in present:
        raise UserError(f"device={name!r}: ONNX Runtime has no such device here (there are: {', '.join(present)})")
    where = name or ("cuda" if "cuda" in present and compute != "f32" else "cpu")
    if where == "cpu" and compute == "bf16":
        raise NotComparable("a graph that computes in bf16 needs CUDA: ONNX Runtime has no bf16 kernels for CPUs")
    return where
