"""Measures one artifact in a process of its own, so that a crash takes nothing with it and peak memory is its own."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from backends.base import Runtime

PREFILL, DECODE = 128, 32
"""Tokens of one timed prefill, and of one timed run of single steps."""


def peak_bytes() -> int:
    """The largest resident size this process has had. On Linux `ru_maxrss` begins with the parent's; VmHWM does not."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(x.split()[1]) for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def speed(runtime: Runtime, ids: np.ndarray, repeats: int) -> dict[str, float]:
    """Median tokens per second over `repeats` runs after one warm-up: a prefill, then single steps that continue it."""
    n = max(1, min(PREFILL, len(ids), runtime.context - DECODE))
    steps = max(1, min(DECODE, runtime.context - n))
    prefill, decode = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        runtime.prefill(ids[:n])
        middle = time.perf_counter()
        for i in range(steps):
            runtime.step(ids[i % len(ids)][None])
        end = time.perf_counter()
        prefill.append(n / (middle - start))
        decode.append(steps / (end - middle))
    return {
        "prefill_tokens_per_s": statistics.median(prefill[1:]),
        "decode_tokens_per_s": statistics.median(decode[1:]),
        "decode_spread": (max(decode[1:]) - min(decode[1:])) / statistics.median(decode[1:]),
        "prefill_tokens": n,
        "decode_tokens": steps,
    }


def cache_size(runtime: Runtime, ids: np.ndarray) -> dict[str, float]:
    """Bytes that keys and values of a token take, where the runtime has a choice of them."""
    if not hasattr(runtime, "cache_bytes"):
        return {}
    whole: Any = runtime
    runtime.prefill(ids)
    return {"cache_bytes_per_token": whole.cache_bytes() / len(ids)}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Load time, peak memory, speed and quality of one artifact.

    job: `artifact`, `backend`, `ids` and `reference` (.npy, [N, T] and [N, T, V]), `options` of the runtime, `repeats`.
    """
    import backends
    from convert.verify.metrics import Quality

    ids = np.load(job["ids"])
    backends.part(backends.get(job["backend"]), "runtime")  # imports are not the artifact's memory or load time
    base = peak_bytes()
    start = time.perf_counter()
    runtime = backends.load(job["artifact"], job["backend"], **job["options"])
    runtime.prefill(ids[0, :1] * 0)  # token 0, which every vocabulary has: they are compared below
    out: dict[str, Any] = {"load_s": time.perf_counter() - start, "info": runtime.info()}
    with runtime:
        reference = np.load(job["reference"], mmap_mode="r")
        if runtime.vocab_size != reference.shape[-1]:
            return {"mismatch": f"its vocabulary is {runtime.vocab_size}, the reference's {reference.shape[-1]}"}
        if job["repeats"]:
            out |= speed(runtime, ids[0], job["repeats"])
        out |= {"peak_bytes": peak_bytes(), "peak_above_base_bytes": peak_bytes() - base}
        out |= cache_size(runtime, ids[0])
        quality = Quality()
        for row, ref in zip(ids, reference, strict=True):
            logits = runtime.logits(row[None])[0]
            if not np.isfinite(logits).all():
                raise ArithmeticError(f"{int((~np.isfinite(logits)).sum())} logits are not finite")
            quality.add(ref, logits, np.append(row[1:], -1))
    return out | {"quality": quality.summary(), "scored": len(quality.nll)}


def main() -> None:
    """`python -m evals.worker JOB.json OUT.json`."""
    job, out = (Path(a) for a in sys.argv[1:3])
    out.write_text(json.dumps(measure(json.loads(job.read_text()))), encoding="utf-8")


if __name__ == "__main__":
    main()
