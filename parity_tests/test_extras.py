"""Backends are independent: what one of them needs is never asked of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import backends
from parity_tests.artifacts import check_packing
from parity_tests.cases import FEATURES, random_weights
from parity_tests.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[1]
MODULES = {
    "gguf": ("gguf", "llama_cpp"),
    "mlx": ("mlx", "mlx_lm"),
    "onnx": ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai"),
    "coreml": ("coremltools",),
    "hf": ("transformers", "compressed_tensors"),
    "torch": ("torch",),
}
"""What each backend may import; `hf` runs on torch."""
TARGETS = [b.name for b in backends.REGISTRY if b.name in MODULES and backends.has(b, "build")]

BLOCK = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))  # importing one of them fails, here and in every child
"""

ALONE = """
import sys
from pathlib import Path
from convert.pipeline import convert
backend, folder, *absent = sys.argv[1:]
result = convert(folder, backend, "q4", Path(folder) / ("made" + (".gguf" if backend == "gguf" else ".mlpackage")))
assert result.report.ok, result.report.summary
wrong = [name for name in absent if sys.modules.get(name) is not None]
assert not wrong, wrong
"""


def without(absent: Sequence[str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python where some packages cannot be imported, in its children neither: verification is one."""
    site = folder / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(BLOCK.format(absent=list(absent)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}
    return subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, check=False,
                          cwd=folder, env=env)  # fmt: skip


@pytest.mark.parametrize("backend", TARGETS)
def test_a_backend_converts_and_verifies_alone(backend: str, tmp_path: Path) -> None:
    """With nothing installed but its own extra: every other backend's packages cannot be imported."""
    if backends.missing(backends.get(backend)):
        pytest.skip(f"{backend} is not installed")
    write_checkpoint(tmp_path / "runs", FEATURES["llama"], tokenizer=False)
    own = {*MODULES[backend], *(MODULES["torch"] if backend == "hf" else ())}
    absent = sorted({m for modules in MODULES.values() for m in modules} - own)
    done = without(absent, tmp_path, "-c", ALONE, backend, str(tmp_path / "runs"), *absent)
    assert done.returncode == 0, done.stderr[-2000:]


LACKS = [("gguf", "gguf"), ("onnx", "onnx"), ("onnx", "onnxruntime"), ("coreml", "coremltools"), ("mlx", "mlx"),
         ("hf", "transformers")]  # fmt: skip


@pytest.mark.parametrize(("backend", "module"), LACKS)
def test_a_missing_package_costs_one_line_before_any_work(backend: str, module: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "runs", FEATURES["llama"], tokenizer=False)
    done = without([module], tmp_path, "-m", "convert", "runs", "--to", backend)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"pip install 'allotrope[{backend}]'" in line and module in line
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("runs", "site")] == []


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_an_engine_asks_for_what_builds_it(verify: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "runs", FEATURES["llama"], tokenizer=False)
    done = without(["tensorrt"], tmp_path, "-m", "convert", "runs", "--to", "tensorrt", verify)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "pip install 'allotrope[tensorrt]' on a machine with an NVIDIA GPU" in line and "--no-verify" not in line


@pytest.mark.parametrize(("backend", "module"), [("onnx", "onnxruntime"), ("mlx", "mlx"), ("hf", "torch")])
def test_converting_alone_needs_no_runtime(backend: str, module: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "runs", FEATURES["llama"], tokenizer=False)
    command = ("-m", "convert", "runs", "--to", backend, "--no-verify", "--out", "made")
    done = without([module], tmp_path, *command)
    assert done.returncode == 0, done.stderr
    check_packing(backend, tmp_path / "made", FEATURES["llama"], random_weights(FEATURES["llama"]), "q4")


def test_a_broken_package_is_its_own_row_in_the_list(tmp_path: Path) -> None:
    broken = tmp_path / "onnxruntime"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('no GLIBC')")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-m", "backends", "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    rows = {r["name"]: r["devices"] for r in json.loads(done.stdout)}
    assert rows["onnx"] == ["broken: ImportError: no GLIBC"] and rows["torch"]
