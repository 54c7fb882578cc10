"""mlx-lm's own quantizers on the original's Hugging Face folder, at float16 as its models are shipped."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from evals.quant.base import original
from evals.quant.decoded import Decoded, Job, Unavailable, matrices, weights
from spec.errors import UserError

SEED = 0
BATCH = 4
DWQ_RATE = 1e-6
"""mlx-lm's default."""
VALIDATION = 8
"""Windows of the calibration text that DWQ keeps apart to watch its loss."""


def make(job: Job, bits: int, group: int, recipe: str = "", method: str = "") -> Decoded:
    """`mlx_lm.convert`, or one of its learned methods. Raises `Unavailable`."""
    before, out = original(job, "hf"), job.folder / "quantized"
    shutil.rmtree(out, ignore_errors=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            if method:
                _learned(job, before, out, bits, group, method)
            else:
                from mlx_lm.convert import convert

                convert(str(before), str(out), quantize=True, q_bits=bits, q_group_size=group, dtype="float16",
                        quant_predicate=recipe or None)  # fmt: skip
    except (ValueError, RuntimeError, NotImplementedError, KeyError) as e:
        raise Unavailable(f"mlx-lm: {type(e).__name__}: {e}") from None
    return read(job, out, before)


def _learned(job: Job, before: Path, out: Path, bits: int, group: int, method: str) -> None:
    """DWQ (scales distilled from the original) or GPTQ, on our calibration tokens, as mlx-lm's commands run them."""
    import mlx.core as mx
    from mlx_lm.utils import load, quantize_model, save

    assert job.ids is not None, "calibration tokens"
    ids = np.load(job.ids)
    model, tokenizer, config = load(str(before), return_config=True, lazy=True)  # type: ignore[misc]
    model.set_dtype(mx.float16)
    mx.random.seed(SEED)
    if method == "gptq":
        from mlx_lm.quant.gptq import gptq_quantize

        quantized, config["quantization"] = gptq_quantize(model, mx.array(ids), bits, group, bits, group)
        save(out, str(before), quantized, tokenizer, config)
        return
    import copy

    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    if len(ids) <= VALIDATION + BATCH:
        raise ValueError(f"DWQ wants more than {VALIDATION + BATCH} windows of calibration text")
    student = copy.deepcopy(model)
    student, config = quantize_model(student, config, group, bits)
    rows = [(row.tolist(), 0) for row in ids]
    dwq_quantize(
        student, lambda batch, i, split: model(batch), Adam(learning_rate=DWQ_RATE, bias_correction=True),
        rows[VALIDATION:], rows[:VALIDATION], BATCH, ids.shape[1], SEED, dtype=mx.float16,
    )  # fmt: skip
    save(out, str(before), student, tokenizer, config)


def read(job: Job, out: Path, before: Path) -> Decoded:
    """Dequantize what was written, in float32, into a Hugging Face folder, and open that by its names."""
    from safetensors.numpy import save_file

    from convert.sources import open_source

    plain = job.folder / "decoded"
    shutil.rmtree(plain, ignore_errors=True)
    shutil.copytree(before, plain, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "*.bin", "*.gguf"))
    floats, nbytes, wide = decode(out)
    save_file(floats, plain / "model.safetensors")
    try:
        source = open_source(plain)
    except UserError as e:
        raise Unavailable(f"what mlx-lm wrote is named otherwise: {e}") from None
    spec = source.spec
    bits = 8 * wide / sum(matrices(spec).values())
    return Decoded(spec, source.tensor, bits, 8 * nbytes / weights(spec))


def decode(folder: Path) -> tuple[dict[str, Any], int, int]:
    """Float32 tensors by name, bytes of all tensors, and bytes of those with rows."""
    import mlx.core as mx

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packing: dict[str, Any] = config.get("quantization") or {}
    stored: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= mx.load(str(file))  # type: ignore[operator]
    out = {}
    for name, value in stored.items():
        path, _, part = name.rpartition(".")
        if part in ("scales", "biases") and f"{path}.scales" in stored:
            continue
        if part == "weight" and f"{path}.scales" in stored:
            own = packing.get(path)
            p = own if isinstance(own, dict) else packing
            scales, biases = stored[f"{path}.scales"], stored[f"{path}.biases"]
            value = mx.dequantize(value, scales.astype(mx.float32), biases.astype(mx.float32),
                                  group_size=p["group_size"], bits=p["bits"])  # fmt: skip
        out[name] = np.ascontiguousarray(np.array(value.astype(mx.float32)))
    nbytes = sum(t.nbytes for t in stored.values())
    return out, nbytes, sum(t.nbytes for t in stored.values() if t.ndim > 1)
