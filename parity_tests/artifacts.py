"""Artifacts of any backend from a spec and weights, and the comparisons that each of them must stand.

Shapes: B batch, T tokens, V vocab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import backends
from backends.base import Artifact, Floats, QuantizedTensor, Runtime, Tokenizer
from backends.numpy.model import Oracle
from convert.stream import rounded
from convert.verify import routes
from convert.verify.artifact import Packed, planned
from parity_tests.cases import nmse, random_ids
from spec.config import MoE, Spec
from spec.params import params

EXACT = 1e-11
"""NMSE that float32 arithmetic on the artifact's own weights may have against the float64 oracle."""

FIRM = 3e-5
"""Distance between routers' scores that float32 arithmetic through a few layers does not bridge."""


def write(
    backend: str,
    spec: Spec,
    weights: Mapping[str, Floats],
    path: Path,
    level: str = "f32",
    tokenizer: Tokenizer | None = None,
    rows: int = 24,
    **options: str,
) -> Path:
    """An artifact as a conversion writes it, in blocks of `rows` rows, which cut through heads."""
    b = backends.get(backend)
    verdict = backends.support(backend, spec, level, **options)
    assert verdict.ok, verdict.refusals
    plan = planned(b, spec, level)
    build = backends.part(b, "build")
    writer = build.writer(spec, plan, tokenizer, path, level=level, metadata={}, threads=1, **options)
    for p in plan:
        x = np.ascontiguousarray(weights[p.name], np.float32)
        step = rows if len(p.shape) > 1 else len(x)
        for start in range(0, len(x), step):
            writer.write(p.name, start, rounded(p.name, p.level, start, x[start : start + step]))
    writer.close({"level": level, "backend": backend})
    return path


def opened(backend: str, path: Path) -> Artifact:
    """The artifact, for its weights."""
    return backends.part(backends.get(backend), "read").open_artifact(path)


def values(artifact: Artifact) -> dict[str, NDArray[Any]]:
    """Every weight of the artifact as its graph uses it, dequantized."""
    out = {}
    for p in params(artifact.spec):
        found = artifact.rows(p.name, 0, p.shape[0])
        out[p.name] = found.dequantize() if isinstance(found, QuantizedTensor) else found
    return out


def check_packing(backend: str, path: Path, spec: Spec, weights: Mapping[str, Floats], level: str) -> None:
    """Every weight in the artifact is the canonical rounding of the source's, bit for bit."""
    packed = Packed(opened(backend, path), planned(backends.get(backend), spec, level))
    assert packed.problems() == {}
    for p in params(spec):
        x = np.asarray(weights[p.name], np.float32)
        together = packed.rows_together(p.name)
        step = together * -(-20 // together) if len(p.shape) > 1 else len(x)
        for start in range(0, len(x), step):
            assert packed.compare(p.name, start, x[start : start + step]) == "", p.name


def chunked(runtime: Runtime, ids: NDArray[Any], chunks: Sequence[int]) -> tuple[NDArray[Any], slice]:
    """[T] ids in pieces: a prefill of the first, then steps. Logits [t, V] and the positions they belong to."""
    parts, at = [runtime.prefill(ids[: chunks[0]])[None]], chunks[0]
    for n in chunks[1:]:
        parts.append(runtime.step(ids[at : at + n]))
        at += n
    return np.concatenate(parts), slice(chunks[0] - 1, at)


def settled_ids(oracle: Oracle, batch: int, length: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Random tokens [B, T] whose experts float32 cannot turn, drawn again where a router is near a tie, and what the
    oracle says to them."""
    best, ids, exact = -1.0, np.empty(0, np.int64), np.empty(0)
    for seed in range(1, 9):
        scores, drawn = routes.Scores(), random_ids(oracle.spec, batch, length, seed)
        logits = oracle.logits(drawn, scores)
        gap = min(
            (_gap(scores[f"{scope}mlp.scores"], m) for scope, m in routes.mixtures(oracle.spec).items()), default=1
        )
        if gap > best:
            best, ids, exact = gap, drawn, logits
        if best >= FIRM:
            break
    return ids, exact


def _gap(scores: NDArray[Any], m: MoE) -> float:
    """Least distance between the last expert chosen and the first left out."""
    ordered, k = -np.sort(-scores, -1), m.router.top_k
    return float((ordered[..., k - 1] - ordered[..., k]).min()) if k < m.experts else 1.0


def check_graph(
    backend: str, path: Path, length: int = 47, batches: Sequence[int] = (1, 3), limit: float = EXACT, **load: Any
) -> None:
    """Float32 arithmetic against the oracle on the artifact's weights: whole batches, chunks, and token by token."""
    artifact = opened(backend, path)
    spec, weights = artifact.spec, values(artifact)
    runtime: Runtime = backends.load(path, backend, exact=True, **load)
    with runtime:
        oracle = Oracle(spec, weights, length=artifact.session or runtime.context)
        length = min(length, spec.context - 1)
        ids, exact = settled_ids(oracle, max(batches), length)
        for batch in batches:
            got = runtime.logits(ids[:batch])
            assert got.shape == (batch, length, spec.vocab_size) and got.dtype == np.float32
            for row in range(batch):
                assert nmse(got[row], exact[row]) <= limit, f"batch {batch}, row {row}"
            assert nmse(got[:, -4:], exact[:batch, -4:]) <= 4 * limit  # past windows, at long rotations
        uneven = [9, 1, 5, 1, length - 16] if length > 16 else [1, length - 1] if length > 1 else [1]
        for chunks in ([length], uneven, [1] * min(length, 24)):
            pieces, at = chunked(runtime, ids[0], chunks)
            assert nmse(pieces, exact[0, at]) <= limit, f"chunks {chunks}"
