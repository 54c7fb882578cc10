"""Packages as files: what clients find in them, the tokenizer's item, metadata, sizes, bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from backends.base import Planned, QuantizedTensor, Tokenizer
from backends.coreml import package, program
from backends.coreml.build import recipe, size, stamp, writer
from backends.coreml.card import snippet
from backends.coreml.library import coremltools
from backends.coreml.mil.program import Function, Instruction
from backends.coreml.mil.weights import Blob
from backends.coreml.names import mil_name
from backends.coreml.palettes import group_rows
from backends.coreml.program import constants
from backends.coreml.read import open_artifact
from backends.coreml.runtime import load
from backends.coreml.support import support
from parity_tests import artifacts
from parity_tests.cases import BASE, FEATURES, random_weights
from spec import Spec, params, parse
from spec.config import merge
from spec.errors import UserError

TOKENIZER = Tokenizer(
    json={
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, t in ((94, "<s>"), (95, "</s>"))],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                            "use_regex": True},
        "model": {"type": "BPE", "vocab": {chr(33 + i): i for i in range(94)}, "merges": []},
    },
    bos="<s>", eos="</s>", add_bos=True,
)  # fmt: skip


def write(path: Path, name: str = "llama", level: str = "f16", **options: Any) -> Path:
    spec = FEATURES[name]
    return artifacts.write("coreml", spec, random_weights(spec), path, level, **options)


def named(function: Function, name: str) -> Instruction:
    return next(i for i in function.body if name in [o.name for o in i.outputs])


def test_the_package_keeps_the_clients_contract(tmp_path: Path) -> None:
    """What swift-transformers asks of a stateful model: names, ranks, a range of lengths; no mask, which it zeroes."""
    spec = FEATURES["llama"]
    described = package.read_model(write(tmp_path / "m.mlpackage")).description
    (ids,) = described.input
    held = ids.type.multiArrayType
    assert ids.name == "inputIds" and held.DESCRIPTOR.enum_types_by_name["ArrayDataType"].values_by_number[
        held.dataType].name == "INT32"  # fmt: skip
    ranges = [(r.lowerBound, r.upperBound) for r in held.shapeRange.sizeRanges]
    assert ranges == [(1, 1), (1, spec.context)]
    assert [o.name for o in described.output] == ["logits"]
    states = {s.name: list(s.type.stateType.arrayType.shape) for s in described.state}
    assert states == {"keyCache": [2, 1, 2, 48, 8], "valueCache": [2, 1, 2, 48, 8], "position": [1]}
    artifact = open_artifact(tmp_path / "m.mlpackage")
    (function,) = artifact.functions.values()
    logits = next(o for i in function.body for o in i.outputs if o.name == "logits")
    assert (logits.dtype, logits.shape) == ("FLOAT16", (1, None, spec.vocab_size))


def test_the_program_is_for_ios_18(tmp_path: Path) -> None:
    model = coremltools().utils.load_spec(str(write(tmp_path / "m.mlpackage")))
    assert model.specificationVersion == 9 and model.mlProgram.functions["main"].opset == "CoreML8"


def test_operations_are_named_by_layer_and_tap(tmp_path: Path) -> None:
    (function,) = open_artifact(write(tmp_path / "m.mlpackage")).functions.values()
    found = {o.name for i in function.body for o in i.outputs}
    taps = ("attn_norm", "attn_q", "attn_k_rope", "attn_heads", "attn_mix", "attn_o", "mlp_norm", "mlp_act", "out")
    assert {f"L{i}_{t}" for i in range(2) for t in taps} | {"embed", "final_norm", "logits"} <= found


@pytest.mark.parametrize(("level", "kind", "dtype"), [
    ("q4", "constexpr_blockwise_shift_scale", "INT4"), ("q8", "constexpr_blockwise_shift_scale", "INT8"),
    ("lut4", "constexpr_lut_to_dense", "UINT4"), ("lut6", "constexpr_lut_to_dense", "UINT6"),
    ("lut8", "constexpr_lut_to_dense", "UINT8"),
])  # fmt: skip
def test_a_tied_embedding_is_one_compressed_table(level: str, kind: str, dtype: str, tmp_path: Path) -> None:
    """The gather and the head read the same constant, which is stored packed."""
    path = write(tmp_path / "m.mlpackage", "qwen3", level)
    artifact = open_artifact(path)
    (function,) = artifact.functions.values()
    users = [i.type for i in function.body if "embed_weight" in i.refs()]
    assert sorted(users) == ["gather", "linear"]
    made = named(function, "embed_weight")
    data = made.args["data" if level[0] == "q" else "indices"]
    want = {"q4": "INT8"}.get(level, dtype)  # q4 spends int8 on the embedding while the budget lasts
    assert made.type == kind and isinstance(data, Blob) and data.dtype in (dtype, want)
    floats = sum(2 * p.size for p in params(artifact.spec) if p.matrix)
    stored = (path / package.WEIGHTS / "weight.bin").stat().st_size
    assert level == "lut8" or stored < floats


def test_the_tokenizer_is_an_item_of_the_package(tmp_path: Path) -> None:
    spec, path = FEATURES["llama"], tmp_path / "m.mlpackage"
    artifacts.write("coreml", spec, random_weights(spec), path, "f16", TOKENIZER)
    manifest = json.loads((path / "Manifest.json").read_text())
    paths = {e["path"] for e in manifest["itemInfoEntries"].values()}
    assert paths == {"com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights", "allotrope/tokenizer"}
    ct = coremltools()
    from coremltools.libmodelpackage import ModelPackage

    assert ModelPackage.isValid(str(path))
    assert ModelPackage(str(path)).findItemByNameAuthor("tokenizer", "allotrope").path().endswith("allotrope/tokenizer")
    files = {f.name for f in (path / package.TOKENIZER).iterdir()}
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
    } <= files  # what AutoTokenizer.from(modelFolder:) reads
    config = json.loads((path / package.TOKENIZER / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (94, 95)
    with load(path) as runtime:
        assert runtime.encode("AB") == [94, 32, 33] and runtime.decode([94, 32, 33, 95]) == b"AB"
        assert runtime.eos_ids == {95}
    # a copy by coremltools keeps it
    ct.models.MLModel(str(path), skip_model_load=True).save(str(tmp_path / "copy.mlpackage"))
    with load(tmp_path / "copy.mlpackage") as runtime:
        assert runtime.encode("AB") == [94, 32, 33]


def test_a_package_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with load(write(tmp_path / "m.mlpackage")) as runtime:
        assert runtime.eos_ids == frozenset()
        with pytest.raises(UserError, match="has no tokenizer"):
            runtime.encode("A")


def test_the_metadata_says_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mlpackage", "gemma2", "q8")
    held = package.read_model(path).description.metadata
    assert held.author and held.license and "gemma2: a language model of 2 layers" in held.shortDescription
    artifact = open_artifact(path)
    assert artifact.source == FEATURES["gemma2"] and artifact.level == "q8" and artifact.session == 48
    assert artifact.receipt == {"level": "q8", "backend": "coreml"}
    assert artifact.arithmetic.compute == artifact.arithmetic.cache == "f16"


def test_a_stamp_changes_the_receipt_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "m.mlpackage")
    weights = (path / package.WEIGHTS / "weight.bin").read_bytes()
    program = package.read_model(path).mlProgram.SerializeToString(deterministic=True)
    stamp(path, {"parity": "é", "n": [1]})
    assert open_artifact(path).receipt == {"parity": "é", "n": [1]}
    assert (path / package.WEIGHTS / "weight.bin").read_bytes() == weights
    assert package.read_model(path).mlProgram.SerializeToString(deterministic=True) == program
    assert not list(path.rglob("*.partial"))


@pytest.mark.parametrize("functions", ["one", "two"])
def test_equal_conversions_give_equal_files(functions: str, tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{n}.mlpackage", "gpt2", "lut4", functions=functions) for n in "ab")
    files = sorted(f.relative_to(a) for f in a.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(b) for f in b.rglob("*") if f.is_file())
    for f in files:
        assert (a / f).read_bytes() == (b / f).read_bytes(), f


@pytest.mark.parametrize("level", ["f32", "f16", "q8", "q4", "lut4", "lut6"])
def test_the_announced_size_is_close(level: str, tmp_path: Path) -> None:
    spec = parse({**BASE, "name": "s", "vocab_size": 1600, "width": 64, "depth": 3})
    plan = [Planned(p.name, p.shape, _level(level, p.name, spec)) for p in params(spec)]
    out = artifacts.write("coreml", spec, random_weights(spec), tmp_path / "m.mlpackage", level, TOKENIZER)
    real = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert abs(size(spec, plan, TOKENIZER) / real - 1) < 0.05


def _level(level: str, name: str, spec: Spec) -> str:
    from convert.recipe import plan

    if level in ("lut4", "lut6", "lut8"):
        return recipe(spec, level)[name]
    return next(p.level for p in plan(spec, level) if p.name == name)


def planned(spec: Spec, level: str = "f16") -> list[Planned]:
    return [Planned(p.name, p.shape, level if p.matrix else "f32") for p in params(spec)]


def test_a_missing_row_is_our_bug_and_abort_leaves_nothing(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    out = writer(spec, planned(spec), None, tmp_path / "m.mlpackage", metadata={}, threads=1)
    with pytest.raises(AssertionError, match="rows missing"):
        out.close({})
    out.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FEATURES["llama"]

    def full(*_: Any) -> Any:
        return SimpleNamespace(free=1000)

    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", full)
        with pytest.raises(UserError, match=r"coremltools needs 0\.\d MB there"):
            writer(spec, planned(spec), None, tmp_path / "m.mlpackage", metadata={}, threads=1)
    out = writer(spec, planned(spec), None, tmp_path / "m.mlpackage", metadata={}, threads=1)
    for p in params(spec):
        out.write(p.name, 0, np.ones(p.shape, np.float32))

    def no_space(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        out.close({})
    out.abort()
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_refused_with_their_place(tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    out = writer(spec, planned(spec, "lut4"), None, tmp_path / "m.mlpackage", metadata={}, threads=1)
    rows = np.ones((4, 32), np.float32)
    rows[2, 5] = -1e5
    with pytest.raises(UserError, match=r"layers\.0\.attn\.o\.weight: row 10: a weight of -100000 is beyond float16"):
        out.write("layers.0.attn.o.weight", 8, rows)
    out.abort()
    spec = FEATURES["qkv_bias"]
    out = writer(spec, planned(spec), None, tmp_path / "m.mlpackage", metadata={}, threads=1)
    for p in params(spec):
        out.write(p.name, 0, np.full(p.shape, 1e5 if p.name == "layers.1.attn.k.bias" else 1, np.float32))
    with pytest.raises(UserError, match=r"layers\.1\.attn\.k\.bias: a bias of 100000 is beyond float16"):
        out.close({})
    out.abort()


@pytest.mark.parametrize("level", ["f32", "f16", "lut4"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_no_number_is_refused_with_its_place(value: float, level: str, tmp_path: Path) -> None:
    spec = FEATURES["llama"]
    out = writer(spec, planned(spec, level), None, tmp_path / "m.mlpackage", metadata={}, threads=1)
    rows = np.ones((4, 32), np.float32)
    rows[1, 2] = value
    with pytest.raises(UserError, match=rf"layers\.0\.attn\.o\.weight: row 9: a weight of {value}, which is no number"):
        out.write("layers.0.attn.o.weight", 8, rows)
    with pytest.raises(UserError, match=rf"final_norm\.weight: row 1: a weight of {value}"):
        out.write("final_norm.weight", 0, rows[:, 2])
    out.abort()


def test_two_functions_take_the_room_of_one_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight files in the partial folder whenever coremltools is done with a function."""
    real, found = program.write, []

    def watched(*args: Any) -> None:
        real(*args)
        found.append(len(list(tmp_path.rglob("weight.bin"))))

    monkeypatch.setattr(program, "write", watched)
    write(tmp_path / "m.mlpackage", functions="two")
    assert found == [1, 1]


def test_refusals_name_the_field_and_what_works() -> None:
    spec = FEATURES["llama"]
    assert "use f16" in support(spec, "bf16").refusals[0]
    assert "level: q3" in support(spec, "q3").refusals[0]
    assert "compute: f16 cannot use float32 weights" in support(spec, "f32", compute="f16").refusals[0]
    assert support(parse(merge(BASE, {"name": "s", "context": 2})), "f16").refusals[0].startswith("context: 2")
    assert (
        support(parse(merge(BASE, {"name": "s", "context": 1 << 22})), "f16").refusals[0].startswith("context: 4194304")
    )
    assert support(spec, "f16", compute="f32").ok and support(spec, "q4", functions="two").ok
    assert any("session of 48 tokens" in n for n in support(FEATURES["rope_dynamic"], "f16").notes)


def test_too_many_experts_for_their_choice_are_refused() -> None:
    """All of them run: at most eight times the arithmetic of the chosen."""

    def mixed(experts: int, top_k: int) -> Spec:
        mixture = {"kind": "moe", "experts": experts, "hidden": 32, "router": {"top_k": top_k}}
        return parse(merge(BASE, {"block": {"mlp": mixture}}))

    found = " ".join(support(mixed(8, 2), "q4").notes)
    assert "runs every expert for every token: 4 times" in found and "--functions two" in found
    assert "for every token of a prompt: 8 times" in support(mixed(64, 8), "q4", functions="two").notes[-1]
    (refusal,) = support(mixed(128, 8), "q4").refusals
    assert refusal.startswith("layers[0].mlp.experts: 128 with router.top_k=8: Core ML would run all of them")


def test_names_stay_distinct() -> None:
    for spec in FEATURES.values():
        names = [mil_name(p.name) for p in params(spec)] + list(constants(spec))
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "missing", "foreign", "weights"])
def test_a_damaged_package_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.mlpackage")
    file = path / package.MODEL
    whole = file.read_bytes()
    match damage:
        case "truncated":
            file.write_bytes(whole[: len(whole) // 2])
        case "garbage":
            file.write_bytes(whole[::-1])
        case "empty":
            file.write_bytes(b"")
        case "missing":
            file.unlink()
        case "foreign":
            model = package.read_model(path)
            model.description.metadata.userDefined.clear()
            package.write_model(path, model)
        case _:
            (path / package.WEIGHTS / "weight.bin").write_bytes(b"")
    with pytest.raises(UserError) as e, load(path) as runtime:
        runtime.prefill(np.array([1]))
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_problems_are_found(tmp_path: Path) -> None:
    """A tensor of another type than planned, a changed rotary table, a missing weight."""
    spec, path = FEATURES["gemma2"], write(tmp_path / "m.mlpackage", "gemma2", "q8")
    artifact = open_artifact(path)
    found = artifact.problems(planned(spec, "q4"))
    assert found["layers.0.attn.q.weight"] == (
        "is stored as constexpr_blockwise_shift_scale of INT8, not constexpr_blockwise_shift_scale of INT4"
    )
    cos = named(artifact.functions["main"], "rope_0_cos").args["val"]
    start, _ = cos._place
    weights = bytearray((path / package.WEIGHTS / "weight.bin").read_bytes())
    weights[start + 5] ^= 1
    (path / package.WEIGHTS / "weight.bin").write_bytes(weights)
    model = package.read_model(path)
    body = model.mlProgram.functions["main"].block_specializations["CoreML8"].operations
    del body[next(n for n, o in enumerate(body) if o.outputs and o.outputs[0].name == "final_norm_weight")]
    package.write_model(path, model)
    assert open_artifact(path).problems(planned(spec, "q8")) == {
        "final_norm.weight": "is missing", "rope_0_cos": "differs from what the spec gives",
        "main": "coremltools does not load it: KeyError: 'Var final_norm_weight not found'",
    }  # fmt: skip


def test_portable_codes_and_scales_come_back_bit_for_bit(tmp_path: Path) -> None:
    """In float32 programs too, whose scales are float32."""
    for compute in ("f16", "f32"):
        for level in ("q8", "q4"):
            path = tmp_path / f"{compute}-{level}.mlpackage"
            spec, weights = FEATURES["gpt2"], random_weights(FEATURES["gpt2"])
            artifacts.write("coreml", spec, weights, path, level, compute=compute)
            artifacts.check_packing("coreml", path, spec, weights, level)
            rows = open_artifact(path).rows("layers.1.mlp.up.weight", 3, 9)
            assert isinstance(rows, QuantizedTensor) and rows.shape == (6, 32)


def test_whole_groups_of_a_palette_are_compared_with_the_source(tmp_path: Path) -> None:
    spec, weights = FEATURES["gpt2"], random_weights(FEATURES["gpt2"])
    path = write(tmp_path / "m.mlpackage", "gpt2", "lut4")
    packed = artifacts.Packed(open_artifact(path), artifacts.planned(artifacts.backends.get("coreml"), spec, "lut4"))
    name = "layers.0.mlp.up.weight"
    rows = len(weights[name])
    group = packed.rows_together(name)
    assert group == group_rows(rows) < rows and packed.rows_together("final_norm.weight") == 1
    assert packed.compare(name, 0, weights[name]) == "" and packed.compare(name, group, weights[name][group:]) == ""
    other = weights[name].copy()
    other[group + 1] *= 1.5
    assert "values differ" in packed.compare(name, 0, other) and packed.compare(name, 0, other[:group]) == ""
    with pytest.raises(AssertionError, match="cut a group"):
        packed.compare(name, 7, weights[name][7:50])


def test_the_snippet_names_the_package_and_is_the_docs_one() -> None:
    text = snippet("tiny.q4.mlpackage")
    assert 'forResource: "tiny.q4"' in text and "tiny.q4.mlpackage/Data/allotrope/tokenizer" in text
    docs = Path(__file__).parents[3] / "docs" / "coreml.md"
    assert text.partition("\n")[2] in docs.read_text(encoding="utf-8")
