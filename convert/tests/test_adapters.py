"""LoRA adapters: merged as PEFT merges them in float64 and rounded once; what does not fit is named, all of it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.sources import Source, open_source
from spec import UserError

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {"vocab_size": 80, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
BODY = {"intermediate_size": 96, "max_position_embeddings": 128, "num_key_value_heads": 1}
FAMILIES: dict[str, Any] = {
    "llama": lambda **k: transformers.LlamaConfig(**SMALL, **BODY, head_dim=12, **k),
    "qwen2": lambda **k: transformers.Qwen2Config(**SMALL, **BODY, **k),
    "phi3": lambda **k: transformers.Phi3Config(**SMALL, **BODY, pad_token_id=0, **k),
    "gpt2": lambda **k: transformers.GPT2Config(vocab_size=80, n_embd=48, n_layer=2, n_head=3, n_positions=128, **k),
}
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"], "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _peft_warns() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own remarks on tied layers and fan_in_fan_out
        yield


def base(folder: Path, family: str, **config: Any) -> Any:
    """A random model in float32, saved; returned in float64."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](**config))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.05 + (p.dim() == 1))
    model.save_pretrained(folder)
    return model.double().eval()


def adapt(model: Any, folder: Path, **config: Any) -> Any:
    """A PEFT model with a random adapter, whose float32 values are saved."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand_like(p))
            elif "lora_" in name or "modules_to_save" in name or (p.requires_grad and "bias" in name):
                p.copy_(torch.randn_like(p) * 0.2)
        for p in adapted.parameters():
            p.copy_(p.float().double())
    adapted.save_pretrained(folder, save_embedding_layers=config.pop("save_embedding_layers", "auto"))
    file = folder / "adapter_model.safetensors"
    save_file({n: w.astype(np.float32) for n, w in load_file(file).items()}, file)
    return adapted


def merged(adapted: Any) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy() for n, p in adapted.merge_and_unload().state_dict().items()}


def outside(source: Source) -> dict[str, np.ndarray]:
    """The source's tensors under their external names."""
    out: dict[str, np.ndarray] = {}
    for bound in source._layout.rules:
        out |= dict(zip(bound.external, bound.apply([source.tensor(p.name) for p in bound.canonical]), strict=True))
    return out


def agree(source: Source, expected: dict[str, np.ndarray]) -> None:
    """Every tensor is the float64 merge rounded to float32; sums in another order may move a tie by one step."""
    moved = 0
    for name, w in outside(source).items():
        want = expected[name].astype(np.float32)
        steps = np.abs(w.view(np.int32).astype(np.int64) - want.view(np.int32))
        assert steps.max(initial=0) <= 1, name
        moved += int((steps > 0).sum())
    assert moved <= 2


CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 7, "use_dora": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merge_is_pefts(tmp_path: Path, family: str, case: str) -> None:
    model = base(tmp_path / "base", family, tie_word_embeddings=family == "qwen2")
    adapted = adapt(model, tmp_path / "lora", target_modules=LINEAR[family], **CASES[case])
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        agree(source, merged(adapted))
        (named,) = source.adapters
        assert named["name"] == "lora" and len(named["sha256"]) == 64
        assert "adapter lora merged in float32" in source.notes


def test_patterns_of_rank_and_alpha(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "llama")
    adapted = adapt(
        model, tmp_path / "lora", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2, r"model\.layers\.\d+\.mlp\.down_proj": 7},
        alpha_pattern={"v_proj": 3, "^model.layers.1.self_attn.q_proj": 32},
    )  # fmt: skip
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        agree(source, merged(adapted))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_biases(tmp_path: Path, family: str, bias: str) -> None:
    model = base(tmp_path / "base", family)
    adapted = adapt(model, tmp_path / "lora", r=2, target_modules=LINEAR[family], bias=bias)
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any(n.endswith(".bias") for n in saved) or bias == "lora_only"
    expected = merged(adapted)
    if not any(n.endswith(".bias") for n in saved):
        original = base(tmp_path / "again", family).state_dict()
        expected |= {n: p.numpy() for n, p in original.items() if n.endswith(".bias")}  # PEFT saved none
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        agree(source, expected)


def test_a_bias_of_the_adapter_itself(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "qwen2")
    adapted = adapt(model, tmp_path / "lora", r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"], lora_bias=True)
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        agree(source, merged(adapted))


def test_whole_modules_and_embeddings(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "llama", tie_word_embeddings=False)
    adapted = adapt(
        model, tmp_path / "lora", r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"]
    )
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        agree(source, merged(adapted))


@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding_of_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dora: bool) -> None:
    monkeypatch.setattr("convert.sources.base.BLOCK", 48 * 7)
    monkeypatch.setattr("convert.sources.lora.BUFFER", 48 * 3)
    model = base(tmp_path / "base", "gpt2", tie_word_embeddings=False)
    adapted = adapt(model, tmp_path / "lora", r=3, target_modules=["wte", "c_attn"], use_dora=dora)
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        agree(source, merged(adapted))


@pytest.mark.parametrize("what", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_a_tied_end_that_an_adapter_changes_is_stored_apart(tmp_path: Path, what: str, how: str) -> None:
    """As it was trained: PEFT's own merge would write a change of one into both."""
    from backends.numpy.model import Oracle

    model = base(tmp_path / "base", "llama", tie_word_embeddings=True)
    given: dict[str, Any] = {"target_modules": ["q_proj"], how: ["q_proj", what] if how == "target_modules" else [what]}
    adapted = adapt(model, tmp_path / "lora", r=2, **given)
    ids = torch.arange(40)[None] % 80
    with torch.no_grad():
        expected = adapted(ids).logits.numpy()
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        assert not source.spec.head.tied
        assert any("stored apart" in note for note in source.notes)
        got = Oracle(source.spec, {n: source.tensor(n) for n in source.names()}, np.float64).logits(ids.numpy())
    assert np.square(got - expected).mean() / np.square(expected).mean() < 1e-12


def test_several_adapters_in_turn(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "llama")
    first = adapt(model, tmp_path / "a", r=2, target_modules=["q_proj"]).merge_and_unload()
    with torch.no_grad():
        for p in first.parameters():
            p.copy_(p.float().double())
    adapted = adapt(first, tmp_path / "b", r=3, target_modules=["q_proj", "o_proj"])
    with open_source(tmp_path / "base", [tmp_path / "a", tmp_path / "b"]) as source:
        agree(source, merged(adapted))
        assert [a["name"] for a in source.adapters] == ["a", "b"]


def test_bin_adapters_and_sixteen_bits(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "llama")
    adapt(model, tmp_path / "lora", r=2, target_modules=["q_proj"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    state = {n: torch.from_numpy(w).bfloat16() for n, w in load_file(file).items()}
    torch.save(state, tmp_path / "lora" / "adapter_model.bin")
    save_file({n: t.float().numpy() for n, t in state.items()}, file)
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        from_safetensors = source.tensor("layers.1.attn.q.weight")
    file.unlink()
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        np.testing.assert_array_equal(source.tensor("layers.1.attn.q.weight"), from_safetensors)


def test_a_mixture_whose_experts_an_adapter_leaves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "qwen3_moe", lambda **k: transformers.Qwen3MoeConfig(
        **SMALL, **BODY, head_dim=12, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=[0], **k,
    ))  # fmt: skip
    model = base(tmp_path / "base", "qwen3_moe")
    adapted = adapt(model, tmp_path / "lora", r=2, target_modules=["q_proj", "o_proj"])
    expected = merged(adapted)
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        for name in ("layers.0.attn.q.weight", "layers.1.attn.q.weight", "layers.1.attn.o.weight"):
            (inside,) = source._layout.of[name].external
            np.testing.assert_array_equal(source.tensor(name), expected[inside].astype(np.float32))
        assert source.tensor("layers.1.mlp.experts.up.weight").shape == (4 * 24, 48)


def test_blocks_do_not_change_the_sums(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "llama")
    adapt(model, tmp_path / "lora", r=4, target_modules=LINEAR["llama"], use_dora=True)
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source:
        whole = source.tensor("layers.0.mlp.down.weight")
        parts = np.concatenate([b for _, b in source.blocks("layers.0.mlp.down.weight", rows=5)])
    np.testing.assert_array_equal(whole, parts)


def test_a_norm_of_nothing_is_found_while_streaming(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "llama")
    adapt(model, tmp_path / "lora", r=2, target_modules=["q_proj"], use_dora=True)
    for folder, name in (("base", "model"), ("lora", "adapter_model")):
        file = tmp_path / folder / f"{name}.safetensors"
        w = {n: v.copy() for n, v in load_file(file).items()}
        for n in w:
            if "layers.1.self_attn.q_proj" in n and "magnitude" not in n:
                w[n][:] = 0
        save_file(w, file, {"format": "pt"})
    with open_source(tmp_path / "base", [tmp_path / "lora"]) as source, pytest.raises(UserError, match="nan at row 0"):
        source.tensor("layers.1.attn.q.weight")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    model = base(tmp_path / "base", "llama")
    adapt(model, tmp_path / "lora", r=2, target_modules=["q_proj", "v_proj"])
    return tmp_path / "base", tmp_path / "lora"


def config(lora: Path, **changes: Any) -> None:
    file = lora / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is no LoRA"),
        ({"use_qalora": True}, "use_qalora: True changes what the adapter computes"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters.*; merge it with PEFT's merge_and_unload"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"magic": 1}, "magic is an unknown key"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"r": 0}, "r: 0 is no rank"),
        ({"lora_alpha": None}, "lora_alpha: None is no number"),
        ({"lora_alpha": 10**400}, "1000.* is no number that a float holds"),
        ({"use_dora": 1}, "use_dora: 1 is no bool"),
        ({"modules_to_save": 5}, "modules_to_save: 5 is no list"),
        ({"target_modules": {"a": 1}}, "target_modules: .* is no list or str"),
        ({"rank_pattern": [1]}, "rank_pattern: is no mapping"),
        ({"rank_pattern": {"(a+)+b": 2}}, "no pattern that is read"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern: q_proj: x is no number"),
        ({"r": 5}, "self_attn.q_proj: rank 2, adapter_config.json says 5"),
        ({"use_dora": True}, "has no lora_magnitude_vector, and use_dora is true"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"2 modules are among target_modules, .*o_proj"),
        ({"modules_to_save": ["lm_head"]}, r"1 module is among modules_to_save"),
    ],
)  # fmt: skip
def test_what_an_adapter_says_is_read_or_refused(folders: tuple[Path, Path], changes: Any, says: str) -> None:
    source, lora = folders
    config(lora, **changes)
    with pytest.raises(UserError, match=says):
        open_source(source, [lora])


def test_every_tensor_that_does_not_fit_is_named(folders: tuple[Path, Path]) -> None:
    source, lora = folders
    file = lora / "adapter_model.safetensors"
    w = dict(load_file(file))
    at = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    del w[at.format(0, "q_proj", "A")]
    w[at.format(1, "q_proj", "B")] = np.zeros((99, 2), np.float32)
    w[at.format(7, "q_proj", "B")] = np.zeros((36, 2), np.float32)
    w["base_model.model.model.layers.0.mlp.experts.lora_A.weight"] = np.zeros((2, 48), np.float32)
    w["odd"] = np.zeros(3, np.float32)
    w[at.format(1, "v_proj", "A")] = w[at.format(1, "v_proj", "A")].astype(np.float64)
    save_file(w, file)
    with pytest.raises(UserError) as e:
        open_source(source, [lora])
    text = str(e.value)
    assert all(line.startswith(f"--adapter {lora}: ") for line in text.splitlines())
    for part in ("3 tensors belong to no module", "layers.7", "experts", "odd", "its other half (lora_A) is missing",
                 "[99, 2] and [2, 48]", "F64"):  # fmt: skip
        assert part in text, part


def test_folders_that_are_no_adapter(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, lora = folders
    with pytest.raises(UserError, match=r"--adapter .*nowhere: no such folder"):
        open_source(source, [tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"no adapter_config.json in it"):
        open_source(source, [source])
    with pytest.raises(UserError, match=r"an adapter is no model: convert its base model with --adapter"):
        open_source(lora)
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        open_source(source, [lora])
