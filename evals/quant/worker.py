"""Makes and scores one variant in a process of its own, so that a crash takes nothing with it and memory goes back.

The answer is a JSON file; every token's numbers lie beside it in an .npz, for paired comparisons.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.quant.decoded import Decoded, Job, Unavailable

LIMIT = 300
"""Characters of a reason."""


def reference(job: dict[str, Any]) -> dict[str, Any]:
    """The original's logits [N, T, V], on disk."""
    from convert.sources import open_source
    from evals.reference import reference_logits

    ids = np.load(job["ids"])
    with open_source(job["source"]) as source:
        how = reference_logits(source, ids, Path(job["reference"]), job["session"], lambda: None)
    return {"how": how}


def variant(job: dict[str, Any]) -> dict[str, Any]:
    """Bits and quality of one variant, or `reason` why there is none."""
    threads = job["threads"]
    paths = {k: Path(job[k]) for k in ("source", "folder", "shared")}
    calibration = Path(job["calibration"]) if job["calibration"] else None
    started = time.perf_counter()
    try:
        module = importlib.import_module(job["maker"])
        made = module.make(Job(**paths, ids=calibration, text=job["text"], threads=threads), **job["settings"])
    except (Unavailable, ImportError) as e:
        return {"reason": " ".join(str(e).split())[:LIMIT]}
    seconds = time.perf_counter() - started
    summary = score(made, job)
    return {"bits": made.bits, "file_bits": made.file_bits, "note": made.note, "seconds": seconds, **summary}


def score(made: Decoded, job: dict[str, Any]) -> dict[str, Any]:
    """Logits of the dequantized weights against the original's, token by token."""
    from convert.verify.metrics import Quality
    from evals.reference import forward

    ids, references = np.load(job["ids"]), np.load(job["reference"], mmap_mode="r")
    how, logits = forward(made, job["session"])
    quality = Quality()
    for row, ref in zip(ids, references, strict=True):
        quality.add(ref, logits(row[None])[0], np.append(row[1:], -1))
    found = {"kl": quality.kl, "nll": quality.nll, "nll_ref": quality.nll_ref, "agree": quality.agree}
    tokens = {k: np.asarray(v, np.float64).reshape(len(ids), -1) for k, v in found.items()}
    np.savez_compressed(job["tokens"], **tokens)  # type: ignore[arg-type]
    spread = {"kl_se": tokens["kl"], "nll_se": tokens["nll"], "delta_nll_se": tokens["nll"] - tokens["nll_ref"]}
    return {"how": how, **quality.summary(), **{k: clustered_error(v) for k, v in spread.items()}}


def clustered_error(values: NDArray[np.float64]) -> float:
    """Standard error of the mean of values [windows, tokens], by the means of windows: neighbouring tokens are alike,
    and counted as independent they would make it about half of what it is."""
    from convert.verify.metrics import standard_error

    return standard_error(values.mean(1))


def main() -> None:
    """`python -m evals.quant.worker JOB.json OUT.json`."""
    request, out = (Path(a) for a in sys.argv[1:3])
    job = json.loads(request.read_text(encoding="utf-8"))
    answer = (reference if job["kind"] == "reference" else variant)(job)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(out)


if __name__ == "__main__":
    main()
