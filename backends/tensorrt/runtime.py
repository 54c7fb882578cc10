"""Running an engine over torch's CUDA tensors, the caches written in place.

Shapes: B batch, T new tokens, L filled cache slots with them, S cache slots, G kv-heads, K head dim, V vocab.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.session import session_length
from backends.tensorrt import graph
from backends.tensorrt.build import ENGINE
from backends.tensorrt.device import Device, device
from backends.tensorrt.engine import Limits, Shape, build, limits, messages, shape
from backends.tensorrt.read import Artifact, open_artifact
from backends.tensorrt.session import Sequences
from backends.text import Text
from spec.errors import UserError

DECODE, PREFILL = 0, 1
"""The engine's profiles, in the order of `Limits.profiles`."""


class CudaExecutor:
    """An engine with one context for each profile. See `session.Executor`."""

    def __init__(self, here: Device, plan: Any, bounds: Limits, name: str) -> None:
        self._here, self._name, self._bounds = here, name, bounds
        trt, torch = here.trt, here.torch
        self._runtime = trt.Runtime(messages(trt))  # an engine must not outlive it
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(f"{name}: TensorRT cannot open the engine: {self._told()}")
        self._dtypes = {
            trt.DataType.FLOAT: torch.float32, trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16,
            trt.DataType.INT64: torch.int64, trt.DataType.INT32: torch.int32,
        }  # fmt: skip
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]
        self._aliases = self._aliased()
        self._stream = torch.cuda.Stream()
        self._contexts: dict[int, Any] = {}

    def _told(self) -> str:
        errors = messages(self._here.trt).errors
        return errors[-1][:300] if errors else "no reason given"

    def _aliased(self) -> dict[str, str]:
        """For every output that is a cache, the input that it shares its memory with."""
        out = {}
        for name in self._outputs:
            source = self._engine.get_aliased_input_tensor(name)
            if source:
                out[name] = source
            elif name != "logits":
                raise UserError(f"{self._name}: the engine copies the cache {name} instead of writing it in place")
        return out

    def _declared(self, name: str) -> Shape:
        return tuple(self._engine.get_tensor_shape(name))

    def _dtype(self, name: str) -> Any:
        return self._dtypes[self._engine.get_tensor_dtype(name)]

    def caches(self, batch: int) -> dict[str, Any]:
        """Caches [B, G, S, K] by the names of the inputs. They begin as zeros: a kernel may load slots that it masks,
        and there must be no NaN in them."""
        torch = self._here.torch
        sizes = {"batch": batch}
        out = {
            name: torch.zeros(shape(name, self._declared(name), sizes), dtype=self._dtype(name), device="cuda")
            for name in self._aliases.values()
        }
        torch.cuda.synchronize()  # made on torch's stream, used on ours
        return out

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None:
                raise UserError(f"{self._name}: TensorRT cannot start: {self._told()}")
            if not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
                raise UserError(f"{self._name}: the engine has no profile {profile}: {self._told()}")
            self._stream.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def run(self, ids: NDArray[np.int64], at: int, caches: dict[str, Any]) -> NDArray[np.float32]:
        """[B, T] ids whose first goes to slot `at` -> [B, T, V] logits. Returns when the GPU is done, so that every
        buffer lives as long as it is used."""
        torch = self._here.torch
        batch, tokens = ids.shape
        sizes = {"batch": batch, "tokens": tokens, "total": at + tokens}
        assert sizes["total"] <= self._bounds.context, "TensorRT would ignore a write beyond the cache"
        context = self._context(DECODE if tokens == 1 else PREFILL)
        with torch.cuda.stream(self._stream):
            given = {
                "input_ids": torch.from_numpy(np.ascontiguousarray(ids)).cuda(),
                "attention_mask": torch.ones((batch, sizes["total"]), dtype=torch.int64, device="cuda"),
                "write_indices": torch.full((batch,), at, dtype=torch.int64, device="cuda"),
            }
            buffers = given | caches
            buffers |= {out: caches[source] for out, source in self._aliases.items()}
            for name in self._inputs:
                wanted = shape(name, self._declared(name), sizes)
                assert tuple(buffers[name].shape) == wanted, f"{name}: {tuple(buffers[name].shape)}, not {wanted}"
                self._do(context.set_input_shape(name, wanted), f"the shape {wanted} of {name}")
            size = tuple(context.get_tensor_shape("logits"))
            buffers["logits"] = torch.empty(size, dtype=self._dtype("logits"), device="cuda")
            for name, tensor in buffers.items():
                self._do(context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")
            self._do(context.execute_async_v3(self._stream.cuda_stream), "a run")
            logits = buffers["logits"].float().cpu()
        self._stream.synchronize()
        return logits.numpy()

    def _do(self, done: bool, what: str) -> None:
        if not done:
            raise UserError(f"{self._name}: TensorRT refuses {what}: {self._told()}")


class TensorRTRuntime(Sequences):
    """An engine with one sequence in progress; see `backends.base.Runtime`."""

    def __init__(self, artifact: Artifact, here: Device, plan: Any, context: int, exact: bool) -> None:
        compute = "f32" if exact else artifact.compute
        bounds = limits(artifact.spec, compute)
        executor = CudaExecutor(here, plan, bounds, str(artifact.path))
        text = Text.read(artifact.path)
        super().__init__(executor, bounds, artifact.spec.vocab_size, context, artifact.path, text)
        self.artifact, self.compute, self.exact, self._here = artifact, compute, exact, here

    def info(self) -> dict[str, Any]:
        """What runs, where, and how."""
        return {
            "backend": "tensorrt",
            "runtime": f"TensorRT {self._here.version}",
            "device": self._here.name,
            "precision": f"{self.artifact.level} weights, {self.compute} compute",
            "context": self.context,
            "exact": self.exact,
        }

    def close(self) -> None:
        """Let go of the engine and the caches."""
        self._executor = self._caches = None


def devices() -> list[str]:
    """The GPU that an engine can run on here."""
    try:
        return [device("tensorrt").name]
    except UserError:
        return []


def load(
    path: str | Path, *, threads: int | None = None, context: int | None = None, exact: bool = False
) -> TensorRTRuntime:
    """Open an engine folder.

    context: tokens of the longest sequence (default: the spec's). exact: build and run another engine from the graph
    that lies beside it, in float32 throughout. threads: not needed here. Raises `UserError` where the engine was made
    for another GPU or version, `MissingDependency` without TensorRT.
    """
    artifact = open_artifact(path)
    tokens = session_length(context, artifact.spec.context, threads)
    here = device(str(path))
    if exact:
        model = graph.exact(artifact.path, artifact.compute)
        file = artifact.path / graph.FOLDER / graph.MODEL
        plan = build(here.trt, file, limits(artifact.spec, "f32"), model=model, timing=here.timing)
    else:
        made = (artifact.made_for.get("gpu"), artifact.made_for.get("tensorrt"))
        if made != (here.name, here.version):
            raise UserError(f"{path}: the engine is for {made[0]} and TensorRT {made[1]}, and here are {here.name} and "
                            f"{here.version}: convert again on this machine")  # fmt: skip
        try:
            plan = (artifact.path / ENGINE).read_bytes()
        except OSError as e:
            raise UserError(f"{artifact.path / ENGINE}: {e.strerror}") from None
    return TensorRTRuntime(artifact, here, plan, tokens, exact)
