"""Quantize once: the same codes and scales in every container, read back from the files themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
from backends.base import content_hash
from convert.pipeline import convert_all
from convert.sources.base import weights_hash
from parity_tests.artifacts import opened
from parity_tests.cases import BASE
from parity_tests.checkpoints import VOCAB, write_checkpoint
from spec import Spec, parse
from spec.config import merge
from spec.params import params

CONTAINERS: dict[str, tuple[str, dict[str, str]]] = {
    "gguf": ("gguf", {}),
    "mlx": ("mlx", {}),
    "onnx": ("onnx", {"profile": "ort"}),
    "onnx-portable": ("onnx", {"profile": "portable"}),
    "coreml": ("coreml", {}),
    "hf": ("hf", {}),
}
PATCHES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"head": {"tied": True}},
    "narrow": {"width": 40, "block": {"attention": {"heads": 5, "kv_heads": 5, "head_dim": 8}}},
    "odd_heads": {"width": 96, "vocab_size": 131, "block": {"attention": {"heads": 6, "kv_heads": 3, "head_dim": 16}}},
    "moe": {"block": {"mlp": {"kind": "moe", "experts": 4, "hidden": 64, "router": {"top_k": 2}}}},
    "bias": {"block": {"attention": {"bias": True}, "mlp": {"bias": True}}},
}
"""`narrow`: widths that are no multiple of 32 stay f16 everywhere."""
SPECS: dict[str, Spec] = {n: parse(merge(BASE, p)) for n, p in PATCHES.items()}


def matrices(backend: str, path: Path, spec: Spec) -> dict[str, str]:
    """Content hash of every matrix, decoded from the artifact."""
    artifact = opened(backend, path)
    return {p.name: content_hash([artifact.rows(p.name, 0, p.shape[0])]) for p in params(spec) if p.matrix}


@pytest.mark.parametrize("level", ["q8", "q4"])
@pytest.mark.parametrize("name", SPECS)
def test_one_hash_for_all_containers(name: str, level: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    checkpoint = write_checkpoint(tmp_path / "source", spec, tokenizer=False)
    found: dict[str, str] = {}
    receipts = set()
    for label, (backend, options) in CONTAINERS.items():
        if backends.missing(backends.get(backend), run=False):
            continue
        verdict = backends.support(backend, spec, level, **options)
        assert verdict.ok, f"{backend}: {verdict.refusals}"
        out = tmp_path / label
        (result,) = convert_all(
            checkpoint, [backend], level, out.with_suffix(backends.get(backend).suffix), options=options, verify=False
        )
        receipts.add(result.receipt["weights_hash"])
        found[label] = weights_hash(iter(matrices(backend, result.out, spec).items()))
    assert len(found) == len(CONTAINERS), "every backend's packages are installed for the tests"
    assert len(set(found.values())) == 1, found
    assert len(receipts) == 1


def test_one_pass_writes_them_all(tmp_path: Path) -> None:
    """Five targets at once give the files that five conversions give."""
    spec = parse(merge(BASE, {"vocab_size": VOCAB, "head": {"tied": True}}))
    checkpoint = write_checkpoint(tmp_path / "tiny", spec)
    names = ["gguf", "mlx", "onnx", "coreml", "hf"]
    results = convert_all(checkpoint, names, "q4", tmp_path / "shipped")
    assert [r.backend for r in results] == names and all(r.report and r.report.ok for r in results)
    assert sorted(p.name for p in (tmp_path / "shipped").iterdir()) == [
        "tiny.q4-hf", "tiny.q4-mlx", "tiny.q4-onnx", "tiny.q4.gguf", "tiny.q4.gguf.md", "tiny.q4.gguf.receipt.json",
        "tiny.q4.mlpackage", "tiny.q4.mlpackage.md", "tiny.q4.mlpackage.receipt.json",
    ]  # fmt: skip
    assert len({r.receipt["weights_hash"] for r in results}) == 1
    for r in results:
        alone = convert_all(checkpoint, [r.backend], "q4", tmp_path / f"alone{r.out.suffix}", verify=False)[0]
        assert matrices(r.backend, alone.out, spec) == matrices(r.backend, r.out, spec)
        if alone.out.is_dir() and not backends.get(r.backend).suffix:
            mark = json.loads((r.out / "allotrope.json").read_text())
            assert mark["report"]["ok"] and (r.out / "README.md").is_file()
        with backends.load(r.out) as runtime:
            ids = runtime.encode("def f(x):")
            assert runtime.decode(ids).decode().strip() == "def f(x):"
            assert runtime.logits(np.array([ids])).shape == (1, len(ids), VOCAB)
