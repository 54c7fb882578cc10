"""Checkpoints: what is written is read back bit for bit; what is broken is said in one line, all of it at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.torch.checkpoint import load_decoder, save_weights
from backends.torch.model import Decoder
from parity_tests.cases import FEATURES
from spec import UserError, dump, params

torch.set_num_threads(1)


def saved(folder: Path, name: str = "gemma2") -> Decoder:
    decoder = Decoder(FEATURES[name])
    decoder.init_weights(1)
    (folder / "spec.yaml").write_text(dump(decoder.spec))
    save_weights(decoder, folder / "model.safetensors")
    return decoder


@pytest.mark.parametrize("name", ["gemma2", "tied", "sinks", "learned", "head_bias"])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, name: str) -> None:
    decoder = saved(tmp_path, name)
    again = load_decoder(tmp_path)
    assert again.spec == decoder.spec
    state = again.state_dict()
    assert state.keys() == {p.name for p in params(decoder.spec)}
    for n, t in decoder.state_dict().items():
        assert torch.equal(t, state[n])
    ids = torch.arange(8)[None]
    assert torch.equal(again.eval()(ids), decoder.eval()(ids))
    assert [f.name for f in tmp_path.glob("*.partial")] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = saved(tmp_path)
    save_weights(decoder, tmp_path / "model.safetensors", dtype)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert load_decoder(tmp_path).embed.weight.dtype == dtype
    widened = load_decoder(tmp_path, torch.float32)
    assert torch.equal(widened.embed.weight, decoder.embed.weight.to(dtype).float())


def shard(folder: Path) -> dict[str, str]:
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    files = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, held in files.items():
        save_file({n: state[n] for n in held}, folder / file)
    (folder / "model.safetensors").unlink()
    table = {n: file for file, held in files.items() for n in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return table


def test_shards(tmp_path: Path) -> None:
    decoder = saved(tmp_path)
    shard(tmp_path)
    for n, t in load_decoder(tmp_path).state_dict().items():
        assert torch.equal(t, decoder.state_dict()[n])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    shard(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors: no such file"):
        load_decoder(tmp_path)


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    table = shard(tmp_path)
    name = next(n for n, f in table.items() if f == "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**table, name: "b.safetensors"}}))
    with pytest.raises(UserError, match=f"b.safetensors: {name} is not in it"):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="not an index"):
        load_decoder(tmp_path)


def test_all_that_is_wrong_is_listed(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    state = load_file(tmp_path / "model.safetensors")
    del state["final_norm.weight"]
    state["extra"] = torch.zeros(3)
    state["layers.0.attn.q.weight"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as e:
        load_decoder(tmp_path)
    lines = str(e.value).splitlines()
    assert len(lines) == 3
    assert any("final_norm.weight: missing (shape [32])" in line for line in lines)
    assert any("extra: the spec has no such tensor" in line for line in lines)
    assert any("layers.0.attn.q.weight: shape [2, 2], and the spec says [32, 32]" in line for line in lines)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "gone"])
def test_broken_files_are_one_line(tmp_path: Path, damage: str) -> None:
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    broken = {"cut": data[:-100], "header": b"\xff" * 8 + data[8:], "empty": b""}
    file.unlink()
    if damage in broken:
        file.write_bytes(broken[damage])
    with pytest.raises(UserError, match=r"model\.safetensors") as e:
        load_decoder(tmp_path)
    assert "\n" not in str(e.value)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_decoder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no spec\.yaml"):
        load_decoder(tmp_path)


def test_a_failed_write_keeps_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = saved(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    fsync = os.fsync

    def full(handle: int) -> Any:
        fsync(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    decoder.init_weights(2)
    with pytest.raises(UserError, match=r"cannot write the weights: .*No space left"):
        save_weights(decoder, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.safetensors", "spec.yaml"]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    decoder = Decoder(FEATURES["llama"])
    with pytest.raises(UserError, match="cannot write the weights"):
        save_weights(decoder, tmp_path / "absent" / "model.safetensors")
