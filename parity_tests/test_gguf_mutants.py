"""Every wrong GGUF file is caught by the check that owns the bug, in the real llama.cpp; the right one passes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp")

from convert.verify import verify
from convert.verify.packing import check_packing
from convert.verify.report import Status
from convert.verify.run import CHECKS
from parity_tests.checkpoints import llama
from parity_tests.gguf_mutants import MUTANTS, Editor, mutate
from parity_tests.shop import Shop, outcome
from spec import Spec, params


def _moe(shared: dict[str, Any] | None = None, **router: Any) -> Spec:
    fields = {"kind": "moe", "experts": 5, "hidden": 256, "shared": shared, "router": {"top_k": 2, **router}}
    return llama(block={"mlp": fields})


SPECS: dict[str, Spec] = {
    "llama": llama(),
    "moe": _moe(),
    "moe_chosen": _moe({"hidden": 256}, score="sigmoid", correction=True, scale=2.5),
    "moe_gate": _moe({"hidden": 256, "gate": True}, renormalise=False),
    "moe_plain": _moe(renormalise=False),
    "offset": llama(final_norm={"offset": 1.0}, block={"norm": {"offset": 1.0}}),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("mutants"), "gguf", SPECS)


@pytest.mark.parametrize(("feature", "level"), [(n, "q4") for n in SPECS] + [("llama", "q4_k_m"), ("moe", "q4_k_m")])
def test_the_unmutated_artifact_passes_every_check(shop: Shop, feature: str, level: str) -> None:
    session = shop.session(shop.artifact(feature, level), feature, level)
    assert {n: outcome(session, n).status for n in CHECKS} == dict.fromkeys(CHECKS, Status.PASS)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_owning_check_kills(shop: Shop, name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    original = shop.artifact(mutant.feature, mutant.level)
    wrong = mutate(original, tmp_path / "wrong.gguf", mutant)
    assert wrong.read_bytes() != original.read_bytes(), "the mutant changes nothing"
    check = outcome(shop.session(wrong, mutant.feature, mutant.level), mutant.killer)
    assert check.status is Status.FAIL, check
    assert check.reason


def test_a_mutant_fails_the_whole_verification(shop: Shop, tmp_path: Path) -> None:
    """The child process, its journal and the parent's verdict, on one bug that only the graph check sees."""
    mutant = MUTANTS["theta_0.1%"]
    wrong = mutate(shop.artifact(mutant.feature, mutant.level), tmp_path / "wrong.gguf", mutant)
    report = verify(wrong, "gguf", shop.checkpoint(mutant.feature), mutant.level)
    assert not report.ok
    assert report["packing"].status is Status.PASS and report["graph"].status is Status.FAIL
    assert report["graph"].measured is not None and report["graph"].gate is not None
    assert report["graph"].measured > 1000 * report["graph"].gate


@pytest.mark.parametrize("level", ["f16", "bf16", "q8", "q4"])
def test_rows_that_a_sample_misses_are_covered_by_hashes(
    shop: Shop, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for large models: first and last block of each tensor are rounded again, the receipt covers the rest."""
    monkeypatch.setattr("convert.verify.packing.BLOCK", 1024)
    original = shop.artifact("llama", level)
    session = shop.session(original, "llama", level)
    check = check_packing(session.shipped.stored(), session.source, budget=1)
    assert check.status is Status.PASS and check.details["compared"] < check.details["weights"] / 20
    assert check.details["hashed"] == sum(p.size for p in params(session.source.spec) if p.matrix)
    wrong = tmp_path / "wrong.gguf"
    shutil.copyfile(original, wrong)
    editor = Editor(wrong)
    editor.rows("blk.1.ffn_down.weight")[100, 40] ^= 1
    editor.close()
    session = shop.session(wrong, "llama", level)
    check = check_packing(session.shipped.stored(), session.source, budget=1)
    assert check.status is Status.FAIL
    assert "layers.1.mlp.down.weight" in check.reason and "content hash" in check.reason
