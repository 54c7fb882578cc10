"""Backends are independent: what one of them needs is never asked of another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import backends

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

ALONE = """
import sys
backend, folder, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))  # importing one of them fails
from pathlib import Path
from convert.pipeline import convert
result = convert(folder, backend, "q4", Path(folder) / ("made" + (".gguf" if backend == "gguf" else ".mlpackage")))
assert result.report.ok, result.report.summary
wrong = [name for name in absent if sys.modules.get(name) is not None]
assert not wrong, wrong
"""


@pytest.mark.parametrize("backend", TARGETS)
def test_a_backend_converts_and_verifies_alone(backend: str, tmp_path: Path) -> None:
    """With nothing installed but its own extra: every other backend's packages cannot be imported."""
    from parity_tests.cases import FEATURES
    from parity_tests.checkpoints import write_checkpoint

    if backends.missing(backends.get(backend)):
        pytest.skip(f"{backend} is not installed")
    write_checkpoint(tmp_path, FEATURES["llama"], tokenizer=False)
    own = {*MODULES[backend], *(MODULES["torch"] if backend == "hf" else ())}
    absent = sorted({m for modules in MODULES.values() for m in modules} - own)
    command = [sys.executable, "-W", "ignore", "-c", ALONE, backend, str(tmp_path), *absent]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


MISSING = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in sys.argv[2:] else find(name, *a)
from convert.cli import main
main(["runs", "--to", sys.argv[1], "--check"])
"""


@pytest.mark.parametrize("backend", [b for b in TARGETS if b in ("gguf", "onnx", "coreml")])
def test_a_missing_extra_costs_one_line(backend: str, tmp_path: Path) -> None:
    from parity_tests.cases import FEATURES
    from parity_tests.checkpoints import write_checkpoint

    write_checkpoint(tmp_path / "runs", FEATURES["llama"], tokenizer=False)
    command = [sys.executable, "-c", MISSING, backend, *MODULES[backend]]
    env_path = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"pip install 'allotrope[{backend}]'" in line
