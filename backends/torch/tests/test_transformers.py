"""The decoder as a transformers model: configuration, folders, vocabulary, initialisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.torch.checkpoint import load_decoder
from backends.torch.model import Decoder
from parity_tests.cases import FEATURES, random_ids, random_weights
from parity_tests.checkpoints import write_checkpoint
from spec import Spec, SpecError, UserError, load, parse
from spec.config import merge
from spec.load import dump

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from backends.torch.transformers import AllotropeConfig, AllotropeForCausalLM
from backends.torch.transformers.model import one_accelerator

torch.set_num_threads(1)

SINKS_AND_SLOPES = parse(merge(FEATURES["alibi"].model_dump(mode="json", exclude_unset=True),
                               {"block": {"attention": {"sinks": True}}}), "both")  # fmt: skip
NAMES = ("llama", "tied", "head_bias", "learned", "rope_longrope", "local_theta", "moe", "moe_sigmoid")
LOADED: dict[str, Spec] = {name: FEATURES[name] for name in NAMES} | {"both": SINKS_AND_SLOPES}


def build(spec: Spec) -> Any:
    model = AllotropeForCausalLM(AllotropeConfig(spec=spec))
    model.load_state_dict({name: torch.from_numpy(w) for name, w in random_weights(spec).items()})
    return model.eval()


def ids(spec: Spec) -> torch.Tensor:
    return torch.from_numpy(random_ids(spec, 2, 12))


def same(a: Any, b: Any) -> None:
    """Two models agree bit for bit in names, parameters, constants and what is trained."""
    assert list(a.state_dict()) == list(b.state_dict())
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q) and p.requires_grad == q.requires_grad, name
    for (name, p), (other, q) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        assert name == other and torch.equal(p, q) and p.dtype == q.dtype, name


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal weights elsewhere in memory: matrix products round by their alignment."""
    return bool((a - b).abs().max() < 1e-4)


@pytest.mark.parametrize("name", LOADED)
@pytest.mark.parametrize("shard", ["50GB", "30KB"])
def test_a_saved_folder_comes_back_bit_for_bit_and_is_our_checkpoint(tmp_path: Path, name: str, shard: str) -> None:
    model = build(LOADED[name])
    model.save_pretrained(tmp_path, max_shard_size=shard)
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(model, back)
    x = ids(LOADED[name])
    with torch.no_grad():
        assert close(model(x).logits, back(x).logits)
        assert close(load_decoder(tmp_path)(x), model(x).logits)
    assert load(tmp_path) == model.spec == AutoConfig.from_pretrained(tmp_path).parsed  # pyright: ignore[reportAttributeAccessIssue]
    assert (tmp_path / "model.safetensors").is_file() == (shard == "50GB")


def test_constants_stay_float32_in_a_16_bit_model(tmp_path: Path) -> None:
    model = build(SINKS_AND_SLOPES)
    model.save_pretrained(tmp_path)
    back: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    made: Any = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    for half in (back, made, model.bfloat16()):
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert {b.dtype for b in half.buffers()} == {torch.float32}
    same(model.bfloat16(), back)
    back.save_pretrained(tmp_path / "half")
    same(back, AutoModelForCausalLM.from_pretrained(tmp_path / "half"))


def test_a_training_runs_folder_is_read_as_it_is(tmp_path: Path) -> None:
    """No config.json; the ids that end a text are the tokenizer's."""
    spec = parse(merge(FEATURES["tied"].model_dump(mode="json", exclude_unset=True), {"vocab_size": 384}), "run")
    write_checkpoint(tmp_path, spec)
    model = AllotropeForCausalLM.from_pretrained(tmp_path)
    x = ids(spec)
    with torch.no_grad():
        assert close(model(x).logits, load_decoder(tmp_path)(x))
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    assert model.generation_config.eos_token_id == 1
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["llama", "tied", "head_bias", "moe"])
def test_offloaded_layers_compute_the_same(tmp_path: Path, name: str) -> None:
    pytest.importorskip("accelerate")
    model = build(FEATURES[name])
    model.save_pretrained(tmp_path)
    places = dict.fromkeys(("embed", "layers.0", "final_norm", "head", "rope"), "cpu") | {"layers.1": "disk"}
    x = ids(model.spec)
    with torch.no_grad():
        back: Any = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "o")
        assert close(back(x).logits, model(x).logits)
        places["embed"] = "disk"
        back = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "p")
        if model.spec.head.tied:
            with pytest.raises(UserError, match="the head is tied to embed, which is offloaded"):
                back(x)
        else:
            assert close(back(x).logits, model(x).logits)


def test_layers_on_several_accelerators_are_refused() -> None:
    one_accelerator({"embed": "cuda:0", "layers.0": torch.device("cuda", 0), "layers.1": "cpu", "head": "disk"})
    with pytest.raises(UserError, match="layers lie on cuda:0, cuda:1; use one"):
        one_accelerator({"embed": "cuda:0", "layers": "cuda:1"})


def test_new_weights_are_the_specs_and_follow_torchs_seed() -> None:
    spec = parse(merge(FEATURES["rms_offset"].model_dump(mode="json", exclude_unset=True), {
        "width": 128, "depth": 4, "init": {"std": 0.05, "embed_std": 0.3, "depth_scaled": True},
        "block": {"attention": {"bias": True, "sinks": True}},
    }), "init")  # fmt: skip
    torch.manual_seed(5)
    model, other = (AllotropeForCausalLM(AllotropeConfig(spec=spec)) for _ in range(2))
    torch.manual_seed(5)
    same(model, AllotropeForCausalLM(AllotropeConfig(spec=spec)))
    ours = Decoder(spec)
    ours.init_weights(0)
    for (name, p), q in zip(model.named_parameters(), ours.parameters(), strict=True):
        assert abs(p.mean() - q.mean()) < 0.15 * p.std() + 1e-9 and abs(p.std() - q.std()) <= 0.05 * q.std(), name
        assert p.std() == 0 or not torch.equal(p, dict(other.named_parameters())[name])


@pytest.mark.parametrize("name", ["llama", "tied", "head_bias"])
def test_another_vocabulary_size_is_another_spec(tmp_path: Path, name: str) -> None:
    model = build(FEATURES[name])
    x = ids(model.spec)
    with torch.no_grad():
        before = model(x).logits
        assert model.resize_token_embeddings() is model.embed
        model.resize_token_embeddings(100, pad_to_multiple_of=8)
        grown = model(x).logits
        assert close(grown[..., :97], before) and grown.shape[-1] == model.config.vocab_size == 104
        mean = model.head.weight[:97].mean(0)
        assert torch.allclose(model.head.weight[97:], mean.expand(7, -1), atol=1e-7)
        model.save_pretrained(tmp_path)
        back: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        same(model, back)
        assert load(tmp_path).vocab_size == 104 and close(back(x).logits, grown)
        model.resize_token_embeddings(97)
        assert close(model(x).logits, before)
        model.resize_token_embeddings(200, mean_resizing=False)
        assert abs(model.embed.weight[97:].std() - model.spec.init.std) < 0.002


def test_a_folder_that_does_not_fit_its_spec_is_refused_with_every_tensor(tmp_path: Path) -> None:
    build(FEATURES["llama"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["layers.9.attn.q.weight"] = tensors.pop("layers.1.attn.q.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as refused:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "layers.1.attn.q.weight: missing" in str(refused.value)
    assert "layers.9.attn.q.weight: the spec has no such tensor" in str(refused.value)


def test_two_specs_in_one_folder_are_refused(tmp_path: Path) -> None:
    build(FEATURES["llama"]).save_pretrained(tmp_path)
    (tmp_path / "spec.yaml").write_text(dump(FEATURES["rms_eps"]))
    with pytest.raises(UserError, match="hold two specs"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_configuration_is_the_spec_and_what_follows_from_it() -> None:
    config = AllotropeConfig(spec=FEATURES["gemma2"])
    data = json.loads(config.to_json_string())
    assert parse(data["spec"], "data") == FEATURES["gemma2"]
    follows = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
               "num_key_value_heads": 2, "max_position_embeddings": 48, "tie_word_embeddings": True,
               "final_logit_softcapping": 30.0}  # fmt: skip
    assert {k: data[k] for k in follows} == follows == {k: getattr(config, k) for k in follows}
    assert AllotropeConfig.from_dict(data).to_dict() == config.to_dict()
    assert AllotropeConfig(spec="nano").hidden_size == load("nano").width


def test_layers_that_differ_have_no_common_number_of_heads() -> None:
    spec = parse(merge(FEATURES["llama"].model_dump(mode="json", exclude_unset=True),
                       {"overrides": {"-1": {"attention": {"heads": 2, "head_dim": 8}}}}), "uneven")  # fmt: skip
    model = build(spec)
    assert not hasattr(model.config, "num_attention_heads") and "num_attention_heads" not in model.config.to_dict()
    assert model.generate(ids(spec), max_new_tokens=3, pad_token_id=0).shape == (2, 15)


def test_a_broken_configuration_is_named() -> None:
    with pytest.raises(SpecError, match=r"config.json: widht: is not a field \(did you mean width\?\)"):
        AllotropeConfig(spec={**AllotropeConfig(spec="nano").spec, "widht": 3})
    with pytest.raises(UserError, match="hidden_size: 3 is not what the spec says, 32"):
        AllotropeConfig.from_dict({"spec": AllotropeConfig(spec=FEATURES["llama"]).spec, "hidden_size": 3})
    with pytest.raises(UserError, match="spec: missing"):
        AllotropeForCausalLM(AllotropeConfig())


def test_kernels_are_ours(tmp_path: Path) -> None:
    model = build(FEATURES["window"])
    model.save_pretrained(tmp_path)
    x = ids(model.spec)
    with torch.no_grad():
        for name in ("eager", "sdpa", "flex_attention"):
            back: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
            assert torch.allclose(back(x).logits, model(x).logits, atol=1e-4)
    with pytest.raises(ValueError, match="does not support Flash Attention 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
