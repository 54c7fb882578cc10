"""Every dense family, in and out: models that transformers made and saved, in odd shapes, against its own float64
logits; in torch, in the artifacts' stock runtimes, and back in a folder of the same bytes.

transformers keeps rotary tables, RMSNorm and softmax in float32 in any model: what a position of 256 turns is off by
256 * 2^-24 there, and that is nearly all of what is measured here (LayerNorm families without rotation are at 1e-31).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file

import backends
from backends.hf.carriers import BY_ARCH
from backends.torch.model import Decoder
from convert.pipeline import convert
from convert.sources import open_source
from parity_tests import artifacts
from parity_tests.cases import nmse
from parity_tests.family_models import CONTEXT, MODELS, V, float64_logits, save
from spec import Spec, UserError

torch.set_num_threads(1)

LIMIT = 1e-12
Shop = Callable[[str, str], tuple[Any, Path]]
"""A model that may be changed, and its folder, which may not."""
EVERY = [(f, v) for f, variants in MODELS.items() for v in variants]
FIRST = {(f, next(iter(variants))) for f, variants in MODELS.items()}
NAMED = [pytest.param(f, v, id=f"{f}-{v}") for f, v in EVERY]
SLOW_BUT_FIRST = [
    pytest.param(f, v, id=f"{f}-{v}", marks=[] if (f, v) in FIRST else [pytest.mark.slow]) for f, v in EVERY
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Each model made once."""
    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def get(family: str, variant: str) -> tuple[Any, Path]:
        if (family, variant) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{variant}")
            made[family, variant] = save(family, variant, path), path
        model, path = made[family, variant]
        return copy.deepcopy(model), path

    return get


def ids(tokens: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (batch, tokens))


def read(path: Path) -> tuple[Spec, dict[str, np.ndarray]]:
    with open_source(path) as source:
        return source.spec, {name: source.tensor(name) for name in source.names()}


@pytest.mark.parametrize(("family", "variant"), NAMED)
def test_torch_computes_what_transformers_computes(family: str, variant: str, shop: Shop) -> None:
    """A few tokens and several, past the window of 17 and the scalings' boundary at 32."""
    theirs, path = shop(family, variant)
    spec, weights = read(path)
    for tokens in (12, 70, 256):
        ours = Decoder(spec, length=tokens).double().eval()  # tables for the one prefill that transformers sees
        ours.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()})
        want = float64_logits(theirs, ids(tokens, 2))
        with torch.no_grad():
            got = ours(torch.from_numpy(ids(tokens, 2))).numpy()
        assert want.std() > 0.03
        assert nmse(got, want) <= LIMIT
        assert nmse(got[:, -4:], want[:, -4:]) <= 4 * LIMIT


@pytest.mark.parametrize("dtype", ["bf16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("f16", "f32"))])
@pytest.mark.parametrize(("family", "variant"), SLOW_BUT_FIRST)
def test_a_folder_comes_back_byte_for_byte(family: str, variant: str, dtype: str, tmp_path: Path, shop: Shop) -> None:
    """The same names, dtypes and bytes; and a config.json that transformers reads as the same function."""
    names = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    shop(family, variant)[0].to(names[dtype]).save_pretrained(tmp_path / "m")
    if family == "bloom" and dtype != "f32":
        with pytest.raises(UserError, match=f"level: {dtype}, at which transformers' bloom rounds ALiBi biases"):
            convert(tmp_path / "m", "hf", dtype, tmp_path / "out", verify=False)
        return
    result = convert(tmp_path / "m", "hf", dtype, tmp_path / "out", verify=False)
    assert result.support.carrier == family
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("m", "out"))
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    for name, tensor in before.items():
        width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert torch.equal(tensor.view(width), after[name].view(width)), name
    auto: Any = transformers.AutoModelForCausalLM
    a, b = (float64_logits(auto.from_pretrained(tmp_path / d), ids(70)) for d in ("m", "out"))
    assert nmse(a, b) <= 1e-29  # gelu_new and gelu_pytorch_tanh are one function in two orders of operations
    assert read(tmp_path / "out")[0].hash == read(tmp_path / "m")[0].hash


REFUSED = {
    "llama-gelu": "block.mlp.activation",
    "qwen3-biased": "block.attention.qk_norm",
    "qwen3-yarn": "block.attention.qk_norm",
    "granite_swa-nope": "layers[0].attention.position",
    "arcee-biased": "block.mlp.activation",
    "glm-yarn": "block.attention.position.scaling",
    "gemma-untied-biased": "block.mlp.activation",
    "vaultgemma-default": "layers[0].placement",
    "vaultgemma-listed": "head.tied layers[0].placement",
    "gemma2-scalar": "layers[0].attention.scale",
    "gemma2-linear": "layers[0].attention.position.scaling",
    "gemma2-untied": "head.tied",
    "gemma3_text-scalar": "block.attention.scale",
    "gemma3_text-listed": "layers[0].attention.bias.o",
    "glm4-yarn": "block.attention.position.scaling",
    "olmo2-biased": "block.attention.bias.o",
    "olmo2-yarn": "block.attention.position.scaling",
    "olmo3-yarn": "layers[0].attention.position.scaling layers[0].attention.position.theta",
    "exaone4-default": "layers[0].placement layers[3].attention.position",
    "exaone4-no-window": "block.placement",
    "exaone4-listed": "layers[0].attention.position layers[0].placement",
    "gpt2-inner": "block.mlp.activation",
    "opt-plain": "block.mlp.activation",
    "opt-unbiased": "block.mlp.activation",
    "stablelm-yarn": "block.attention.position.scaling",
    "olmo-clip": "block.attention.clip block.mlp.activation",
    "starcoder2-window": "block.attention.window",
    "starcoder2-yarn": "block.attention.position.scaling",
    "gpt_neox-parallel": "block.mlp.activation",
    "gpt_neox-sequential": "block.mlp.activation",
    "gpt_neox-unbiased": "block.mlp.activation",
    "phi-qk-norm": "block.attention.qk_norm",
    "persimmon-plain": "block.attention.qk_norm",
    "persimmon-no-qk-norm": "block.mlp.activation",
    "nemotron-free": "block.attention.head_dim",
    "nemotron-biased": "block.attention.head_dim",
    "nemotron-linear": "block.attention.head_dim",
    "jais2-unbiased": "block.attention.head_dim",
    "jais2-yarn": "block.attention.head_dim block.attention.position.scaling",
    "cohere-biased": "block.attention.bias.o",
    "cohere2-listed": "head.tied",
    "falcon-multi-query": "block.mlp.activation",
    "falcon-multi-query-sequential": "block.mlp.activation",
    "falcon-many-heads": "block.mlp.activation",
    "falcon-many-heads-sequential": "block.mlp.activation",
    "falcon-two-norms": "block.mlp.activation",
    "falcon-one-norm": "block.mlp.activation",
    "falcon-dynamic": "block.mlp.activation",
    "mpt-plain": "block.mlp.activation",
    "mpt-clip": "block.attention.scale block.mlp.activation",
}
"""What llama.cpp does not compute, by the fields that its refusals name; no other target refuses any of these."""


@pytest.mark.parametrize(("family", "variant"), NAMED)
def test_refusals_name_the_field(family: str, variant: str, shop: Shop) -> None:
    spec = read(shop(family, variant)[1])[0]
    for target in ("torch", "gguf", "mlx", "onnx", "coreml", "tensorrt"):
        refusals = backends.support(target, spec, "f32").refusals
        fields = " ".join(sorted({r.split(":")[0] for r in refusals}))
        assert fields == (REFUSED.get(f"{family}-{variant}", "") if target == "gguf" else ""), target


@pytest.mark.parametrize("target", ["gguf", "mlx", "onnx"])
@pytest.mark.parametrize(("family", "variant"), SLOW_BUT_FIRST)
def test_stock_runtimes_compute_what_transformers_computes(
    family: str, variant: str, target: str, tmp_path: Path, shop: Shop
) -> None:
    """At float32, 70 tokens: past the window and the scalings' boundary."""
    pytest.importorskip({"gguf": "llama_cpp", "mlx": "mlx.core", "onnx": "onnxruntime"}[target])
    if target == "gguf" and f"{family}-{variant}" in REFUSED:
        return
    theirs, path = shop(family, variant)
    spec, weights = read(path)
    out = artifacts.write(target, spec, weights, tmp_path / f"a{backends.get(target).suffix}")
    with backends.load(out, target, exact=True, context=CONTEXT) as runtime:
        got = runtime.logits(ids(70, 2))
    table = target == "gguf" and spec.layers[0].mlp.activation == "gelu_tanh"  # llama.cpp looks it up in fp16
    assert nmse(got, float64_logits(theirs, ids(70, 2))) <= (1e-6 if table else 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "falcon", "gemma3_text", "phi3", "cohere2", "smollm3", "bloom"])
def test_a_whole_conversion_is_verified(family: str, tmp_path: Path, shop: Shop) -> None:
    path = shop(family, next(iter(MODELS[family])))[1]
    for target in ("hf", "onnx"):
        result = convert(path, target, "f32", tmp_path / target)
        assert result.report is not None and result.report.ok


def test_every_architecture_that_is_written_is_read() -> None:
    from convert.families.table import FAMILIES

    assert set(FAMILIES) == set(BY_ARCH) and set(MODELS) <= set(FAMILIES)


def test_a_base_models_names_and_buffers_of_older_versions_are_read(tmp_path: Path) -> None:
    """GPT-2's files on the hub lack the prefix and hold masks; GPT-NeoX's hold masks and rotary frequencies."""
    from safetensors.torch import save_file

    for family, prefix, extra in (
        ("gpt2", "transformer.", {"h.0.attn.bias": (1, 1, 8, 8), "h.3.attn.masked_bias": ()}),
        ("gpt_neox", "", {"gpt_neox.layers.1.attention.bias": (1, 1, 8, 8),
                          "gpt_neox.layers.1.attention.masked_bias": (),
                          "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (3,)}),
        ("bloom", "transformer.", {}),
        ("llama", "", {"model.layers.2.self_attn.rotary_emb.inv_freq": (6,)}),
    ):  # fmt: skip
        path = tmp_path / family
        save(family, next(iter(MODELS[family])), path)
        before = read(path)[1]
        file = path / "model.safetensors"
        stored = {n.removeprefix(prefix): t for n, t in load_file(file).items()}
        save_file(stored | {n: torch.ones(shape) for n, shape in extra.items()}, file)
        after = read(path)[1]
        assert all(np.array_equal(before[n], after[n]) for n in before)
        save_file(stored | {"h.0.attn.biases": torch.ones(2)}, file)
        with pytest.raises(UserError, match=r"belongs to nothing in the model: h.0.attn.biases"):
            read(path)


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path: Path) -> None:
    """By the family's own name of its head."""
    from safetensors.torch import save_file

    save("gpt_neox", "unbiased", tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"]
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    embedding = stored["gpt_neox.embed_in.weight"]
    save_file({**stored, "embed_out.weight": embedding.clone()}, file)
    assert "head.weight" not in read(tmp_path / "m")[1]
    save_file({**stored, "embed_out.weight": embedding + 1}, file)
    with pytest.raises(UserError, match=r"embed_out.weight: differs from embed.weight"):
        read(tmp_path / "m")
