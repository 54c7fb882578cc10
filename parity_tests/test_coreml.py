"""Core ML against the oracle: the saved package, interpreted, for every feature and level."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.coreml.support import support
from parity_tests import artifacts
from parity_tests.cases import FEATURES, random_weights

pytest.importorskip("coremltools")


@pytest.mark.parametrize("name", FEATURES)
def test_features_match_the_oracle_in_float32(name: str, tmp_path: Path) -> None:
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = artifacts.write("coreml", spec, weights, tmp_path / "m.mlpackage")
    artifacts.check_packing("coreml", path, spec, weights, "f32")
    artifacts.check_graph("coreml", path)


def test_every_feature_is_carried() -> None:
    assert {n: support(s, "f32").refusals for n, s in FEATURES.items() if not support(s, "f32").ok} == {}
