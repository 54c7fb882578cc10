"""llama.cpp's own quantizer, with and without its importance matrix, on the GGUF file of the original."""

from __future__ import annotations

import ctypes
from typing import Any

from backends.base import QuantizedTensor
from evals.quant.activations import mean_squares
from evals.quant.base import original
from evals.quant.decoded import Decoded, Job, Unavailable, matrices, weights

FILE_TYPES = {
    "q2_k": "Q2_K", "q3_k_s": "Q3_K_S", "q3_k_m": "Q3_K_M", "q3_k_l": "Q3_K_L", "q4_0": "Q4_0", "q4_1": "Q4_1",
    "q4_k_s": "Q4_K_S", "q4_k_m": "Q4_K_M", "q5_0": "Q5_0", "q5_1": "Q5_1", "q5_k_s": "Q5_K_S", "q5_k_m": "Q5_K_M",
    "q6_k": "Q6_K", "q8_0": "Q8_0", "iq2_xxs": "IQ2_XXS", "iq2_xs": "IQ2_XS", "iq2_s": "IQ2_S", "iq2_m": "IQ2_M",
    "iq3_xxs": "IQ3_XXS", "iq3_xs": "IQ3_XS", "iq3_s": "IQ3_S", "iq3_m": "IQ3_M", "iq4_nl": "IQ4_NL",
    "iq4_xs": "IQ4_XS",
}  # fmt: skip
"""Types that it is asked for, and their names among llama_cpp's constants."""


def make(job: Job, level: str, imatrix: bool) -> Decoded:
    """`llama_model_quantize` on the original's float32 GGUF. Raises `Unavailable`."""
    import llama_cpp

    from backends.gguf.read import Artifact
    from backends.gguf.types import TYPES

    before, out = original(job, "gguf"), job.folder / "quantized.gguf"
    found = Artifact(before)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{FILE_TYPES[level]}")
    settings.nthread = job.threads or 0
    entries: Any = None
    if imatrix:
        entries = _imatrix(found, job, llama_cpp.llama_model_imatrix_data)
        settings.imatrix = entries[0]
    pointer: Any = ctypes.byref(settings)
    status = llama_cpp.llama_model_quantize(str(before).encode(), str(out).encode(), pointer)
    if status != 0 or not out.exists():
        raise Unavailable(f"llama.cpp's quantizer ended with status {status}")
    artifact = Artifact(out, found.spec)
    spec = artifact.spec
    sizes = matrices(spec)
    stored = {name: TYPES[artifact.type(name)] for name in sizes}
    bits = sum(8 * stored[name].nbytes(size) for name, size in sizes.items()) / sum(sizes.values())
    header = artifact.header.tensors.values()
    nbytes = sum(TYPES[t.type].nbytes(_size(t.shape)) for t in header)
    kinds = ", ".join(sorted({t.name for t in stored.values()}))

    def fetch(name: str) -> Any:
        values = artifact.rows(name, 0, artifact.shapes[name][0])
        return values.dequantize() if isinstance(values, QuantizedTensor) else values

    return Decoded(spec, fetch, bits, 8 * nbytes / weights(spec), kinds)


def _imatrix(found: Any, job: Job, entry: Any) -> tuple[Any, list[Any]]:
    """The array that llama.cpp reads, and what must stay alive beside it. As llama-imatrix does by default it covers
    the layers and not the head."""
    means = mean_squares(job)
    rows, keep = [], []
    for name, slot in found.slots.items():
        pieces = [p.name for p in slot.slot.pieces if p.name in means]
        if not slot.slot.matrix or not pieces or not name.startswith("blk."):
            continue
        values = means[pieces[0]].ravel()
        data = (ctypes.c_float * len(values))(*values)
        keep.append(data)
        rows.append(entry(name.encode(), ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), len(values)))
    array = (entry * (len(rows) + 1))(*rows)
    return array, keep


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
