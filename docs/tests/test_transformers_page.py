"""The Python of docs/transformers.md runs as it stands, on the CPU, and leaves folders that `convert` reads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.sources import open_source
from parity_tests.checkpoints import VOCAB, write_checkpoint
from spec import load, parse
from spec.config import merge

ROOT = Path(__file__).resolve().parents[2]
PIECES = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "transformers.md").read_text("utf-8"), re.M | re.S)


@pytest.mark.slow
def test_every_piece_of_the_page_runs(tmp_path: Path) -> None:
    """In one process, each in a namespace of its own: the imports take longest."""
    for package in ("transformers", "accelerate", "peft", "trl"):
        pytest.importorskip(package)
    size = {"vocab_size": VOCAB, "width": 64, "depth": 2, "context": 64}
    spec = parse(merge(load("tiny").model_dump(mode="json", exclude_unset=True), size), "t")
    write_checkpoint(tmp_path / "runs" / "tiny", spec)
    program = "".join(f"exec({piece!r}, {{}})\n" for piece in PIECES)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | hidden, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(PIECES) == 4
    with open_source(tmp_path / "runs" / "tiny") as before:
        for name, adapters in {"trained": [], "merged": [], "folder": [tmp_path / "adapter"]}.items():
            with open_source(tmp_path / name, adapters) as after:
                assert after.spec == before.spec, name
                assert any(not np.array_equal(before.tensor(n), after.tensor(n)) for n in before.names()), name
