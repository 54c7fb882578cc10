"""Every wrong MLX folder is caught by the check that owns the bug; the right one passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core")

from convert.pipeline import Result
from convert.verify import verify
from convert.verify.report import Status
from convert.verify.run import CHECKS
from parity_tests.checkpoints import llama
from parity_tests.mlx_mutants import CODE, FILES, HEAD, mutate
from parity_tests.shop import Shop, outcome
from spec import Spec

_ONE: dict[str, Any] = {"offset": 1.0}
_LN: dict[str, Any] = {"kind": "layernorm"}
OFFSETS = {"final_norm": _ONE, "block": {"norm": _ONE, "attention": {"qk_norm": _ONE}}}


def _moe(shared: dict[str, Any] | None = None, **router: Any) -> dict[str, Any]:
    return {"kind": "moe", "experts": 5, "hidden": 128, "shared": shared, "router": {"top_k": 2, **router}}


SPECS: dict[str, tuple[str, Spec]] = {
    "moe": ("mixtral", llama(block={"mlp": _moe()})),
    "moe_qwen3": ("qwen3_moe", llama(block={"attention": {"qk_norm": {}}, "mlp": _moe()})),
    "moe_gate": ("qwen2_moe", llama(block={"mlp": _moe({"hidden": 64, "gate": True}, renormalise=False)})),
    "moe_bundled": ("model.py", llama(block={"mlp": _moe(score="sigmoid", correction=True, scale=1.5)})),
    "llama": ("llama", llama()),
    "partial": ("llama", llama(block={"attention": {"position": {"kind": "rope", "fraction": 0.5}}})),
    "offset": ("qwen3", llama(**OFFSETS)),
    "offset_bundled": ("model.py", llama(**OFFSETS, head={"softcap": 30.0})),
    "neutral": ("qwen3", llama(block={"attention": {"qk_norm": {"weight": False}}})),
    "bundled": ("model.py", llama(head={"softcap": 30.0})),
    "cohere": ("cohere", llama(
        final_norm=_LN, head={"tied": True}, block={"norm": _LN, "parallel": True, "shared_norm": True},
    )),
}  # fmt: skip
"""By name: what carries it, and the spec."""


class Carried(Shop):
    """Every artifact has the carrier that its mutants are about."""

    def converted(self, feature: str, level: str, name: str) -> Result:
        result = super().converted(feature, level, name)
        assert result.support.carrier == SPECS[feature][0]
        return result


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Carried(tmp_path_factory.mktemp("mutants"), "mlx", {n: spec for n, (_, spec) in SPECS.items()})


USED = sorted({(m.feature, m.level) for m in (*FILES.values(), *CODE.values())})


@pytest.mark.parametrize(("feature", "level"), USED)
def test_the_unmutated_folder_passes_every_check(shop: Shop, feature: str, level: str) -> None:
    session = shop.session(shop.artifact(feature, level), feature, level)
    assert {n: outcome(session, n).status for n in CHECKS} == dict.fromkeys(CHECKS, Status.PASS)


@pytest.mark.parametrize("name", FILES)
def test_the_owning_check_kills_a_wrong_file(shop: Shop, name: str, tmp_path: Path) -> None:
    mutant = FILES[name]
    original = shop.artifact(mutant.feature, mutant.level)
    wrong = mutate(original, tmp_path / "wrong", mutant)
    files = [f.name for f in original.iterdir()]
    assert any((wrong / f).read_bytes() != (original / f).read_bytes() for f in files), "the mutant changes nothing"
    check = outcome(shop.session(wrong, mutant.feature, mutant.level), mutant.killer)
    assert check.status is Status.FAIL, check
    assert check.reason


@pytest.mark.parametrize("name", CODE)
def test_the_owning_check_kills_a_mistake_that_writer_and_reader_share(
    shop: Shop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = CODE[name]
    right = shop.artifact(mutant.feature, mutant.level)
    mutant.seed(monkeypatch)
    wrong = shop.converted(mutant.feature, mutant.level, f"wrong-{name}").out
    changed = ("model.safetensors", "config.json")
    assert any((wrong / f).read_bytes() != (right / f).read_bytes() for f in changed), "the mutant changes nothing"
    check = outcome(shop.session(wrong, mutant.feature, mutant.level), mutant.killer)
    assert check.status is Status.FAIL, check
    assert check.measured is not None and check.gate is not None
    assert mutant.killer == "packing" or check.measured > 1000 * check.gate


def test_a_mutant_fails_the_whole_verification(shop: Shop, tmp_path: Path) -> None:
    """The child process, its journal and the parent's verdict."""
    mutant = FILES["theta_0.1%"]
    wrong = mutate(shop.artifact(mutant.feature, mutant.level), tmp_path / "wrong", mutant)
    report = verify(wrong, "mlx", shop.checkpoint(mutant.feature), mutant.level)
    assert not report.ok
    assert report["packing"].status is Status.FAIL and "rope_theta" in report["packing"].reason
    assert report["graph"].status is Status.FAIL


def test_the_specs_have_the_heads_that_the_mutants_turn() -> None:
    assert {b.attention.head_dim for _, s in SPECS.values() for b in s.layers} == {HEAD}
