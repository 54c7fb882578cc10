"""Every architecture of the table, opened by mlx-lm itself: it computes what its row says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray

pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from backends.base import Tokenizer
from backends.mlx.carriers import CARRIERS
from backends.mlx.levels import computes
from backends.mlx.support import support
from backends.numpy.model import Oracle
from backends.text import Text
from parity_tests.artifacts import EXACT, check_graph, check_packing, opened, values, write
from parity_tests.cases import FEATURES, PATCHES, nmse, random_ids, random_specs, random_weights
from parity_tests.checkpoints import tokenizer_json
from parity_tests.mlx_specs import CASES
from spec import Spec, parse
from spec.config import merge
from spec.errors import SpecError

PIECES = (9, 1, 5, 1, 1, 23, 7)


def pieces(length: int) -> list[int]:
    """`PIECES` as far as they go."""
    starts = np.minimum(np.cumsum((0, *PIECES)), length)
    return [int(n) for n in np.diff(starts) if n]


def mlx_lm_logits(path: Path, ids: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """mlx-lm's logits, whole and in pieces through its own caches: [B, T, V] both."""
    model, _ = load_model(path, trust_remote_code=(path / "model.py").exists())
    caches = make_prompt_cache(model)
    parts, at = [], 0
    for n in pieces(ids.shape[1]):
        parts.append(np.array(model(mx.array(ids[:, at : at + n]), cache=caches).astype(mx.float32)))
        at += n
    return np.array(model(mx.array(ids)).astype(mx.float32)), np.concatenate(parts, 1)


def check(path: Path, limit: float = EXACT) -> None:
    artifact = opened("mlx", path)
    ids = random_ids(artifact.spec, 3, min(sum(PIECES), artifact.spec.context - 1))
    exact = Oracle(artifact.spec, values(artifact), length=artifact.session or artifact.spec.context).logits(ids)
    whole, stepped = mlx_lm_logits(path, ids)
    for row in range(3):
        assert nmse(whole[row], exact[row]) <= limit
        assert nmse(stepped[row], exact[row]) <= limit
    assert nmse(stepped[:, -4:], exact[:, -4:]) <= 4 * limit


def test_every_row_has_a_case_and_is_documented() -> None:
    assert {arch for arch, _ in CASES.values()} == {c.model_type for c in CARRIERS}
    page = Path(__file__).parents[1] / "docs" / "mlx.md"
    assert [c.model_type for c in CARRIERS if f"`{c.model_type}`" not in page.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("name", CASES)
def test_mlx_lm_computes_what_the_row_says(name: str, tmp_path: Path) -> None:
    arch, spec = CASES[name]
    verdict = support(spec, "f32")
    assert verdict.ok and verdict.carrier == arch
    weights = random_weights(spec)
    tokenizer = Tokenizer(json.loads(tokenizer_json()), bos="<|bos|>", eos="<|eos|>", add_bos=True)
    path = write("mlx", spec, weights, tmp_path / "m", tokenizer=tokenizer)
    assert not (path / "model.py").exists()
    assert load_tokenizer(path).encode("def main(") == Text.read(path).encode("def main(")  # type: ignore[union-attr]
    check_packing("mlx", path, spec, weights, "f32")
    check_graph("mlx", path)
    check(path)
    ids = random_ids(spec, 1, spec.context - 1)
    assert nmse(mlx_lm_logits(path, ids)[0], Oracle(spec, weights).logits(ids)) <= EXACT  # nothing of the artifact's


@pytest.mark.parametrize("name", [n for n, s in FEATURES.items() if support(s, "f32").carrier == "model.py"])
def test_mlx_lm_runs_the_bundled_model(name: str, tmp_path: Path) -> None:
    path = write("mlx", FEATURES[name], random_weights(FEATURES[name]), tmp_path / "m")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(path)
    check(path)


@pytest.mark.parametrize("level", ["f16", "q8", "q4", "mlx-q3", "mxfp4"])
@pytest.mark.parametrize("name", [
    "tied", "qkv_bias", "gemma3_text-0", "cohere-0", "alibi", "sinks", "mixtral-0", "gpt_oss-0", "qwen2_moe-0",
    "moe_sigmoid",
])  # fmt: skip
def test_quantized_folders_are_what_mlx_lm_computes_in_float32(name: str, level: str, tmp_path: Path) -> None:
    """Float32 activations on the stored codes, whatever carries them."""
    spec = CASES[name][1] if name in CASES else FEATURES[name]
    path = write("mlx", spec, random_weights(spec), tmp_path / "m", level, compute="f32")
    check(path)


@pytest.mark.parametrize("level", ["f16", "bf16", "q8", "q4", "mlx-q4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("name", [
    "llama-0", "qwen3-0", "gemma3_text-0", "olmo2-0", "nemotron-0", "cohere-0", "mixtral-0", "qwen3_moe-0",
    "qwen2_moe-0", "olmoe-0", "granitemoe-0", "gpt_oss-0",
])  # fmt: skip
def test_native_folders_compute_in_their_dtype(name: str, level: str, tmp_path: Path) -> None:
    """Activations, logits and caches all have the dtype of the folder: nothing in it makes MLX widen silently."""
    spec = wide(CASES[name][1])
    compute = computes(level)[0]
    assert support(spec, level).carrier == CASES[name][0]
    path = write("mlx", spec, random_weights(spec), tmp_path / "m", level)
    model, _ = load_model(path)
    caches = make_prompt_cache(model)
    dtype = {"f16": mx.float16, "bf16": mx.bfloat16}[compute]
    assert model(mx.array(random_ids(spec, 1, 5)), cache=caches).dtype == dtype
    assert {c.keys.dtype for c in caches} == {dtype}


def wide(spec: Spec) -> Spec:
    """The same with widths that every packing takes."""
    patch = {"width": 64, "block": {"attention": {"head_dim": 32, "heads": 2, "kv_heads": 1}}}
    return parse(merge(spec.model_dump(exclude_unset=True), patch))


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(spec=random_specs())
def test_mlx_lm_runs_any_combination(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(write("mlx", spec, random_weights(spec), tmp_path_factory.mktemp("m") / "m"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_random_changes_to_a_row_never_break_it(name: str, tmp_path: Path) -> None:
    """Fields that a row takes or refuses, one at a time, from all features: whatever carries it is exact."""
    for n, patch in enumerate(PATCHES.values()):
        try:
            spec = parse(merge(CASES[name][1].model_dump(exclude_unset=True), patch))
        except SpecError:
            continue
        check(write("mlx", spec, random_weights(spec), tmp_path / str(n)))
