"""What this project writes: the portable levels and each container's native types, by `convert`, read back from the
file."""

from __future__ import annotations

from typing import Any

import backends
from convert.levels import LEVELS
from evals.quant.decoded import Decoded, Job, Unavailable
from spec.errors import UserError
from spec.params import params


def make(job: Job, target: str, level: str, effort: str) -> Decoded:
    """Convert and read back. `target`: a backend, or empty for the first that takes the model."""
    from convert.pipeline import convert_all
    from convert.sources import open_source

    with open_source(job.source) as source:
        spec = source.spec
    backend = backends.get(target or carrier(spec, level))
    out = job.folder / f"artifact{backend.suffix}"
    given: dict[str, Any] = {} if effort == "fast" else {"effort": effort, "calibrate": job.text}
    try:
        (result,) = convert_all(
            job.source, [backend.name], level, out, verify=False, force=True, threads=job.threads, **given
        )
    except UserError as e:
        raise Unavailable(str(e)) from None
    artifact = backends.part(backend, "read").open_artifact(out)
    shapes = {p.name: p.shape for p in params(spec)}
    note = f"in {backend.name}" if level in LEVELS else ""
    file_bits = result.file_bits if result.file_bits is not None else result.bits
    return Decoded(spec, lambda name: artifact.rows(name, 0, shapes[name][0]), result.bits, file_bits, note)


def carrier(spec: Any, level: str) -> str:
    """The container that holds a portable level with the fewest bytes beside codes and scales, of those that can be
    written here. Raises `Unavailable`."""
    order = ("gguf", "mlx", "onnx", "hf") if level != "q4-g128" else ("mlx", "onnx", "hf", "gguf")
    refused = []
    for name in order:
        absent = backends.missing(backends.get(name), run=False)
        found = backends.support(name, spec, level)
        if found.ok and not absent:
            return name
        refused.append(f"{name}: {'; '.join(found.refusals) or 'needs ' + ', '.join(absent)}")
    raise Unavailable(" | ".join(refused))
