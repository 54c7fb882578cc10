"""Folders on disk: shards, damage, refusals, sizes, and what a user reads when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import backends
from backends.base import Planned, QuantizedTensor, Tokenizer
from backends.mlx import build, container, pack
from backends.mlx.levels import GRID, NATIVE, computes, recipe
from backends.mlx.read import open_artifact
from backends.mlx.support import bits, levels, support
from convert.recipe import plan
from convert.verify.artifact import Packed, planned
from parity_tests.artifacts import check_packing, write
from parity_tests.cases import FEATURES, random_weights
from parity_tests.checkpoints import llama, tokenizer_json
from spec import Spec
from spec.errors import UserError

SPEC = FEATURES["tied"]
WEIGHTS = random_weights(SPEC)


def tokenizer() -> Tokenizer:
    return Tokenizer(json.loads(tokenizer_json()), bos="<|bos|>", eos="<|eos|>", pad="<|pad|>", add_bos=True)


@pytest.mark.parametrize("level", ["f32", "q4"])
def test_large_models_are_sharded(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "sharded", lambda tensors: container.sharded(tensors, 5000))
    path = write("mlx", SPEC, WEIGHTS, tmp_path / "m", level)
    shards = sorted(p.name for p in path.glob("model-*.safetensors"))
    assert len(shards) > 2 and shards[0].startswith("model-00001-of-") and not (path / "model.safetensors").exists()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in open_artifact(path).input.tensors.values())
    check_packing("mlx", path, SPEC, WEIGHTS, level)
    (path / shards[1]).unlink()
    with pytest.raises(UserError, match=shards[1]):
        open_artifact(path)


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = write("mlx", SPEC, WEIGHTS, tmp_path / "m", "f16")
    with safe_open(path / "model.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "mlx"}
        table = f.get_tensor("model.embed_tokens.weight")
    assert np.array_equal(table, WEIGHTS["embed.weight"].astype(np.float16))


@pytest.mark.parametrize("level", levels())
def test_the_size_is_known_before(level: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    spec = llama(width=64, block={"attention": {"head_dim": 32, "heads": 2, "kv_heads": 1}, "mlp": {"hidden": 96}})
    path = write("mlx", spec, random_weights(spec), tmp_path / "m", level, tokenizer())
    expected = build.size(spec, planned(backends.get("mlx"), spec, level), tokenizer())
    actual = sum(f.stat().st_size for f in path.iterdir())
    assert abs(expected - actual) < 0.03 * actual + 8000


def damage(path: Path, how: str) -> str:
    """Change one thing; returns what must be named."""
    config = json.loads((path / "config.json").read_text())
    file = path / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    if how == "theta":
        config["rope_theta"] = 9999.0
    elif how == "packing":
        config["quantization"]["group_size"] = 64
    elif how == "name":
        config["model_type"] = "olmo2"
    else:
        name = "model.layers.0.mlp.up_proj." + how
        at = 8 + size + header[name]["data_offsets"][0]
        with file.open("r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1]))
    (path / "config.json").write_text(json.dumps(config))
    return {"theta": "rope_theta", "packing": "quantization", "name": "olmo2"}.get(how, "layers.0.mlp.up.weight")


@pytest.mark.parametrize("how", ["theta", "packing", "name", "weight", "scales", "biases"])
def test_damage_is_found(how: str, tmp_path: Path) -> None:
    path = write("mlx", SPEC, WEIGHTS, tmp_path / "m", "q8")
    name = damage(path, how)
    assert name in " ".join(complaints(path))


def complaints(path: Path) -> list[str]:
    """Everything that the packing check says of a q8 folder."""
    try:
        packed = Packed(open_artifact(path), planned(backends.get("mlx"), SPEC, "q8"))
    except UserError as e:
        return [str(e)]
    wrong = packed.problems()
    return list(wrong) or [n for n, x in WEIGHTS.items() if packed.compare(n, 0, x)]


@pytest.mark.parametrize(("file", "edit"), [
    ("model.py", lambda text: text.replace("1 / table.inv_freq", "2 / table.inv_freq")),
    ("config.json", lambda text: text.replace('"softcap": 2.0', '"softcap": 2.5')),
])  # fmt: skip
def test_a_changed_bundled_model_is_found(file: str, edit: Any, tmp_path: Path) -> None:
    spec = FEATURES["attn_softcap"]
    path = write("mlx", spec, random_weights(spec), tmp_path / "m")
    before = (path / file).read_text()
    (path / file).write_text(edit(before))
    assert (path / file).read_text() != before
    found = open_artifact(path).problems(plan(spec, "f32"))
    assert [k for k in found if file in k]


def test_truncated_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = write("mlx", SPEC, WEIGHTS, tmp_path / "m")
    file = path / "model.safetensors"
    whole = file.read_bytes()
    for content, message in ((whole[:-9], "truncated"), (b"nothing", "not a safetensors"), (b"", "not a safetensors")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message) as e:
            open_artifact(path)
        assert "\n" not in str(e.value)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        open_artifact(path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"allotrope\.json.*mlx_lm\.generate"):
        open_artifact(other)


@pytest.mark.parametrize("change", [
    {"backend": "onnx"}, {"level": "q5"}, {"options": None}, {"options": []}, {"options": {}}, {"receipt": None},
    {"options": {"compute": "f64"}}, {"options": {"compute": "f16", "profile": "ort"}},
], ids=str)  # fmt: skip
def test_a_mark_that_is_not_ours_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    path = write("mlx", SPEC, WEIGHTS, tmp_path / "m", "q4")
    mark = json.loads((path / "allotrope.json").read_text())
    (path / "allotrope.json").write_text(json.dumps(mark | change))
    with pytest.raises(UserError, match=r"allotrope\.json") as e:
        open_artifact(path)
    assert "\n" not in str(e.value)


def test_damaged_rotary_settings_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    path = write("mlx", SPEC, WEIGHTS, tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    for change in ({"rope_theta": None}, {"rope_theta": 0}, {"rope_scaling": 3}, {"rope_scaling": {"rope_type": "x"}}):
        (path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match="rotary settings are damaged"):
            backends.load(path)


def test_an_aborted_folder_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "m"
    w = build.writer(SPEC, plan(SPEC, "q4"), None, out, level="q4", metadata={}, threads=1)
    w.write("final_norm.weight", 0, WEIGHTS["final_norm.weight"])
    with pytest.raises(AssertionError, match="rows missing"):
        w.close({})
    w.abort()
    assert not out.exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="file"):
        build.writer(SPEC, plan(SPEC, "q4"), None, blocked / "m", level="q4", metadata={}, threads=1)


def test_a_full_disk_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, start: int, total: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match="No space left"):
        build.writer(SPEC, plan(SPEC, "q4"), None, tmp_path / "m", level="q4", metadata={}, threads=1)
    assert not (tmp_path / "m").exists()


def test_vectors_beyond_the_dtype_are_refused(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "final_norm.weight": np.full(SPEC.width, 1e6, np.float32)}
    with pytest.raises(UserError, match=r"final_norm\.weight: 1e\+06 is beyond f16"):
        write("mlx", SPEC, weights, tmp_path / "m", "q8")
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    w = build.writer(SPEC, plan(SPEC, "f16"), None, tmp_path / "m", level="f16", metadata={}, threads=1)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up\.weight: 70000 is beyond f16 \(use --quant bf16 or f32\)"):
        w.write("layers.0.mlp.up.weight", 0, np.full((64, 32), 7e4, np.float32))
    w.abort()
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    grid = QuantizedTensor(np.ones((2, 32), np.int8), np.full((2, 1), 7e4, np.float32), 8)
    with pytest.raises(UserError, match=r"^a\.weight: 70000 is beyond f16 \(use --compute f32\)"):
        pack.from_grid(grid, GRID["q8"], "F16", "a.weight")
    check_packing("mlx", write("mlx", SPEC, weights, tmp_path / "m", "q8", compute="bf16"), SPEC, weights, "q8")


@pytest.mark.parametrize("level", ["f32", "f16", "bf16", "q8", "q4", *NATIVE])
def test_every_level_says_what_it_computes_in(level: str) -> None:
    for compute in ("", "f32", "f16", "bf16"):
        verdict = support(SPEC, level, compute=compute)
        assert verdict.ok == (not compute or compute in computes(level))
        if not verdict.ok:
            assert f"compute: {compute}" in verdict.refusals[0] and computes(level)[0] in verdict.refusals[0]
    assert bits(level) > 0


def test_unknown_levels_are_refused_with_the_nearest() -> None:
    assert "mlx-q4" in support(SPEC, "mlxq4").refusals[0]


def test_notes_tell_what_to_type() -> None:
    verdict = support(FEATURES["clip"], "q4")
    assert verdict.carrier == "model.py"
    assert any("--trust-remote-code" in n and "block.attention.clip" in n for n in verdict.notes)
    assert not any("trust" in n for n in support(SPEC, "q4").notes)


def test_native_levels_pack_what_fits() -> None:
    odd: Spec = FEATURES["uneven_width"]
    assert set(recipe(odd, "mlx-q3").values()) == {"f16", "f32", "mlx-q3"}
    assert set(recipe(SPEC, "mlx-q3").values()) == {"f32", "mlx-q3"}
    assert recipe(FEATURES["gpt2"], "nvfp4")["positions.weight"] == "f16"


def test_rounding_is_to_nearest_even() -> None:
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, -(2.0**-24) * 1.5], np.float32)
    assert pack.from_floats(pack.to_floats(x, "BF16", "x"), "BF16").tolist()[:2] == [1.0, 1 + 2.0**-6]
    assert pack.from_floats(pack.to_floats(x, "F16", "x"), "F16").tolist()[2:] == [1.0, -(2.0**-23)]


def test_planned_levels_of_joined_matrices_must_agree() -> None:
    spec = FEATURES["gpt2"]
    assert support(spec, "q4").carrier == "model.py"
    assert {p.level for p in plan(spec, "q4") if isinstance(p, Planned)} <= {"q4", "q8", "f16", "f32"}
