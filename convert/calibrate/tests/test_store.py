"""A rounding on disk: what goes in comes out, and what is not whole, or another's, is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backends.base import QuantizedTensor, content_hash
from convert.calibrate import Rounding, Settings, store
from convert.calibrate.store import RESULT, Store, unit_of
from convert.quantize import quantize
from convert.recipe import plan
from spec import Spec, parse
from spec.errors import UserError

KEY = {"source": "abc", "text": "def", "spec": "set by the tests"}


def coded(spec: Spec, level: str) -> dict[str, QuantizedTensor]:
    rng = np.random.default_rng(0)
    out = {}
    for p in plan(spec, level):
        if p.level in ("q4", "q8", "q4-g128"):
            bits, group = (8, 32) if p.level == "q8" else (4, 128 if p.level == "q4-g128" else 32)
            out[p.name] = quantize(rng.standard_normal(p.shape).astype(np.float32), bits, group)
    return out


def written(folder: Path, spec: Spec, level: str = "q4") -> tuple[Rounding, dict[str, QuantizedTensor]]:
    store, codes = Store(folder, {**KEY, "spec": spec.hash}), coded(spec, level)
    for unit in dict.fromkeys(map(unit_of, codes)):
        store.add(unit, {n: q for n, q in codes.items() if unit_of(n) == unit})
    importance = {
        "layers.0.attn.q.weight": np.arange(64, dtype=np.float32),
        "layers.0.attn.q.weight.count": np.array([7], np.int64),
    }
    hashes = {n: content_hash([q]) for n, q in codes.items()}
    return store.finish(plan(spec, level), hashes, {"embed.weight": "s"}, importance, {"effort": "good"}), codes


@pytest.mark.parametrize("level", ["q4", "q8"])
def test_codes_and_scales_come_back_bit_for_bit_by_rows(tmp_path: Path, small: Spec, level: str) -> None:
    rounding, codes = written(tmp_path / "r", small, level)
    assert rounding.planned(small) == plan(small, level)
    for name, q in codes.items():
        assert name in rounding
        rows = q.shape[0]
        parts = [rounding.rows(name, a, min(rows, a + 7)) for a in range(0, rows, 7)]
        assert content_hash(parts) == rounding.hashes[name] == content_hash([q])
        assert parts[0].bits == q.bits and parts[0].group == q.group
    assert "layers.0.attn_norm.weight" not in rounding
    rounding.close()
    assert content_hash([rounding.rows("embed.weight", 0, 96)]) == rounding.hashes["embed.weight"], "it opens again"


def test_importance_comes_back_and_is_none_where_nothing_was_measured(tmp_path: Path, small: Spec) -> None:
    rounding, _ = written(tmp_path / "r", small)
    found, counts = rounding.importance("layers.0.attn.q.weight"), rounding.counts("layers.0.attn.q.weight")
    assert found is not None and found.tolist() == list(range(64)) and counts is not None and counts.tolist() == [7]
    assert rounding.importance("embed.weight") is None and rounding.counts("embed.weight") is None


def test_an_unfinished_rounding_is_refused_and_goes_on(tmp_path: Path, small: Spec) -> None:
    codes = coded(small, "q4")
    store = Store(tmp_path / "r", KEY)
    store.add("layers.1", {n: q for n, q in codes.items() if unit_of(n) == "layers.1"}, {"layers.1.attn.q.weight": [5]})
    with pytest.raises(UserError, match="did not end"):
        Rounding.open(tmp_path / "r")
    del store
    again = Store(tmp_path / "r", KEY)
    assert again.has("layers.1") and not again.has("layers.0") and not again.whole
    levels = {p.name: p.level for p in plan(small, "q4")}
    found, tokens = again.codes("layers.1", levels)
    assert tokens == {"layers.1.attn.q.weight": [5]}
    assert content_hash([found["layers.1.attn.q.weight"]]) == content_hash([codes["layers.1.attn.q.weight"]])


def test_work_is_gone_once_it_is_whole(tmp_path: Path, small: Spec) -> None:
    rounding, _ = written(tmp_path / "r", small)
    assert not (rounding.folder / "work").exists()
    assert sorted(p.name for p in rounding.folder.iterdir()) == sorted(
        ["key.json", "rounding.json", "importance.safetensors", "embed.safetensors", "head.safetensors",
         *(f"layers.{i}.safetensors" for i in range(3))]
    )  # fmt: skip


def test_another_key_is_refused_by_what_differs(tmp_path: Path) -> None:
    Store(tmp_path / "r", KEY)
    with pytest.raises(UserError, match=r"another calibration \(text def, not other\)"):
        Store(tmp_path / "r", {**KEY, "text": "other"})


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(UserError, match="holds no calibration"):
        Store(tmp_path, KEY)
    with pytest.raises(UserError, match="holds no rounding"):
        Rounding.open(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = Store(tmp_path / "r", KEY)
    with pytest.raises(UserError, match="another calibration is writing it"):
        Store(tmp_path / "r", KEY)
    del first
    Store(tmp_path / "r", KEY)


def test_of_two_that_begin_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.write_json

    def write(path: Path, data: object) -> None:
        with pytest.raises(UserError, match="another calibration is writing it"):  # there is no key yet
            Store(tmp_path / "r", KEY)
        real(path, data)

    monkeypatch.setattr(store, "write_json", write)
    assert Store(tmp_path / "r", KEY).work.is_dir()


def test_units_of_one_folder_have_one_plan(tmp_path: Path) -> None:
    first = Store(tmp_path / "r", KEY)
    first.settle({"head.weight": "q8"})
    first.close()
    again = Store(tmp_path / "r", KEY)
    again.settle({"head.weight": "q8"})
    with pytest.raises(UserError, match="was begun at other levels"):
        again.settle({"head.weight": "q4"})


def test_a_refusal_leaves_the_folder_to_others(tmp_path: Path) -> None:
    Store(tmp_path / "r", KEY).close()
    with pytest.raises(UserError, match="another calibration") as held:
        Store(tmp_path / "r", {**KEY, "text": "other"})
    assert held.value is not None and Store(tmp_path / "r", KEY).work.is_dir()


def test_another_models_rounding_is_refused(tmp_path: Path, small: Spec) -> None:
    rounding, _ = written(tmp_path / "r", small)
    block = {"attention": {"heads": 4}, "mlp": {"hidden": 160}}
    other = parse({"name": "small", "vocab_size": 96, "width": 64, "depth": 3, "context": 128, "block": block})
    with pytest.raises(UserError, match="another spec"):
        rounding.planned(other)


@pytest.mark.parametrize("damage", ["truncated", "format", "empty"])
def test_damage_is_named(tmp_path: Path, small: Spec, damage: str) -> None:
    written(tmp_path / "r", small)
    file = tmp_path / "r" / "layers.1.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(UserError, match=r"layers\.1\.safetensors: truncated"):
            Rounding.open(tmp_path / "r").rows("layers.1.attn.q.weight", 0, 1)
        return
    data = json.loads((tmp_path / "r" / RESULT).read_text())
    (tmp_path / "r" / RESULT).write_text(json.dumps({**data, "format": 9} if damage == "format" else {"format": 1}))
    with pytest.raises(UserError, match="format 9" if damage == "format" else "damaged"):
        Rounding.open(tmp_path / "r")


@pytest.mark.parametrize(("given", "what"), [({"effort": "god"}, "did you mean good"), ({"tokens": 0}, "tokens=0")])
def test_settings_name_what_is_wrong(given: dict, what: str) -> None:
    with pytest.raises(UserError, match=what):
        Settings(**given)


def test_importing_it_needs_no_torch() -> None:
    code = "import sys; import convert.calibrate, convert.calibrate.store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
