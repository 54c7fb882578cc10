"""onnxruntime's own 4-bit quantizers (MatMulNBitsQuantizer), on a graph of one product for each matrix.

They look at one weight at a time (GPTQ at its inputs too, those of the original), so such graphs give the numbers that
a whole model would. Weights are float16, as exporters of language models have them, and so are the scales. An untied
embedding goes through the quantizer's Gather, which is plain rounding whatever the method.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.quant.activations import watch
from evals.quant.decoded import Decoded, Job, Unavailable, matrices, weights
from spec.params import params

FLOAT = np.float16


def make(job: Job, method: str, group: int, symmetric: bool = False) -> Decoded:
    """One file for each matrix, read back. Raises `Unavailable`."""
    from convert.sources import open_source

    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    inputs = _inputs(job) if method == "gptq" else {}
    files: dict[str, Path] = {}
    nbytes: dict[str, int] = {}
    with open_source(job.source) as source:
        spec = source.spec
        sizes = matrices(spec)
        experts = {p.name: p.shape[0] // spec_rows(spec, p.name) for p in params(spec) if p.role == "experts"}
        if experts and method == "gptq":
            raise Unavailable("onnxruntime's GPTQ is not run on mixtures of experts")
        for i, name in enumerate(sizes):
            if name == "positions.weight":
                nbytes[name] = 2 * sizes[name]
                continue
            files[name] = job.folder / f"{i:04d}.onnx"
            gather = name == "embed.weight" and not spec.head.tied
            weight, x = source.tensor(name), inputs.get(name)
            nbytes[name] = _quantize(weight, files[name], method, group, symmetric, gather, x)

    def fetch(name: str) -> Any:
        return read(files[name]) if name in files else open_source(job.source).tensor(name)

    total = sum(nbytes.values())
    rest = 4 * (weights(spec) - sum(sizes.values()))
    return Decoded(spec, fetch, 8 * total / sum(sizes.values()), 8 * (total + rest) / weights(spec))


def spec_rows(spec: Any, name: str) -> int:
    """Rows of one expert."""
    m = spec.layers[int(name.split(".")[1])].mlp
    return m.hidden if not name.endswith("down.weight") else spec.width


def _inputs(job: Job) -> dict[str, list[NDArray[np.float32]]]:
    """Inputs of every product, one array a window."""
    out: dict[str, list[NDArray[np.float32]]] = {}
    watch(job, lambda name, expert, x: out.setdefault(name, []).append(x.copy()))
    return out


class _Windows:
    """What the quantizer's GPTQ iterates over: one dictionary of inputs a window."""

    batch_size = 1

    def __init__(self, windows: list[NDArray[np.float32]]) -> None:
        self.windows = windows

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        yield from ({"x": w.astype(FLOAT)} for w in self.windows)


def _quantize(
    weight: NDArray[np.float32], out: Path, method: str, group: int, symmetric: bool, gather: bool,
    inputs: list[NDArray[np.float32]] | None,
) -> int:  # fmt: skip
    """Write a graph with the weight [rows, cols], quantized; returns the bytes of what it stores."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as q

    rows, cols = weight.shape
    with np.errstate(over="ignore"):
        half = weight.astype(FLOAT)
    if not np.isfinite(half).all():
        raise Unavailable("a weight is beyond float16")
    stored = half if gather else np.ascontiguousarray(half.T)
    x = helper.make_tensor_value_info("x", TensorProto.INT64 if gather else TensorProto.FLOAT16,
                                      ["n"] if gather else ["n", cols])  # fmt: skip
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", cols if gather else rows])
    node = helper.make_node(*(("Gather", ["w", "x"]) if gather else ("MatMul", ["x", "w"])), ["y"], "product")
    graph = helper.make_graph([node], "one", [x], [y], [numpy_helper.from_array(stored, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    kind = ("MatMul", "Gather")
    if gather or method == "default":
        config: Any = q.DefaultWeightOnlyQuantConfig(group, symmetric, op_types_to_quantize=kind)
    elif method == "hqq":
        config = q.HQQWeightOnlyQuantConfig(group, 4, op_types_to_quantize=("MatMul",))
    elif method == "gptq":
        assert inputs is not None, "inputs of every product were watched"
        config = q.GPTQWeightOnlyQuantConfig(_Windows(inputs))  # type: ignore[arg-type]
    else:
        config = {"rtn": q.RTNWeightOnlyQuantConfig, "k_quant": q.KQuantWeightOnlyQuantConfig}[method]()
    quantizer = q.MatMulNBitsQuantizer(model, block_size=group, is_symmetric=symmetric, algo_config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it hands torch arrays that cannot be written to
        quantizer.process()
    made: Any = quantizer.model
    onnx.save(made.model, out)
    found = made.model.graph
    if [n.op_type for n in found.node] not in (["MatMulNBits"], ["GatherBlockQuantized"]):
        raise Unavailable(f"onnxruntime left a matrix [{rows}, {cols}] as it was")
    return sum(len(t.raw_data) for t in found.initializer)


def read(file: Path) -> NDArray[np.float32]:
    """The weight [rows, cols] of a graph, dequantized in float32: (code - zero point) * scale."""
    import onnx

    graph = onnx.load(file).graph
    node, have = graph.node[0], {t.name: t for t in graph.initializer}
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    group: int = settings["block_size"]
    if node.op_type == "GatherBlockQuantized":
        data, scales = have[node.input[0]], onnx.numpy_helper.to_array(have[node.input[2]]).astype(np.float32)
        rows, cols = data.dims
        signed = data.data_type == onnx.TensorProto.INT4
        codes = _nibbles(data.raw_data, rows * cols, signed).reshape(rows, cols)
        zeros: NDArray[Any] = np.zeros_like(scales)
        if len(node.input) > 3:
            zeros = _nibbles(have[node.input[3]].raw_data, scales.size, signed).reshape(scales.shape)
        return _dense(codes, scales, zeros, group)
    rows, cols = settings["N"], settings["K"]
    blocks = -(-cols // group)
    packed = onnx.numpy_helper.to_array(have[node.input[1]])
    codes = _nibbles(packed.tobytes(), packed.size * 2, False).reshape(rows, blocks * group)[:, :cols]
    scales = onnx.numpy_helper.to_array(have[node.input[2]]).astype(np.float32).reshape(rows, blocks)
    zeros = np.full((rows, blocks), 8.0, np.float32)
    if len(node.input) > 3 and node.input[3]:
        points = onnx.numpy_helper.to_array(have[node.input[3]])
        if points.dtype == np.uint8:
            a_row = points.reshape(rows, -1)
            zeros = _nibbles(a_row.tobytes(), a_row.size * 2, False).reshape(rows, -1)[:, :blocks]
        else:
            zeros = points.astype(np.float32).reshape(rows, blocks)
    return _dense(codes, scales, zeros, group)


def _dense(codes: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any], group: int) -> NDArray[np.float32]:
    cols = codes.shape[1]
    spread = np.repeat(scales, group, 1)[:, :cols], np.repeat(zeros, group, 1)[:, :cols]
    return (codes.astype(np.float32) - spread[1].astype(np.float32)) * spread[0]


def _nibbles(data: bytes, count: int, signed: bool) -> NDArray[np.int8]:
    """4-bit integers, the low one of each byte first."""
    raw = np.frombuffer(data, np.uint8)
    out = np.empty(2 * len(raw), np.int8)
    out[::2], out[1::2] = raw & 15, raw >> 4
    return (((out ^ 8) - 8) if signed else out)[:count]
