"""Everything that is known about a few artifacts of one checkpoint, as data."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import backends
from convert.output import size_of, weight_bits
from evals.reference import cut, reference_logits
from spec.errors import UserError
from spec.params import params

WINDOW = 512
"""Longest window; shorter where the vocabulary is large, so that one window's logits stay small."""
SESSION = 160
"""Shortest session that still times a prefill and some steps (see `evals.worker`)."""
_LOGITS_BYTES = 128 << 20


@dataclass(frozen=True)
class Options:
    """What to measure."""

    text: str | Path | None = None
    tokens: int = 2048
    threads: int | None = None
    repeats: int = 3
    checks: bool = True
    caches: tuple[str | None, ...] = (None,)
    """How keys and values are kept: each artifact is measured with each. None: the runtime's own way."""


def compare(artifacts: Sequence[Path], reference: Path, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure every artifact against one reference.

    reference: a checkpoint or a Hugging Face folder. say: told each step. Raises `UserError` for bad input; an artifact
    that crashes is reported in its own row.
    """
    from convert.sources import open_source
    from convert.verify.sample import read_text

    found = [(a, _backend_of(a)) for a in artifacts]
    for _, backend in found:
        for kind in filter(None, options.caches):
            backends.check_options(backends.get(backend), {"cache": kind})
    source = open_source(reference)
    spec, tokenizer = source.spec, source.tokenizer
    if tokenizer is None:
        raise UserError(f"{reference}: no tokenizer, and perplexity needs one (put tokenizer.json beside the weights)")
    window = max(16, min(WINDOW, _LOGITS_BYTES // (4 * spec.vocab_size)))
    session = min(spec.context, max(window, SESSION))
    windows = cut(spec, tokenizer, read_text(options.text), options.tokens, window)
    weights = sum(p.size for p in params(spec))
    with tempfile.TemporaryDirectory(prefix="evals-") as folder:
        ids, logits = Path(folder) / "ids.npy", Path(folder) / "reference.npy"
        np.save(ids, windows.ids)
        done = iter(range(1, len(windows.ids) + 1))
        total = len(windows.ids)
        how = reference_logits(
            source, windows.ids, logits, session, lambda: say(f"reference: window {next(done)} of {total}")
        )
        rows = []
        for artifact, backend in found:
            known: dict[str, Any] = {
                "artifact": str(artifact),
                "backend": backend,
                "bytes": size_of(artifact),
                "bits_per_weight": weight_bits(artifact, backend, weights),
            }
            checks: dict[str, Any] = {}
            for kind in options.caches:
                say(f"{artifact.name}: measuring")
                given = {"context": session, "threads": options.threads, "cache": kind}
                job = {
                    "artifact": str(artifact),
                    "backend": backend,
                    "ids": str(ids),
                    "reference": str(logits),
                    "repeats": options.repeats,
                    "options": {name: value for name, value in given.items() if value is not None},
                }
                row: dict[str, Any] = known | ({"cache": kind} if kind else {}) | _run(job, Path(folder))
                if "mismatch" in row:
                    raise UserError(f"{artifact}: not made from {reference}: {row['mismatch']}")
                if "quality" in row:
                    row |= _per_byte(row["quality"], windows.bytes_per_token)
                if options.checks and not checks:  # of the artifact: at stock settings, whatever the cache is
                    say(f"{artifact.name}: verifying")
                    checks = _checks(artifact, backend, reference, options)
                rows.append(row | ({"checks": checks} if checks else {}))
    return {
        "reference": str(reference),
        "reference_computed_by": how,
        "spec_hash": spec.hash,
        "weights": weights,
        "tokens": int(windows.ids.size),
        "window": int(windows.ids.shape[1]),
        "text": str(options.text or "stdlib"),
        "bytes_per_token": windows.bytes_per_token,
        "artifacts": rows,
    }


def _backend_of(artifact: Path) -> str:
    if not artifact.exists():
        raise UserError(f"{artifact}: no such file or folder")
    found = backends.recognise(artifact, backends.REGISTRY)
    if found is None:
        raise UserError(f"{artifact}: not an artifact of any backend ({', '.join(b.name for b in backends.REGISTRY)})")
    absent = backends.missing(found)
    if absent:
        raise UserError(f"{artifact}: {found.name} needs {', '.join(absent)}: pip install 'allotrope[{found.extra}]'")
    return found.name


def _run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    from convert.verify import last_words

    request, answer = folder / "job.json", folder / "answer.json"
    request.write_text(json.dumps(job), encoding="utf-8")
    answer.unlink(missing_ok=True)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "evals.worker", str(request), str(answer)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not answer.exists():
        return {"error": f"{job['backend']} ended with status {done.returncode}{last_words(done.stderr)}"}
    return json.loads(answer.read_text(encoding="utf-8"))


def _per_byte(q: dict[str, float], bytes_per_token: float) -> dict[str, float]:
    ppl, ppl_ref = math.exp(q["nll"]), math.exp(q["nll_ref"])
    bits = 1 / math.log(2) / bytes_per_token
    return {
        "perplexity": ppl,
        "perplexity_se": ppl * q["nll_se"],
        "perplexity_reference": ppl_ref,
        "bits_per_byte": q["nll"] * bits,
        "bits_per_byte_reference": q["nll_ref"] * bits,
    }


def _checks(artifact: Path, backend: str, reference: Path, options: Options) -> dict[str, Any]:
    from convert.verify import verify
    from convert.verify.run import VERIFIABLE, describe

    if backend not in VERIFIABLE:
        return {"status": "NOT_RUN", "reason": f"{backend} artifacts are not converted ones"}
    level = describe(artifact, backend)[1]
    text = None if options.text is None or str(options.text) == "stdlib" else options.text
    return verify(artifact, backend, reference, level, text, threads=options.threads).to_dict()
