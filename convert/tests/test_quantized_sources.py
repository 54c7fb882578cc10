"""Folders that came quantized: every product exact, every scale claimed, everything else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import pipeline
from convert.sources import open_source
from convert.sources.store import TABLES
from convert.tests.conftest import LLAMA, write_huggingface
from spec import UserError

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
CT: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"], "global_compression_ratio": None, "kv_cache_scheme": None,
    "config_groups": {"group_0": {
        "targets": ["Linear"], "output_activations": None,
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
    }},
}  # fmt: skip
Scale = Callable[[Any], Any]


def quantized(
    folder: Path, config: dict[str, Any], block: tuple[int, int] | str, name: str, *, dtype: Any = None,
    scale_dtype: Any = None, inputs: bool = False, **changes: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Write a Llama whose projections are float8 with scales called `name`. Returns what they stand for."""
    write_huggingface(folder, {**LLAMA, **changes})
    state = load_file(folder / "model.safetensors")
    out, expected = dict(state), {}
    dtype = dtype or torch.float8_e4m3fn
    for key, w in state.items():
        if "_proj" not in key:
            continue
        tall, wide = {"tensor": w.shape, "row": (1, w.shape[1])}[block] if isinstance(block, str) else block
        grid = [[w[r : r + tall, c : c + wide].abs().max() / 300 for c in range(0, w.shape[1], wide)]
                for r in range(0, w.shape[0], tall)]  # fmt: skip
        scale = torch.tensor(grid).to(scale_dtype or torch.float32)
        full = scale.float().repeat_interleave(tall, 0)[: w.shape[0]].repeat_interleave(wide, 1)[:, : w.shape[1]]
        codes = (w / full).round().to(torch.int8) if dtype is torch.int8 else (w / full).to(dtype)
        expected[key] = (codes.to(torch.float32) * full).numpy()
        out[key], out[key + name] = codes, scale.reshape(()) if block == "tensor" else scale
        if inputs:
            out[key.replace("weight", "input_scale")] = torch.ones(())
    save_file(out, folder / "model.safetensors", {"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "quantization_config": config}))
    return expected


def compare(folder: Path, expected: dict[str, np.ndarray]) -> None:
    with open_source(folder) as source:
        for bound in source._layout.rules:
            (outside,) = bound.external
            if outside in expected:
                canonical = bound.canonical[0].name
                np.testing.assert_array_equal(source.tensor(canonical), expected[outside], err_msg=outside)
                parts = [b for _, b in source.blocks(canonical, rows=13)]
                np.testing.assert_array_equal(np.concatenate(parts), expected[outside])
        assert any("came quantized" in note for note in source.notes)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_every_eight_bit_float_is_torchs(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    kind = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0"}[dtype]
    np.testing.assert_array_equal(TABLES[kind], codes.view(getattr(torch, dtype)).float().numpy())


@pytest.mark.parametrize(
    ("config", "block", "name", "more"),
    [
        ({**FP8, "weight_block_size": [48, 32]}, (48, 32), "_scale_inv", {}),
        ({**FP8, "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, (128, 128), "_scale_inv",
         {"scale_dtype": torch.float8_e8m0fnu}),
        ({**FP8, "activation_scheme": "static", "weight_block_size": None}, "tensor", "_scale_inv", {"inputs": True}),
        ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, "tensor", "_scale",
         {"inputs": True}),
        ({**FP8, "fmt": "e5m2"}, "tensor", "_scale", {"dtype": torch.float8_e5m2}),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}, "row",
         "_scale", {}),
        (CT, "row", "_scale", {"scale_dtype": torch.bfloat16}),
        (CT, "tensor", "_scale", {"inputs": True}),
        ({**CT, "format": "int-quantized"}, "row", "_scale", {"dtype": torch.int8}),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}, "ignore": ["lm_head"]},
         "tensor", "_scale", {"inputs": True}),
    ],
    ids=["blocks", "ue8m0", "fp8-tensor", "fp8-vllm", "e5m2", "fbgemm", "ct-row", "ct-tensor", "ct-int8", "modelopt"],
)  # fmt: skip
def test_scaled_codes_are_exact(tmp_path: Path, config: Any, block: Any, name: str, more: Any) -> None:
    expected = quantized(tmp_path / "m", config, block, name, **more)
    compare(tmp_path / "m", expected)
    with open_source(tmp_path / "m") as source:
        assert any("scales of activations" in note for note in source.notes) == more.get("inputs", False)


def test_transformers_reads_the_same_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**FP8, "weight_block_size": [32, 64]}
    quantized(tmp_path / "m", config, (32, 64), "_scale_inv", intermediate_size=192, hidden_size=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    theirs = model.state_dict()
    with open_source(tmp_path / "m") as source:
        for bound in source._layout.rules:
            np.testing.assert_array_equal(source.tensor(bound.canonical[0].name), theirs[bound.external[0]].numpy())


def test_compressed_tensors_reads_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    quantized(tmp_path / "m", CT, "row", "_scale")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    key = "model.layers.1.mlp.down_proj.weight"
    args = QuantizationArgs.model_validate({"num_bits": 8, "type": "float", "strategy": "channel"})
    theirs = dequantize(stored[key], stored[key + "_scale"], args=args, dtype=torch.float32)
    with open_source(tmp_path / "m") as source:
        np.testing.assert_array_equal(source.tensor("layers.1.mlp.down.weight"), theirs.numpy())


@pytest.mark.parametrize("level", ["q8", "q4"])
def test_our_own_quantized_folder_comes_back(tmp_path: Path, checkpoint: Path, level: str) -> None:
    """Values as stored, and the same level found again has the same codes and scales."""
    pytest.importorskip("compressed_tensors")
    first = pipeline.convert(checkpoint, "hf", level, tmp_path / "first", verify=False)
    with open_source(tmp_path / "first") as source:
        assert set(source.dtypes()) <= {"i8", "i4", "f32", "f16"}
    again = pipeline.convert(tmp_path / "first", "hf", level, tmp_path / "again", verify=False)
    assert again.receipt["weights_hash"] == first.receipt["weights_hash"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' is not read .*convert from the original"),
        ({"quant_method": "awq"}, "'awq' is not read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not read"),
        ({"load_in_8bit": True}, "names no quant_method"),
        ("fp8", "names no quant_method"),
        ({**FP8, "rotation": "hadamard"}, "rotation is an unknown key of fp8"),
        ({**CT, "transform_config": {"a": 1}}, "transform_config: .*changes the weights"),
        ({**CT, "sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ({**CT, "format": "nvfp4-pack-quantized"}, "format: 'nvfp4-pack-quantized' is not read"),
        ({**FP8, "weight_block_size": [0, 128]}, "blocks of"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo: 'NVFP4' is not read"),
        ({**FP8, "modules_to_not_convert": ["q_proj"]}, "3 tensors|quantization_config says that its module is not"),
        ({**CT, "ignore": ["re:.*down_proj"]}, "quantization_config says that its module is not"),
    ],
)
def test_what_is_not_read_is_named(tmp_path: Path, config: Any, says: str) -> None:
    quantized(tmp_path / "m", config, "row", "_scale")
    with pytest.raises(UserError, match=says):
        open_source(tmp_path / "m")


def test_codes_without_a_fitting_scale_are_named(tmp_path: Path) -> None:
    quantized(tmp_path / "m", {**FP8, "weight_block_size": [32, 32]}, (32, 32), "_scale_inv")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.0.self_attn.q_proj.weight_scale_inv"]
    key = "model.layers.1.mlp.up_proj.weight_scale_inv"
    state[key] = state[key][:-1].contiguous()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError) as e:
        open_source(tmp_path / "m")
    assert "self_attn.q_proj.weight: no scale beside it" in str(e.value)
    assert "for weights [160, 64]: one, one for each row or one for each block of 32 x 32" in str(e.value)


def test_codes_without_a_config_are_no_weights(tmp_path: Path) -> None:
    quantized(tmp_path / "m", FP8, "row", "_scale")
    data = json.loads((tmp_path / "m" / "config.json").read_text())
    del data["quantization_config"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"21 tensors are F8_E4M3 \(F32, F16 and BF16 are read\)"):
        open_source(tmp_path / "m")


def test_a_scale_that_is_no_number_is_found_while_streaming(tmp_path: Path) -> None:
    quantized(tmp_path / "m", FP8, "row", "_scale")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.up_proj.weight_scale"][7] = torch.nan
    save_file(state, file, {"format": "pt"})
    with open_source(tmp_path / "m") as source, pytest.raises(UserError, match="nan at row 7"):
        source.tensor("layers.0.mlp.up.weight")
