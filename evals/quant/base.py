"""The original in the formats that other tools start from, written once for all of them."""

from __future__ import annotations

import json
from pathlib import Path

from evals.quant.decoded import Job, Unavailable
from spec.errors import UserError

NAMES = {"hf": "original-hf", "gguf": "original.gguf"}


def original(job: Job, backend: str) -> Path:
    """The original at float32, as a Hugging Face folder or a GGUF file. Raises `Unavailable`."""
    from convert.pipeline import convert_all

    if backend == "hf" and _plain(job.source):
        return job.source  # in the architecture that it was published in
    out = job.shared / NAMES[backend]
    if not out.exists():  # a conversion appears only when it is whole
        try:
            convert_all(job.source, [backend], "f32", out, verify=False, threads=job.threads)
        except UserError as e:
            raise Unavailable(f"the original does not go into {backend}: {e}") from None
    return out


def _plain(source: Path) -> bool:
    """Whether it is a Hugging Face folder of floats."""
    config = source / "config.json"
    if (source / "spec.yaml").exists() or not config.is_file() or not any(source.glob("*.safetensors")):
        return False
    return "quantization_config" not in json.loads(config.read_text(encoding="utf-8"))
