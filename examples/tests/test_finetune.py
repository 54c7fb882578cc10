"""The fine-tuning example runs, learns, and leaves a folder that `convert` reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from convert.sources import open_source
from parity_tests.checkpoints import VOCAB, write_checkpoint
from spec import load, parse
from spec.config import merge

EXAMPLE = Path(__file__).resolve().parents[1] / "finetune.py"


def test_a_run_is_tuned_and_converts(tmp_path: Path) -> None:
    for package in ("transformers", "accelerate", "peft"):
        pytest.importorskip(package)
    found = importlib.util.spec_from_file_location("finetune", EXAMPLE)
    assert found is not None and found.loader is not None
    finetune = importlib.util.module_from_spec(found)
    found.loader.exec_module(finetune)

    size = {"vocab_size": VOCAB, "width": 64, "depth": 2, "context": 64}
    write_checkpoint(
        tmp_path / "run", parse(merge(load("tiny").model_dump(mode="json", exclude_unset=True), size), "t")
    )
    (tmp_path / "text").write_text("def f(x):\n    return x + 1\n" * 200)
    options = [str(tmp_path / "run"), str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--length", "32"]
    first, later = (finetune.main([*options, "--steps", steps]) for steps in ("1", "12"))
    assert later < first
    with open_source(tmp_path / "run") as before, open_source(tmp_path / "out") as after:
        assert before.spec == after.spec and after.tokenizer is not None
        changed = [n for n in before.names() if not np.array_equal(before.tensor(n), after.tensor(n))]
        assert changed == [n for n in before.names() if ".attn." in n or ".mlp." in n]
