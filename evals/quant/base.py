"""The original in the formats that other tools start from, written once for all of them."""

from __future__ import annotations

from pathlib import Path

from evals.quant.decoded import Job, Unavailable
from spec.errors import UserError

NAMES = {"hf": "original-hf", "gguf": "original.gguf"}


def original(job: Job, backend: str) -> Path:
    """The original at float32, as a Hugging Face folder or a GGUF file. Raises `Unavailable`."""
    from convert.pipeline import convert_all

    out = job.shared / NAMES[backend]
    if not out.exists():  # a conversion appears only when it is whole
        try:
            convert_all(job.source, [backend], "f32", out, verify=False, threads=job.threads)
        except UserError as e:
            raise Unavailable(f"the original does not go into {backend}: {e}") from None
    return out
