"""Every wrong folder is caught by the checks that own the bug, in the real transformers; the right ones pass."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch

from convert.verify import verify
from convert.verify.report import Status
from convert.verify.run import CHECKS, Session
from parity_tests.cases import FEATURES
from parity_tests.checkpoints import VOCAB, llama
from parity_tests.hf_mutants import MUTANTS, mutate
from parity_tests.shop import Shop, outcome
from spec import Spec, UserError

torch.set_num_threads(1)

SPECS: dict[str, Spec] = {
    "llama": llama(),
    "offset": llama(final_norm={"offset": 1.0}, block={"norm": {"offset": 1.0}}),
    "sandwich": llama(block={"placement": "sandwich"}),
    "windows": FEATURES["window_pattern"],
    "gpt2": FEATURES["gpt2"],
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("mutants"), "hf", SPECS)


@pytest.mark.parametrize(("feature", "level"), sorted({(m.feature, m.level) for m in MUTANTS.values()}))
def test_the_unmutated_folder_passes_every_check(shop: Shop, feature: str, level: str) -> None:
    session = shop.session(shop.artifact(feature, level), feature, level)
    found = {n: outcome(session, n).status for n in CHECKS}
    words = Status.PASS if SPECS[feature].vocab_size == VOCAB else Status.NOT_RUN
    assert found == {**dict.fromkeys(CHECKS, Status.PASS), "tokenizer": words}


def fails(session: Session, name: str) -> bool:
    """Whether a check fails with a reason; an artifact that cannot be decoded is a FAIL in `run` too."""
    try:
        check = outcome(session, name)
    except UserError as e:
        return "no codes times" in str(e)
    return check.status is Status.FAIL and bool(check.reason)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_owning_checks_kill(shop: Shop, name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    original = shop.artifact(mutant.feature, mutant.level)
    wrong = mutate(original, tmp_path / "wrong", mutant)
    changed = [f.name for f in wrong.iterdir() if f.read_bytes() != (original / f.name).read_bytes()]
    assert len(changed) == 1, "one file, and not none"
    session = shop.session(wrong, mutant.feature, mutant.level)
    for killer in mutant.killers:
        assert fails(session, killer), f"{name} survives {killer}"


def test_a_mutant_fails_the_whole_verification(shop: Shop, tmp_path: Path) -> None:
    """The child process, its journal and the parent's verdict."""
    mutant = MUTANTS["theta_0.1%"]
    wrong = mutate(shop.artifact(mutant.feature, mutant.level), tmp_path / "wrong", mutant)
    report = verify(wrong, "hf", shop.checkpoint(mutant.feature), mutant.level)
    assert not report.ok
    assert "rope_theta" in report["packing"].reason
    graph = report["graph"]
    assert graph.status is Status.FAIL and graph.measured is not None and graph.gate is not None
    assert graph.measured > 1000 * graph.gate
