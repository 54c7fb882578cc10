"""The writer: any order of rows, nothing left behind, one-line errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from backends.onnx.build import GraphWriter, writer
from backends.onnx.read import open_artifact
from convert.recipe import plan
from convert.stream import rounded
from parity_tests.cases import FEATURES, random_weights
from spec.errors import UserError

SPEC = FEATURES["tied"]


def start(out: Path, level: str = "q4", **options: str) -> Any:
    return writer(SPEC, plan(SPEC, level), None, out, level=level, metadata={}, threads=1, **options)


def test_rows_may_come_in_any_order_and_size(tmp_path: Path) -> None:
    weights, rng = random_weights(SPEC), np.random.default_rng(0)
    for n, out in enumerate(("a", "b")):
        w = start(tmp_path / out)
        blocks = [
            (p, at, min(at + step, p.shape[0]))
            for p in plan(SPEC, "q4")
            for step in [p.shape[0] if n == 0 or len(p.shape) == 1 else 7]
            for at in range(0, p.shape[0], step)
        ]
        for i in rng.permutation(len(blocks)):
            p, a, z = blocks[i]
            w.write(p.name, a, rounded(p.name, p.level, a, weights[p.name][a:z]))
        w.close({"level": "q4"})
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "allotrope.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert open_artifact(tmp_path / "a").receipt == {"level": "q4"}


def test_missing_rows_are_our_bug(tmp_path: Path) -> None:
    w = start(tmp_path / "m")
    w.write("final_norm.weight", 0, np.ones(32, np.float32))
    with pytest.raises(AssertionError, match="rows missing"):
        w.close({})
    assert not (tmp_path / "m/allotrope.json").exists()
    w.abort()
    assert not (tmp_path / "m").exists()


def test_abort_deletes_everything_but_what_was_there(tmp_path: Path) -> None:
    start(tmp_path / "m").abort()
    assert not (tmp_path / "m").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    GraphWriter(SPEC, plan(SPEC, "f32"), tmp_path / "mine").abort()
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_full_disk_is_one_line_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"model.onnx.data: No space left on device: needs .* MB are free") as e:
        start(tmp_path / "m")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "m").exists()


def test_a_disk_that_fills_up_later_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = start(tmp_path / "m")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left on device"):
        w.write("final_norm.weight", 0, np.ones(32, np.float32))
    w.abort()
    assert not (tmp_path / "m").exists()


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        start(tmp_path / "file/m")
    with pytest.raises(UserError):
        start(tmp_path / "file")
    assert (tmp_path / "file").exists()


def test_what_is_refused_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="round the weights"):
        start(tmp_path / "m", "f32", compute="f16")
    assert not (tmp_path / "m").exists()
