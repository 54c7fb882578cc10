"""Sources: what they read is what was stored, and every defect is one clear line before a weight is read."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert.sources import open_source
from convert.sources.base import collapse
from convert.tests.conftest import weights, write_checkpoint
from spec import Spec, UserError, dump

Writes = Callable[..., Path]


def test_our_checkpoint_comes_back_whole_and_in_blocks(checkpoint: Path, small: Spec) -> None:
    expected = weights(small)
    with open_source(checkpoint) as source:
        assert source.names() == list(expected)
        for name, w in expected.items():
            np.testing.assert_array_equal(source.tensor(name), w)
            parts = list(source.blocks(name, rows=7))
            assert [start for start, _ in parts] == list(range(0, len(w), 7))
            np.testing.assert_array_equal(np.concatenate([b for _, b in parts]), w)


@pytest.mark.parametrize("shards", [1, 3])
def test_huggingface_names_become_canonical(huggingface: Writes, shards: int) -> None:
    folder = huggingface(shards)
    with open_source(folder) as source:
        for name, w in weights(source.spec).items():
            np.testing.assert_array_equal(source.tensor(name), w)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_sixteen_bit_weights_widen_exactly(tmp_path: Path, small: Spec, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    kind = {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    tensors = {n: torch.from_numpy(w).to(kind) for n, w in weights(small).items()}
    folder = write_checkpoint(tmp_path / "c", small, {})
    save_torch(tensors, folder / "model.safetensors")
    with open_source(folder) as source:
        assert source.dtypes() == {dtype.lower(): len(tensors)}
        for name, t in tensors.items():
            np.testing.assert_array_equal(source.tensor(name), t.float().numpy())


def test_blocks_of_q_and_k_are_whole_heads(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.sources.base.BLOCK", 64 * 24)
    with open_source(checkpoint) as source:
        assert source.rows("layers.0.attn.q.weight") == 16
        assert source.rows("layers.0.attn.v.weight") == 24


def test_the_hash_depends_on_values_only(checkpoint: Path, huggingface: Writes) -> None:
    folder = huggingface(3)
    with open_source(checkpoint) as a, open_source(folder) as b:
        assert a.hash() == b.hash()
    w = dict(load_file(checkpoint / "model.safetensors"))
    w["final_norm.weight"][3] += 1e-6
    save_file(w, checkpoint / "model.safetensors")
    with open_source(checkpoint) as a, open_source(folder) as b:
        assert a.hash() != b.hash()


def damaged(folder: Path, change: Callable[[dict[str, Any]], None], extra: bytes = b"") -> None:
    """Rewrite the header of model.safetensors."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + n :] + extra)


def overlap(h: dict[str, Any]) -> None:
    a, b = list(h)[:2]
    h[b]["data_offsets"] = [x - h[b]["data_offsets"][0] + h[a]["data_offsets"][0] for x in h[b]["data_offsets"]]


def beyond(h: dict[str, Any]) -> None:
    last = max(h.values(), key=lambda e: e["data_offsets"][1])
    last["data_offsets"] = [x + 1000 for x in last["data_offsets"]]


def negative(h: dict[str, Any]) -> None:
    h["final_norm.weight"]["data_offsets"] = [-8, 248]


def wrong_size(h: dict[str, Any]) -> None:
    h["final_norm.weight"]["shape"] = [63]


def odd_dtype(h: dict[str, Any]) -> None:
    h["final_norm.weight"]["dtype"] = "F4"


@pytest.mark.parametrize(
    ("change", "says"),
    [(overlap, "overlaps"), (beyond, "belong to no tensor"), (negative, "no sound"), (wrong_size, "needs 252 bytes"),
     (odd_dtype, "dtype F4")],
)  # fmt: skip
def test_a_corrupt_header_is_told_from_a_truncated_file(
    checkpoint: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    damaged(checkpoint, change)
    with pytest.raises(UserError, match=says) as e:
        open_source(checkpoint)
    assert "\n" not in str(e.value) and "model.safetensors" in str(e.value)


@pytest.mark.parametrize(("change", "says"), [(-3, "truncated"), (3, "3 bytes after the last tensor")])
def test_a_file_of_another_length_is_refused(checkpoint: Path, change: int, says: str) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(UserError, match=says):
        open_source(checkpoint)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "0 bytes are no safetensors file"), (b"\xff" * 100, "not a safetensors file"),
     (struct.pack("<Q", 60) + b"{", "truncated"), (struct.pack("<Q", 8) + b"not json", "corrupt header"),
     (struct.pack("<Q", 2) + b"[]", "corrupt header"), (struct.pack("<Q", 2) + b"\xff\xfe", "corrupt header"),
     (struct.pack("<Q", 5000) + b"[" * 5000, "corrupt header")],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(checkpoint: Path, content: bytes, says: str) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=says):
        open_source(checkpoint)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.999])
def test_a_truncated_file_is_refused(checkpoint: Path, keep: float) -> None:
    file = checkpoint / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(UserError, match=r"model.safetensors: truncated: .*copy it again"):
        open_source(checkpoint)


def test_missing_files_are_named(tmp_path: Path, huggingface: Writes) -> None:
    kinds = r"\(a source is a checkpoint folder of ours, a Hugging Face folder, a .gguf file, or hf:owner/name\)$"
    with pytest.raises(UserError, match=f"nowhere: no such folder or file {kinds}"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "passwd").touch()
    with pytest.raises(UserError, match=f"passwd: is no source {kinds}"):
        open_source(tmp_path / "passwd")
    with pytest.raises(UserError, match=r"neither spec.yaml .* nor config.json"):
        open_source(tmp_path)
    folder = huggingface(3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards are missing: model-00002-of-00003.safetensors"):
        open_source(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "consolidated.00.pth").touch()
    with pytest.raises(UserError, match=r"no model.safetensors and no pytorch_model.bin.*; consolidated.00.pth: not"):
        open_source(folder)


def test_an_index_must_tell_the_truth(huggingface: Writes) -> None:
    folder = huggingface(2)
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    first, second = sorted(set(data["weight_map"].values()))
    data["weight_map"]["model.norm.weight"] = first if data["weight_map"]["model.norm.weight"] == second else second
    index.write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"says it holds model.norm.weight, and it does not"):
        open_source(folder)
    data["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(data))
    with pytest.raises(UserError, match="lies outside the folder"):
        open_source(folder)


def test_every_tensor_problem_is_named_at_once(checkpoint: Path) -> None:
    w = dict(load_file(checkpoint / "model.safetensors"))
    del w["layers.0.attn.q.weight"], w["layers.1.attn.q.weight"]
    w["layers.2.mlp.up.weight"] = w["layers.2.mlp.up.weight"][:-1].copy()
    w["layers.0.attn.q.bias"] = np.zeros(64, np.float32)
    w["final_norm.weight"] = w["final_norm.weight"].astype(np.float64)
    save_file(w, checkpoint / "model.safetensors")
    with pytest.raises(UserError) as e:
        open_source(checkpoint)
    lines = [line.removeprefix(f"{checkpoint}: ") for line in str(e.value).splitlines()]
    assert lines == [
        "2 tensors are missing: layers.{0..1}.attn.q.weight",
        "1 tensor belongs to nothing in the model: layers.0.attn.q.bias",
        "layers.2.mlp.up.weight: shape [159, 64], the model needs [160, 64]",
        "1 tensor is F64 (F32, F16 and BF16 are read): final_norm.weight",
    ]


@pytest.mark.parametrize(("value", "word"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_a_weight_that_is_no_number_is_found_while_streaming(checkpoint: Path, value: float, word: str) -> None:
    w = dict(load_file(checkpoint / "model.safetensors"))
    w["layers.1.mlp.up.weight"][77, 5] = value
    save_file(w, checkpoint / "model.safetensors")
    with open_source(checkpoint) as source:
        next(source.blocks("layers.1.mlp.up.weight", rows=77))  # the first block is sound
    with open_source(checkpoint) as source, pytest.raises(UserError, match=rf"{word} at row 77, column 5"):
        source.tensor("layers.1.mlp.up.weight")


def test_a_tied_head_that_was_stored_must_agree(huggingface: Writes) -> None:
    folder = huggingface(tie_word_embeddings=True)
    file = folder / "model.safetensors"
    w = dict(load_file(file))
    w["lm_head.weight"] = w["model.embed_tokens.weight"].copy()
    w["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    save_file(w, file)
    with open_source(folder) as source:
        source.tensor("embed.weight")
    w["lm_head.weight"][9, 1] += 1
    save_file(w, file)
    with open_source(folder) as source, pytest.raises(UserError, match=r"lm_head.weight: differs"):
        source.tensor("embed.weight")


def test_a_file_cut_while_it_is_read_is_an_error(checkpoint: Path) -> None:
    with open_source(checkpoint) as source:
        with (checkpoint / "model.safetensors").open("r+b") as f:
            f.truncate(3000)
        with pytest.raises(UserError, match="became shorter"):
            source.hash()


def test_a_spec_error_keeps_its_paths(checkpoint: Path, small: Spec) -> None:
    (checkpoint / "spec.yaml").write_text(dump(small).replace("kv_heads: 2", "kv_heads: 3"))
    with pytest.raises(UserError, match=r"spec.yaml: block.attention.kv_heads: 3 does not divide heads=4"):
        open_source(checkpoint)


def test_long_lists_fold_layer_numbers() -> None:
    names = [f"layers.{i}.a" for i in (0, 1, 2, 5)] + ["layers.3.b", "c"]
    assert collapse(names) == "layers.{0..2,5}.a, layers.3.b, c"
    whole = [f"layers.{i}.experts.{j}.{p}.weight" for i in range(3) for j in range(4) for p in ("gate", "up")]
    assert collapse(whole) == "layers.{0..2}.experts.{0..3}.gate.weight, layers.{0..2}.experts.{0..3}.up.weight"
    some = [n for n in whole if "gate" in n and n != "layers.1.experts.2.gate.weight"]
    assert collapse(some) == "layers.{0,2}.experts.{0..3}.gate.weight, layers.1.experts.{0..1,3}.gate.weight"
    assert collapse([]) == ""


def test_every_kind_of_missing_and_extra_tensor_is_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    kept = load_file(file)
    wrong = {f"{p}_{n}": x for n, x in kept.items() for p in ("not", "nor")}
    save_file(wrong, file)
    with pytest.raises(UserError) as e:
        open_source(checkpoint)
    said = str(e.value)
    kinds = {re.sub(r"\.\d+\.", ".{0..2}.", n) for n in kept}
    assert len(kinds) == 12
    assert all(f" {k}" in said and f" not_{k}" in said and f" nor_{k}" in said for k in kinds), said


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_header_is_found_or_harmless(checkpoint: Path, data: st.DataObject) -> None:
    file = checkpoint / "model.safetensors"
    good = file.read_bytes()
    raw = bytearray(good)
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(bytes(raw[: data.draw(st.sampled_from([len(raw), header, 100, len(raw) - 1]))]))
        with open_source(checkpoint) as source:
            source.hash()
    except UserError:
        pass  # anything else fails the test
    finally:
        file.write_bytes(good)


def test_an_untied_head_that_is_not_there_is_named(huggingface: Writes) -> None:
    folder = huggingface(tie_word_embeddings=False)
    w = dict(load_file(folder / "model.safetensors"))
    del w["lm_head.weight"]
    save_file(w, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"1 tensor is missing: lm_head.weight \(the config says that the head is not"):
        open_source(folder)


def test_other_copies_of_the_weights_are_left_alone_and_named(huggingface: Writes) -> None:
    folder = huggingface()
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    (folder / "consolidated.safetensors").write_bytes(b"x")
    with open_source(folder) as source:
        assert (
            "weights are read from model.safetensors; consolidated.safetensors, original beside it: not looked at"
            in (source.notes)
        )


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.int8, np.uint8, np.bool_])
def test_weights_of_other_dtypes_are_named(huggingface: Writes, dtype: type) -> None:
    folder = huggingface()
    w = dict(load_file(folder / "model.safetensors"))
    for i in range(3):
        w[f"model.layers.{i}.mlp.up_proj.weight"] = w[f"model.layers.{i}.mlp.up_proj.weight"].astype(dtype)
    save_file(w, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"3 tensors are \w+ \(F32, F16 and BF16 are read\): model.layers.\{0..2\}.mlp"):
        open_source(folder)


def test_an_embedding_of_another_size_than_the_config_says_is_named(huggingface: Writes) -> None:
    folder = huggingface()
    w = dict(load_file(folder / "model.safetensors"))
    w["model.embed_tokens.weight"] = np.zeros((128, 64), np.float32)
    save_file(w, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.embed_tokens.weight: shape \[128, 64\], the model needs \[96, 64\]"):
        open_source(folder)
