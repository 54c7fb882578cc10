"""The graph of a TensorRT artifact without an engine, and ONNX Runtime in the place of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from backends.base import Floats
from backends.folder import write_mark
from backends.tensorrt import graph
from convert.stream import rounded
from convert.verify.artifact import planned
from spec import Spec


def write_graph(spec: Spec, weights: Mapping[str, Floats], path: Path, level: str, compute: str) -> Path:
    """All of an artifact that needs no GPU: the graph with its weights, and the mark."""
    plan = planned(backends.get("tensorrt"), spec, level)
    writer = graph.writer(spec, plan, path / graph.FOLDER, compute)
    for p in plan:
        x = np.ascontiguousarray(weights[p.name], np.float32)
        step = 24 if len(p.shape) > 1 else len(x)  # cuts through heads
        for start in range(0, len(x), step):
            writer.write(p.name, start, rounded(p.name, p.level, start, x[start : start + step]))
    writer.close()
    write_mark(path, "tensorrt", spec, level, {"compute": compute}, {"level": level})
    return path


class OrtExecutor:
    """Runs an artifact's graph in ONNX Runtime, float32 throughout; see `backends.tensorrt.session.Executor`.

    New caches are full of NaN, so a slot that is read before it is written shows. ONNX Runtime has no kernel for E2M1:
    ONNX's reference implementation dequantizes those matrices.
    """

    def __init__(self, path: Path, spec: Spec, compute: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # it says at every write that a cache is copied
        where = str(path / graph.FOLDER)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", where)
        model = without_e2m1(graph.exact(path, compute), path / graph.FOLDER)
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._shapes = [(b.attention.kv_heads or 0, spec.context, b.attention.head_dim or 0) for b in spec.layers]
        self.calls: list[tuple[int, int, int]] = []
        """Batch, tokens and first slot of every run."""

    def caches(self, batch: int) -> dict[str, NDArray[np.float32]]:
        """[B, G, S, K] by the names of the inputs."""
        return {
            f"past_key_values.{i}.{kind}": np.full((batch, *size), np.nan, np.float32)
            for i, size in enumerate(self._shapes)
            for kind in ("key", "value")
        }

    def run(self, ids: NDArray[np.int64], at: int, caches: dict[str, Any]) -> NDArray[np.float32]:
        """[B, T] ids whose first goes to slot `at` -> [B, T, V] logits."""
        batch, tokens = ids.shape
        self.calls.append((batch, tokens, at))
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, at + tokens), np.int64),
            "write_indices": np.full(batch, at, np.int64),
        }
        outputs = ["logits", *(name.replace("past_key_values", "present") for name in caches)]
        found: list[Any] = list(self.session.run(outputs, given | caches))
        caches.update(zip(list(caches), found[1:], strict=True))
        return found[0]


def without_e2m1(model: bytes, folder: Path) -> bytes:
    """A model whose matrices in E2M1 are what ONNX's reference implementation makes of them, in float32."""
    import onnx
    from onnx import TensorProto, external_data_helper, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    made = onnx.load_from_string(model)
    held = {t.name: t for t in made.graph.initializer}
    narrow = {n for n, t in held.items() if t.data_type == TensorProto.FLOAT4E2M1}
    maker = {out: node for node in made.graph.node for out in node.output}
    for node in [n for n in made.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in narrow]:
        scales = maker[node.input[1]]
        used = [held[n] for n in (node.input[0], *scales.input)]
        for t in used:
            if external_data_helper.uses_external_data(t):
                external_data_helper.load_external_data_for_tensor(t, str(folder))
        out = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        part = helper.make_graph([scales, node], "dequantize", [], [out], used)
        small = helper.make_model(part, opset_imports=list(made.opset_import), ir_version=made.ir_version)
        (values,) = ReferenceEvaluator(small).run(None, {})
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), node.output[0]))
        made.graph.node.remove(node)
        for t in used:
            made.graph.initializer.remove(t)
        made.graph.node.remove(scales)
    return made.SerializeToString()
