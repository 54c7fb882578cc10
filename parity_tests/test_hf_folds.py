"""What is rewritten on the way into a folder leaves the source's function: transformers against the source itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

import backends
from backends.hf.carriers import BY_ARCH
from backends.hf.fit import examine
from backends.hf.runtime import load
from backends.hf.shipped import Origin, origins
from backends.numpy.model import Oracle
from convert.verify.artifact import planned
from parity_tests import artifacts
from parity_tests.cases import BASE, FEATURES, PATCHES, nmse, random_ids, random_weights
from parity_tests.hf_specs import CARRIED, write_folder
from spec import Spec, parse
from spec.config import merge

torch.set_num_threads(1)


@pytest.mark.parametrize("name", CARRIED)
def test_features_match_the_oracle_on_the_sources_own_weights(name: str, tmp_path: Path) -> None:
    """Nothing is read back: whatever is folded, filled in or reordered must leave the source's function. Folds round
    gains once, as every other float32 operation does."""
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = artifacts.write("hf", spec, weights, tmp_path / "m")
    assert artifacts.opened("hf", path).spec == spec
    ids = random_ids(spec, 2, 47)
    with load(path, exact=True, threads=1) as runtime:
        got = runtime.logits(ids)
        exact = Oracle(spec, weights, length=artifacts.opened("hf", path).session or runtime.context).logits(ids)
    assert nmse(got, exact) <= artifacts.EXACT


WRONG_FOLDS: dict[str, tuple[str, Any]] = {
    "offset_missed": ("rms_offset", lambda o: replace(o, add=0.0)),
    "offset_twice": ("rms_offset", lambda o: replace(o, add=2 * o.add)),
    "offset_taken_away": ("gemma", lambda o: replace(o, add=-o.add)),
    "gain_of_nothing": ("rms_no_weight", lambda o: replace(o, add=0.0)),
    "bias_of_one": ("layernorm", lambda o: replace(o, add=1.0) if o.name is None and not o.add else o),
    "sink_that_takes_part": ("local_theta", lambda o: replace(o, add=0.0)),
}
GEMMA = {"name": "gemma", "embedding": {"scale": 32**0.5}, "block": {"mlp": {"activation": "gelu_tanh"}}}
"""Plain gains, which Gemma's code stores less one."""


@pytest.mark.parametrize("fold", WRONG_FOLDS)
def test_a_wrong_fold_shows_in_the_graph(fold: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writer and reader share it, so packing cannot see it; the oracle computes the source's function and does."""
    name, bend = WRONG_FOLDS[fold]
    spec = FEATURES[name] if name in FEATURES else parse(merge(BASE, GEMMA))
    fit = examine(spec, BY_ARCH["gemma" if name == "gemma" else CARRIED[name]][0])
    weights = random_weights(spec)
    right = write_folder(spec, weights, tmp_path / "right", "f32", fit)
    artifacts.check_graph("hf", right)

    def bent(source: Spec, shipped: Spec) -> dict[str, Origin]:
        return {n: bend(o) for n, o in origins(source, shipped).items()}

    monkeypatch.setattr("backends.hf.fit.origins", bent)
    wrong = write_folder(spec, weights, tmp_path / "wrong", "f32", examine(spec, fit.carrier))
    artifacts.check_packing("hf", wrong, spec, weights, "f32")
    with pytest.raises(AssertionError, match="batch 1, row 0"):
        artifacts.check_graph("hf", wrong)


def test_a_norm_that_two_branches_shared_is_stored_twice_alike(tmp_path: Path) -> None:
    spec = parse(merge(merge(BASE, PATCHES["neox"]), {"block": {"shared_norm": True}}))
    weights = random_weights(spec)
    path = write_folder(spec, weights, tmp_path / "m", "f32", examine(spec, BY_ARCH["gpt_neox"][0]))
    artifacts.check_packing("hf", path, spec, weights, "f32")
    artifacts.check_graph("hf", path)
    file = path / "model.safetensors"
    gain = np.ascontiguousarray(weights["layers.1.attn_norm.weight"]).tobytes()
    data = file.read_bytes()
    at = data.rindex(gain)
    assert data.index(gain) < at, "stored for both branches"
    file.write_bytes(data[:at] + np.float32(2).tobytes() + data[at + 4 :])
    found = artifacts.opened("hf", path).problems(planned(backends.get("hf"), spec, "f32"))
    assert list(found.values()) == ["differs from layers.1.attn_norm.weight, whose copy it is"]
