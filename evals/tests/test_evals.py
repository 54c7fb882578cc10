"""The comparison end to end on a PyTorch checkpoint, its arithmetic on known distributions, and its errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.verify.metrics import Quality, log_softmax, nmse, standard_error
from evals.cli import main
from evals.compare import Options, compare
from parity_tests.cases import random_weights
from parity_tests.checkpoints import llama, write_checkpoint
from spec.errors import UserError

SPEC = llama(width=64, depth=1, context=64)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("evals") / "original", SPEC)


def test_kl_and_nll_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    quality = Quality()
    quality.add(np.log(p) + 7, np.log(q) - 3, np.array([1]))  # logits may be shifted
    s = quality.summary()
    assert s["kl_mean"] == pytest.approx(0.25 * math.log(2))
    assert s["nll"] == pytest.approx(math.log(2)) and s["nll_ref"] == pytest.approx(math.log(4))
    assert s["delta_nll"] == pytest.approx(-math.log(2)) and s["top1"] == 0


def test_positions_without_a_next_token_count_for_kl_alone() -> None:
    quality = Quality()
    quality.add(np.zeros((3, 4)), np.zeros((3, 4)), np.array([1, 2, -1]))
    assert len(quality.kl) == 3 and len(quality.nll) == 2


def test_a_tie_broken_by_rounding_is_no_clear_disagreement() -> None:
    ref = np.array([[1.0, 1.0 - 1e-6, 0.0], [5.0, 0.0, 0.0]])
    run = np.array([[1.0 - 2e-6, 1.0, 0.0], [0.0, 5.0, 0.0]])
    quality = Quality()
    quality.add(ref, run, np.array([0, 0]))
    s = quality.summary()
    assert s["top1"] == 0 and s["top1_clear"] == 0.5


def test_standard_error_is_that_of_the_mean() -> None:
    x = np.random.default_rng(0).standard_normal(400)
    assert standard_error(x) == pytest.approx(x.std(ddof=1) / 20)
    assert standard_error(np.ones(1)) == 0


def test_log_softmax_survives_large_logits() -> None:
    assert np.isfinite(log_softmax(np.array([[1e4, -1e4, 0.0]], np.float32))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nmse_of_what_is_not_finite_is_infinite(bad: float) -> None:
    ref = np.ones((2, 3))
    run = ref.copy()
    run[1, 1] = bad
    assert nmse(run, ref) == math.inf


@pytest.fixture(scope="module")
def rows(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The checkpoint itself, one with other head weights, and a damaged one, measured by one command."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("others")
    weights = random_weights(SPEC)
    weights["head.weight"] += np.float32(0.05) * random_weights(SPEC, 9)["head.weight"]
    other = write_checkpoint(folder / "other", SPEC, weights)
    broken = write_checkpoint(folder / "broken", SPEC)
    (broken / "model.safetensors").write_bytes(b"\0" * 64)
    arguments = [*map(str, (checkpoint, other, broken)), "--reference", str(checkpoint), "--tokens", "128"]
    command = [sys.executable, "-m", "evals", *arguments, "--repeats", "1", "--no-checks", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, "one artifact is broken"
    result = json.loads(done.stdout, parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert result["tokens"] == 128 and result["window"] == 64
    return result["artifacts"]


def test_a_checkpoint_equals_itself(rows: list[dict[str, Any]]) -> None:
    row = rows[0]
    assert "error" not in row
    assert row["quality"]["kl_max"] < 1e-9 and row["quality"]["top1"] == 1
    assert row["perplexity"] == pytest.approx(row["perplexity_reference"], rel=1e-6)
    assert row["bits_per_weight"] == pytest.approx(32, rel=0.1)
    assert row["decode_tokens_per_s"] > 0 and row["load_s"] > 0 and row["peak_bytes"] > 0


def test_a_perturbed_checkpoint_shows(rows: list[dict[str, Any]]) -> None:
    same, perturbed = (r["quality"] for r in rows[:2])
    assert perturbed["kl_mean"] > 1e-4 > same["kl_mean"]
    assert perturbed["delta_nll_se"] > 0 and perturbed["top1"] < 1


def test_an_artifact_that_cannot_be_loaded_is_its_own_row(rows: list[dict[str, Any]]) -> None:
    assert "status 1" in rows[2]["error"] and "quality" not in rows[2]


def test_torch_and_numpy_references_agree(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from convert.sources import open_source
    from evals.reference import _numpy, _torch

    source, ids = open_source(checkpoint), np.arange(24, dtype=np.int64)[None] % SPEC.vocab_size
    torch_run = _torch(source, 32)
    assert torch_run is not None
    assert nmse(torch_run[1](ids), _numpy(source, 32)[1](ids)) < 1e-11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.gguf"], "nowhere.gguf: no such file"),
        (["{checkpoint}", "--text", "nowhere.txt"], "nowhere.txt: No such file"),
        (["{checkpoint}", "--tokens", "1"], "--tokens 1: at least 2"),
        (["{checkpoint}", "--repeats", "-1"], "--repeats -1: cannot be negative"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.format(checkpoint=checkpoint) for a in arguments]
    assert main([*filled, "--reference", str(checkpoint)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0


def test_a_reference_without_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", SPEC, tokenizer=False)
    with pytest.raises(UserError, match="no tokenizer"):
        compare([bare], bare, Options(checks=False), quiet)


def test_a_text_shorter_than_a_window_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(UserError, match="give a longer one"):
        compare([checkpoint], checkpoint, Options(text=tmp_path / "short.txt", checks=False), quiet)


def test_help_names_an_example() -> None:
    done = subprocess.run([sys.executable, "-m", "evals", "--help"], capture_output=True, text=True, check=True)
    assert "Example: python -m evals" in done.stdout


def test_each_artifact_is_measured_with_each_cache(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from convert.pipeline import convert

    spec = llama(width=64, depth=1, context=64, block={"attention": {"heads": 2, "kv_heads": 2, "head_dim": 32}})
    source = write_checkpoint(tmp_path / "source", spec)
    made = convert(source, "gguf", "f16", tmp_path / "m.gguf", verify=False, threads=1).out
    options = Options(tokens=64, threads=1, repeats=0, checks=False, caches=("f16", "q4"))
    plain, small = compare([made], source, options, quiet)["artifacts"]
    assert (plain["cache"], small["cache"]) == ("f16", "q4") == (plain["info"]["cache"], small["info"]["cache"][:2])
    assert small["cache_bytes_per_token"] < 0.4 * plain["cache_bytes_per_token"]
    assert small["quality"]["kl_mean"] > 3 * plain["quality"]["kl_mean"]


def test_a_cache_that_a_backend_lacks_is_refused_before_anything_is_measured(checkpoint: Path) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=r"cache='q8': torch keeps .* gguf and mlx have other types"):
        compare([checkpoint], checkpoint, Options(caches=("q8",)), said.append)
    assert said == []
