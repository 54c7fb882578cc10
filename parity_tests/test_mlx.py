"""MLX against the oracle: every feature, every level, in our own runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import backends
from backends.base import Runtime
from backends.numpy.model import Oracle
from convert import gates
from convert.verify.numeric import emulate_dtype
from parity_tests.artifacts import check_graph, check_packing, opened, values, write
from parity_tests.cases import FEATURES, nmse, random_ids, random_specs, random_weights

LEVELS = ("f32", "f16", "bf16", "q8", "q4")


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_carried_in_float32(name: str, tmp_path: Path) -> None:
    spec, weights = FEATURES[name], random_weights(FEATURES[name])
    path = write("mlx", spec, weights, tmp_path / "m")
    check_packing("mlx", path, spec, weights, "f32")
    check_graph("mlx", path)
