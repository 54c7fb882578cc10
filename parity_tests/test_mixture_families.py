"""Every family with experts, in and out: models that transformers made and saved, in odd shapes, against its own
float64 logits; in torch, in the artifacts' stock runtimes, and back in a folder of the same bytes.

Routers compute in float32 there in any model. Tokens are drawn whose scores do not lie within rounding of one another:
a route that differed would show as an error of 1e-3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file, save_file

import backends
from backends.hf.carriers import BY_ARCH, CARRIERS
from backends.hf.fit import choose
from backends.numpy.model import Oracle
from backends.torch.model import Decoder
from convert.pipeline import convert
from convert.sources import open_source
from convert.sources.mxfp4 import PAIRS
from parity_tests import artifacts, mixture_models
from parity_tests.cases import nmse
from parity_tests.family_models import CONTEXT, V
from parity_tests.mixture_models import MODELS, float64_logits, save
from spec import Spec, UserError

torch.set_num_threads(1)

LIMIT = 1e-12
EVERY = [(f, v) for f, variants in MODELS.items() for v in variants]
FIRST = {(f, next(iter(variants))) for f, variants in MODELS.items()}
NAMED = [pytest.param(f, v, id=f"{f}-{v}") for f, v in EVERY]
SLOW_BUT_FIRST = [
    pytest.param(f, v, id=f"{f}-{v}", marks=[] if (f, v) in FIRST else [pytest.mark.slow]) for f, v in EVERY
]


def ids(tokens: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (batch, tokens))


def settled(spec: Spec, weights: Mapping[str, np.ndarray], tokens: int) -> np.ndarray:
    """Two texts whose experts rounding cannot turn."""
    return artifacts.settled_ids(Oracle(spec, weights, length=tokens), 2, tokens)[0]


def read(path: Path) -> tuple[Spec, dict[str, np.ndarray]]:
    with open_source(path) as source:
        return source.spec, {name: source.tensor(name) for name in source.names()}


def loaded(path: Path, **options: Any) -> Any:
    """As stock transformers loads it, nothing missing and nothing left over."""
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(path, output_loading_info=True, experts_implementation="eager", **options)
    assert not any(info.values()), info
    return model.eval()


def same_bytes(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    for name, tensor in before.items():
        width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert torch.equal(tensor.view(width), after[name].view(width)), name


@pytest.mark.parametrize(("family", "variant"), NAMED)
def test_torch_computes_what_transformers_computes(family: str, variant: str, tmp_path: Path) -> None:
    """A few tokens and several, past the window of 17 and the scalings' boundary at 32."""
    theirs = save(family, variant, tmp_path / "m")
    spec, weights = read(tmp_path / "m")
    for tokens in (12, 256):
        drawn = settled(spec, weights, tokens)
        ours = Decoder(spec, length=tokens).double().eval()
        ours.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()})
        want = float64_logits(theirs, drawn)
        with torch.no_grad():
            got = ours(torch.from_numpy(drawn)).numpy()
        assert want.std() > 0.03
        assert nmse(got, want) <= LIMIT
        assert nmse(got[:, -4:], want[:, -4:]) <= 4 * LIMIT


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("f32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("family", "variant"), SLOW_BUT_FIRST)
def test_a_folder_comes_back_byte_for_byte(family: str, variant: str, dtype: str, tmp_path: Path) -> None:
    """The same names, dtypes and bytes, float32 corrections and routers in bfloat16 models too; and a config.json that
    stock transformers loads as the same function."""
    save(family, variant, tmp_path / "m")
    names = {"bf16": torch.bfloat16, "f32": torch.float32}
    loaded(tmp_path / "m", dtype=names[dtype]).save_pretrained(tmp_path / "n")
    result = convert(tmp_path / "n", "hf", dtype, tmp_path / "out", verify=False)
    assert result.support.carrier == family
    same_bytes(*(load_file(tmp_path / d / "model.safetensors") for d in ("n", "out")))
    a, b = (float64_logits(loaded(tmp_path / d), ids(70)) for d in ("n", "out"))
    assert nmse(a, b) <= 1e-29
    assert read(tmp_path / "out")[0].hash == read(tmp_path / "n")[0].hash


@pytest.mark.parametrize("family", [f for f in MODELS if BY_ARCH[f][0].apart or f == "granitemoe"])
def test_experts_are_read_as_transformers_keeps_them_in_memory(family: str, tmp_path: Path) -> None:
    """Stacked, under the names of its modules, as folders have them that were saved without its conversion."""
    theirs = save(family, next(iter(MODELS[family])), tmp_path / "m")
    before = read(tmp_path / "m")[1]
    state = {n: t.contiguous().clone() for n, t in theirs.state_dict().items()}
    assert any(t.dim() == 3 for t in state.values())
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    after = read(tmp_path / "m")[1]
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[n], after[n]) for n in before)


REFUSED: dict[tuple[str, str], list[str]] = {
    ("qwen2_moe-five", "gguf"): ["block.attention.head_dim"],
    ("olmoe-five", "gguf"): ["block.attention.kv_heads"],
    ("flex_olmo-five", "gguf"): ["block.attention.head_dim", "block.mlp.kind"],
    ("gpt_oss-five", "gguf"): ["layers[0].attention.position.scaling"],
}
"""What a target refuses of a family's first variant, by the fields that it names."""
QUICK = ("mixtral", "gpt_oss", "glm4_moe")


@pytest.mark.parametrize("target", ["gguf", "mlx", "onnx"])
@pytest.mark.parametrize(
    ("family", "variant"),
    [
        pytest.param(f, v, id=f"{f}-{v}", marks=[] if f in QUICK and (f, v) in FIRST else [pytest.mark.slow])
        for f, v in EVERY
    ],
)
def test_stock_runtimes_compute_what_transformers_computes(
    family: str, variant: str, target: str, tmp_path: Path
) -> None:
    """At float32, 70 tokens: past the window and the scalings' boundary; or the refusal names the field."""
    pytest.importorskip({"gguf": "llama_cpp", "mlx": "mlx.core", "onnx": "onnxruntime"}[target])
    theirs = save(family, variant, tmp_path / "m")
    spec, weights = read(tmp_path / "m")
    fields = sorted({r.split(":")[0] for r in backends.support(target, spec, "f32").refusals})
    if (family, variant) in FIRST:
        assert fields == REFUSED.get((f"{family}-{variant}", target), [])
    if fields:
        return
    out = artifacts.write(target, spec, weights, tmp_path / f"a{backends.get(target).suffix}")
    with backends.load(out, target, exact=True, context=CONTEXT) as runtime:
        drawn = settled(spec, weights, 70)
        got = runtime.logits(drawn)
    assert nmse(got, float64_logits(theirs, drawn)) <= 1e-11


@pytest.mark.parametrize("level", ["q8", "q4"])
@pytest.mark.parametrize("hidden", [32, 20])
def test_packed_experts_load_in_stock_transformers(level: str, hidden: int, tmp_path: Path) -> None:
    """Where all of them have whole groups; else they are stacked floats, which it does not try to unpack."""
    pytest.importorskip("compressed_tensors")
    changes = {"hidden_size": 64, "intermediate_size": hidden}
    mixture_models.save_with("mixtral", "five", changes, tmp_path / "m")
    convert(tmp_path / "m", "hf", level, tmp_path / "out", verify=False)
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert ("model.layers.0.block_sparse_moe.experts.4.w2.weight_packed" in names) == (hidden == 32)
    assert ("model.layers.0.mlp.experts.down_proj" in names) == (hidden == 20)
    artifact = artifacts.opened("hf", tmp_path / "out")
    ours = Decoder(artifact.spec).double().eval()
    ours.load_state_dict({n: torch.from_numpy(np.asarray(w)) for n, w in artifacts.values(artifact).items()})
    with torch.no_grad():
        want = ours(torch.from_numpy(ids(40))).numpy()
        got = loaded(tmp_path / "out")(torch.from_numpy(ids(40))).logits.numpy()
    assert nmse(got, want) <= 1e-10
    again = read(tmp_path / "out")[1]  # what was quantized is a source, too
    assert all(np.array_equal(again[n], np.asarray(w, np.float32)) for n, w in artifacts.values(artifact).items())


def mxfp4(path: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """GPT-OSS as it was released: bfloat16, and blocks of MXFP4 for the experts. Returns what transformers makes of
    them, by the names of a folder without."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    changes = {"hidden_size": 64, "intermediate_size": 96}
    mixture_models.save_with("gpt_oss", "five", changes, path, dtype="bfloat16")
    stored, want, generator = {}, {}, torch.Generator().manual_seed(seed)
    for name, tensor in load_file(path / "model.safetensors").items():
        want[name] = stored[name] = tensor
        if tensor.dim() == 3:
            experts, into, out = tensor.shape
            shape = (experts, out, into // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(119, 126, shape, dtype=torch.uint8, generator=generator)
            scales.view(-1)[:3] = torch.tensor([0, 1, 128], dtype=torch.uint8)
            want[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            assert torch.equal(convert_moe_packed_tensors(blocks, scales).float(), want[name])
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (path / "config.json").write_text(json.dumps(config))
    return want


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_mxfp4_experts_are_those_of_transformers_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    from transformers.utils.quantization_config import Mxfp4Config

    want = mxfp4(tmp_path / "m")
    convert(tmp_path / "m", "hf", dtype, tmp_path / "out", verify=False)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    same_bytes({n: t.to(kind) for n, t in want.items()}, load_file(tmp_path / "out" / "model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    dequantized = loaded(tmp_path / "m", quantization_config=Mxfp4Config(dequantize=True))
    assert nmse(float64_logits(loaded(tmp_path / "out"), ids(40)), float64_logits(dequantized, ids(40))) <= 1e-29


def test_damaged_blocks_are_refused_by_name(tmp_path: Path) -> None:
    mxfp4(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    stored, name = load_file(file), "model.layers.1.mlp.experts.down_proj"
    save_file({n: t for n, t in stored.items() if n != f"{name}_scales"}, file)
    with pytest.raises(UserError, match=rf"{name}_blocks: blocks without down_proj_scales beside them"):
        read(tmp_path / "m")
    save_file({**stored, f"{name}_scales": stored[f"{name}_scales"][..., :1].contiguous()}, file)
    with pytest.raises(UserError, match=rf"{name}_blocks: blocks \[5, 64, 3, 16\] with scales \[5, 64, 1\]"):
        read(tmp_path / "m")
    bad = stored[f"{name}_scales"].clone()
    bad[2, 7, 1] = 255
    save_file({**stored, f"{name}_scales": bad}, file)
    with pytest.raises(UserError, match=r"nan at row 135, column 32"):
        read(tmp_path / "m")


def test_a_byte_holds_its_lower_half_first() -> None:
    """OCP Microscaling Formats 1.0: E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign."""
    assert PAIRS[0x2F].tolist() == [-6.0, 1.0]
    assert PAIRS[0x93].tolist() == [1.5, -0.5]


def test_dense_families_and_those_with_experts_keep_apart(tmp_path: Path) -> None:
    """No dense spec goes into code with experts, and no mixture into code without."""
    for carrier in CARRIERS:
        family = carrier.arch
        if carrier.mixture is not None:
            save(family, next(iter(MODELS[family])), tmp_path / family)
            fit = choose(read(tmp_path / family)[0])
            assert fit.carrier.mixture is not None and not fit.refusals


WIDE = {"hidden_size": 96, "num_attention_heads": 8, "intermediate_size": 32, "moe_intermediate_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_a_conversion_of_every_family_is_verified(family: str, tmp_path: Path) -> None:
    """In bfloat16 at odd widths, and at int8 where widths are whole groups."""
    variant = next(iter(MODELS[family]))
    known = transformers.CONFIG_MAPPING[family]().to_dict()
    save(family, variant, tmp_path / "odd")
    mixture_models.save_with(family, variant, {k: v for k, v in WIDE.items() if k in known}, tmp_path / "wide")
    for name, level in (("odd", "bf16"), ("wide", "q8")):
        result = convert(tmp_path / name, "hf", level, tmp_path / level)
        assert result.report is not None and result.report.ok
