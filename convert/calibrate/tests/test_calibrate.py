"""A calibration as a whole: the same bits every time, after a kill too; coverage; memory that ignores depth."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.base import content_hash
from convert import calibrate as calibrates
from convert.calibrate import Rounding, Settings, boundary, calibrate, driver, expected, kinds, sizes, store
from convert.recipe import Recipe, plan
from convert.sources import open_source
from convert.tests.conftest import weights, write_checkpoint
from spec import Spec, parse
from spec.errors import MissingDependency, UserError

SETTINGS = Settings(text="random", tokens=512, threads=1)
FEW = Settings(text="random", tokens=64, threads=1)
TINY = {
    "name": "tiny", "vocab_size": 64, "width": 32, "depth": 2, "context": 32,
    "block": {"attention": {"heads": 2}, "mlp": {"hidden": 64}},
}  # fmt: skip
MOE = {
    "name": "experts", "vocab_size": 96, "width": 64, "depth": 2, "context": 128, "head": {"tied": True},
    "block": {"attention": {"heads": 4, "kv_heads": 2},
              "mlp": {"kind": "moe", "experts": 24, "hidden": 32, "router": {"top_k": 1}}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "CHUNK", 256)
    monkeypatch.setattr(kinds, "KINDS", 3)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    spec = parse(MOE)
    return write_checkpoint(tmp_path / "experts", spec, weights(spec))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    spec = parse(TINY)
    return write_checkpoint(tmp_path / "tiny", spec, weights(spec))


@pytest.mark.parametrize("level", ["q4", "q8"])
def test_a_rounding_has_every_planned_matrix_and_says_what_it_is(tmp_path: Path, checkpoint: Path, level: str) -> None:
    source = open_source(checkpoint)
    seen: list[tuple[str, int, int]] = []
    rounding = calibrate(source, level, SETTINGS, tmp_path / "r", lambda *a: seen.append(a))
    assert {n for n, lv in rounding.levels.items() if lv in ("q4", "q8")} == set(rounding.hashes)
    assert set(rounding.source_hashes) == set(source.names())
    for name, digest in rounding.source_hashes.items():
        assert digest == content_hash(b for _, b in source.blocks(name))
    for name in rounding.hashes:
        rows = source.shape(name)[0]
        assert content_hash([rounding.rows(name, 0, 5), rounding.rows(name, 5, rows)]) == rounding.hashes[name]
        error = source.tensor(name) - rounding.rows(name, 0, rows).dequantize()
        assert np.square(error).sum() < 0.05 * np.square(source.tensor(name)).sum()
    record = rounding.record
    assert (record["text"], record["tokens"], record["effort"]) == ("random", 512, "good")
    assert record["untouched"] == [] and record["unmeasured"] == [] and record["rounded"] == len(rounding.hashes)
    stages = [s for s, done, of in seen if done == of]
    assert stages == ["measure", "sensitivity", "calibrate"]


def test_importance_is_there_for_every_product(tmp_path: Path, checkpoint: Path, small: Spec) -> None:
    rounding = calibrate(open_source(checkpoint), "q4", SETTINGS, tmp_path / "r")
    for p in plan(small, "q4"):
        if len(p.shape) < 2 or p.name == "embed.weight":
            assert rounding.importance(p.name) is None
            continue
        found, counts = rounding.importance(p.name), rounding.counts(p.name)
        assert found is not None and found.shape == (p.shape[1],) and (found > 0).all()
        assert counts is not None and counts.tolist() == [512]


def test_two_runs_are_equal_bit_for_bit(tmp_path: Path, tiny: Path) -> None:
    for name in ("a", "b"):
        calibrate(open_source(tiny), "q4", FEW, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


class Killed(BaseException):
    """What no handler catches."""


def interruptions(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Kills the run at its n-th step on the disk, for n = 0, 1, ...; ends when one goes through."""
    real, count = store.publish, 0

    def publish(partial: Path, path: Path) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise Killed
        real(partial, path)

    for module in (store, boundary):
        monkeypatch.setattr(module, "publish", publish)
    for n in range(1000):
        count = n
        yield n
        if count >= 0:
            return
    raise AssertionError("it never ended")


def test_a_run_that_is_killed_again_and_again_goes_on_to_the_same_bits(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny)
    calibrate(source, "q4", FEW, tmp_path / "whole")
    killed = 0
    for n in interruptions(monkeypatch):
        try:  # the same folder each time: a run dies one step further than the one before it
            calibrate(source, "q4", FEW, tmp_path / "r")
        except Killed:
            killed += 1
            if (tmp_path / "r" / "key.json").exists():
                with pytest.raises(UserError, match="did not end"):
                    Rounding.open(tmp_path / "r")
        assert n < 60
    assert killed > 3
    assert files(tmp_path / "r") == files(tmp_path / "whole")


@pytest.mark.parametrize("at", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in range(25) if n != 8)])
def test_a_run_that_was_killed_once_goes_on_to_the_same_bits(
    tmp_path: Path, tiny: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny)
    calibrate(source, "q4", FEW, tmp_path / "whole")
    real, left = store.publish, at

    def publish(partial: Path, path: Path) -> None:
        nonlocal left
        real(partial, path)  # killed right after it, before what follows
        left -= 1
        if left < 0:
            raise Killed

    with monkeypatch.context() as patch:
        for module in (store, boundary):
            patch.setattr(module, "publish", publish)
        with pytest.raises(Killed) as held:  # the exception, which holds the run's variables, is still there below
            calibrate(source, "q4", FEW, tmp_path / "r")
    calibrate(source, "q4", FEW, tmp_path / "r")
    assert held.value is not None and files(tmp_path / "r") == files(tmp_path / "whole")


def test_a_finished_folder_is_opened_and_nothing_runs(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate(open_source(tiny), "q4", FEW, tmp_path / "r")
    monkeypatch.setattr(driver, "Runner", None)
    again = calibrate(open_source(tiny), "q4", FEW, tmp_path / "r")
    assert again.hashes == first.hashes


@pytest.mark.parametrize(
    ("change", "says"),
    [({"seed": 1}, "seed 0, not 1"), ({"tokens": 256}, "text "), ({"threads": 2}, "threads 1, not 2")],
)
def test_another_question_in_the_same_folder_is_refused(
    tmp_path: Path, tiny: Path, change: dict[str, Any], says: str
) -> None:
    calibrate(open_source(tiny), "q4", FEW, tmp_path / "r")
    before = files(tmp_path / "r")
    asked = Settings(**{"text": "random", "tokens": 64, "threads": 1, **change})
    with pytest.raises(UserError, match=f"holds another calibration.*{says}"):
        calibrate(open_source(tiny), "q4", asked, tmp_path / "r")
    with pytest.raises(UserError, match=r"holds another calibration.*recipe"):
        calibrate(open_source(tiny), "q8", FEW, tmp_path / "r")
    assert files(tmp_path / "r") == before


def test_experts_without_tokens_are_named_in_the_record(tmp_path: Path, experts: Path) -> None:
    few = Settings(text="random", tokens=8, threads=1)
    rounding = calibrate(open_source(experts), "q4", few, tmp_path / "r")
    counts = rounding.counts("layers.0.mlp.experts.up.weight")
    assert counts is not None and counts.sum() == 8 and (counts == 0).sum() >= 16
    absent = [e for e in range(24) if counts[e] == 0]
    for part in ("gate", "up", "down"):
        for e in absent:
            assert f"layers.0.mlp.experts.{e}.{part}.weight" in rounding.record["unmeasured"]
    assert rounding.record["untouched"]
    importance = rounding.importance("layers.0.mlp.experts.up.weight")
    assert importance is not None and importance.shape == (24, 64)
    assert not importance[absent].any() and importance[counts > 0].any(axis=1).all()


def test_a_native_plan_is_measured_and_not_rounded(tmp_path: Path, checkpoint: Path, small: Spec) -> None:
    native = [p.__class__(p.name, p.shape, "q4_k" if len(p.shape) > 1 else "f32") for p in plan(small, "f16")]
    rounding = calibrate(
        open_source(checkpoint), Recipe("q4_k_m"), SETTINGS, tmp_path / "r", planned=lambda gains: native
    )
    assert rounding.hashes == {} and rounding.levels["layers.0.attn.q.weight"] == "q4_k"
    found = rounding.importance("layers.2.mlp.down.weight")
    assert found is not None and found.shape == (160,)
    assert not (tmp_path / "r" / "layers.0.safetensors").exists()


def test_measured_gains_decide_what_becomes_int8(tmp_path: Path, checkpoint: Path, small: Spec) -> None:
    asked: list[Any] = []

    def planned(gains: Any) -> Any:
        asked.append(gains)
        return plan(small, "q4", None, gains)

    rounding = calibrate(open_source(checkpoint), "q4", SETTINGS, tmp_path / "r", planned=planned)
    gains = asked[-1]
    assert asked[0] is None and set(gains) == set(rounding.hashes) and all(g > 0 for g in gains.values())
    assert rounding.levels == {p.name: p.level for p in plan(small, "q4", None, gains)}


def test_outliers_and_zeros_stay_finite(tmp_path: Path, small: Spec) -> None:
    tensors = weights(small)
    tensors["layers.0.attn.q.weight"][:] = 0
    tensors["layers.1.mlp.up.weight"][3, 5] = 3000.0
    tensors["layers.1.attn.v.weight"][:, 7] = 0
    tensors["layers.2.mlp.down.weight"] *= 1e-30
    source = open_source(write_checkpoint(tmp_path / "odd", small, tensors))
    rounding = calibrate(source, "q4", SETTINGS, tmp_path / "r")
    for name in rounding.hashes:
        q = rounding.rows(name, 0, source.shape(name)[0])
        assert np.isfinite(q.scales).all() and (q.scales > 0).all()
    assert not rounding.rows("layers.0.attn.q.weight", 0, 64).codes.any()


def test_what_it_will_take_is_told_without_torch_and_text_is_checked(tmp_path: Path, checkpoint: Path) -> None:
    source = open_source(checkpoint)
    found = expected(source, SETTINGS, plan(source.spec, "q4"))
    assert found.tokens == 512 and found.text == "random" and 0 < found.seconds < 120
    assert found.disk > 0 and found.memory > 100_000_000
    with pytest.raises(UserError, match="no tokenizer"):
        expected(source, Settings(), plan(source.spec, "q4"))


def test_without_torch_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrates.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'allotrope\[train\]'"):
        calibrates.check()


def test_a_full_disk_is_refused_before_work(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = driver.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(driver.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"calibrating needs .* MB there"):
        calibrate(open_source(tiny), "q4", FEW, tmp_path / "r")


MEMORY = """
    import resource, sys
    from pathlib import Path
    from convert.calibrate import Settings, calibrate
    from convert.sources import open_source
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import torch
    torch.ones(256, 256) @ torch.ones(256, 256)
    small, deep, folder = sys.argv[1:]
    calibrate(open_source(small), "q4", Settings(text="random", tokens=256, threads=1), folder + "/small")
    before = peak()
    calibrate(open_source(deep), "q4", Settings(text="random", tokens=256, threads=1), folder + "/deep")
    print(before, peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    folders = []
    for depth in (2, 14):
        spec = parse({
            "name": "deep", "vocab_size": 96, "width": 512, "depth": depth, "context": 128,
            "block": {"attention": {"heads": 8}, "mlp": {"hidden": 1024}},
        })  # fmt: skip
        folders.append(str(write_checkpoint(tmp_path / f"d{depth}", spec, weights(spec))))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), *folders, str(tmp_path)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    before, after = (int(n) * 1024 for n in done.stdout.split())
    layer = 4 * (4 * 512 * 512 + 3 * 512 * 1024)
    assert after - before < 1.5 * layer, f"{(after - before) / 1e6:.1f} MB more for 12 layers of {layer / 1e6:.1f} MB"
