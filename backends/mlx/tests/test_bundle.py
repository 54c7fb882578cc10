"""The bundled model.py: one file of the shared sources, and constants that survive JSON."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx

from backends.mlx.bundle import KEY, arguments, constants, source
from backends.mlx.layout import without_offsets
from backends.mlx.model import Model
from parity_tests.cases import FEATURES, random_ids, random_weights
from spec import forward


def test_it_needs_mlx_and_the_standard_library_only() -> None:
    tree = ast.parse(source())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"mlx", "mlx_lm"}
    (lazy,) = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("mlx_lm")]
    assert lazy not in tree.body, "caches are imported where mlx-lm asks for them"


def test_it_is_the_shared_forward_pass_word_for_word() -> None:
    parts = (forward.begin, forward.blocks, forward.end)
    for function in (forward.attention, forward.mlp, forward.block, *parts, forward.hidden, forward.logits):
        assert inspect.getsource(function).strip() in source()


@pytest.mark.parametrize(
    "name", ["gemma2", "alibi", "rope_longrope", "learned_offset", "clamped_swiglu", "qk_norm_width"]
)
def test_constants_and_file_compute_what_the_spec_does(name: str, tmp_path: Path) -> None:
    spec = without_offsets(FEATURES[name])
    (tmp_path / "model.py").write_text(source())
    found = importlib.util.spec_from_file_location("custom_model", tmp_path / "model.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)  # as mlx-lm does it: sys.modules never has it
    found.loader.exec_module(module)
    config = json.loads(json.dumps({"model_file": "model.py", KEY: constants(spec, "f32")}))
    weights = [(n, mx.array(x)) for n, x in random_weights(spec).items()]
    ids = mx.array(random_ids(spec, 2, 20))
    logits = []
    for model in (module.Model(module.ModelArgs.from_dict(config)), Model(arguments(spec, "f32"))):
        model.load_weights(weights)
        logits.append(np.array(model(ids)))
    assert np.array_equal(*logits)
