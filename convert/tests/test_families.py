"""Hugging Face families: the spec that is read computes transformers' float64 logits; unknown keys are errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.numpy.model import Oracle
from convert.families import read
from convert.sources import open_source
from convert.tests.conftest import LLAMA
from spec import SpecError, UserError
from spec.rope import rope_tables

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [2.0 + i for i in range(8)]}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("Llama", {"head_dim": 32, "num_key_value_heads": 4}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
    "llama-theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-llama3": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 5e5}}),
    "llama-yarn": ("Llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
        "beta_fast": 16.0}}),
    "llama-yarn-mscale": ("Llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
        "mscale": 0.7, "mscale_all_dim": 1.0}}),
    "llama-longrope": ("Llama", {"rope_parameters": {
        "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, **LONG}}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-layer-types": ("Qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
}  # fmt: skip


def transformers_model(name: str, config: dict[str, Any]) -> Any:
    """A random float32 model whose norms and biases matter."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES | config))
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.normal_(1.0 if "norm" in n else 0.0, 0.15)
    return model


def float64_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """transformers in float64, except for its rotary tables, which it keeps in float32."""
    import torch

    model = model.double().eval()
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_the_spec_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    model = transformers_model(name, config)
    model.save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(1).integers(0, 96, (2, 40))
    with open_source(tmp_path / "model") as source:
        assert source.spec.context == 64
        # tables that depend on the length are chosen for the one prefill that transformers sees
        got = Oracle(source.spec, source.tensor, length=40).logits(ids)
    expected = float64_logits(model, ids)
    nmse = np.sum((got - expected) ** 2) / np.sum(expected**2)
    assert nmse < 1e-12


OLD_LAYOUT: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 64}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "longrope": {"rope_scaling": {"type": "su", "factor": 4.0, **LONG}, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", OLD_LAYOUT)
def test_both_config_layouts_mean_the_same(kind: str) -> None:
    old = {**LLAMA, **OLD_LAYOUT[kind], "rope_theta": 5e5}
    scaling = {k: v for k, v in old["rope_scaling"].items() if k != "type"}
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta", "original_max_position_embeddings")}
    new["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": 5e5}
    if "original_max_position_embeddings" in old:
        new["rope_parameters"]["original_max_position_embeddings"] = 32
    a, b = (read(c, "config.json").spec for c in (old, new))
    assert a.hash == b.hash
    position: Any = a.layers[0].attention.position
    assert position.theta == 5e5 and position.scaling.kind == kind


def problems(**changes: Any) -> list[str]:
    data = {k: v for k, v in {**LLAMA, **changes}.items() if v != "absent"}
    with pytest.raises(UserError) as e:
        read(data, "config.json")
    return [line.removeprefix("config.json: ") for line in str(e.value).splitlines()]


def test_every_unknown_and_wrong_key_is_named_at_once() -> None:
    found = problems(residual_multiplier=0.2, head_dimm=16, hidden_size="absent", rms_norm_eps="tiny", mlp_bias=1)
    assert found == [
        "rms_norm_eps: 'tiny' is no int or float (correct config.json)",
        "mlp_bias: 1 is no bool (correct config.json)",
        "hidden_size: is missing (config.json has to say it)",
        "residual_multiplier: 0.2 is an unknown key, and unknown keys may change the function",
        "head_dimm: 16 is an unknown key, and unknown keys may change the function (did you mean head_dim?)",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config: .* changes the function and is not supported"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map: .* changes the function"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is another function than LlamaForCausalLM"),
        ({"hidden_act": "mish"}, "hidden_act: 'mish' is no activation that is read"),
        ({"rope_scaling": {"type": "spiral", "factor": 2}}, "rope_scaling.rope_type: 'spiral' is no scaling"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "alpha": 1}}, "rope_scaling.alpha: 1 is an unknown key"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor: '2' is no positive number"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}, "differ"),
        ({"num_key_value_heads": 3}, "kv_heads: 3 does not divide heads=4"),
        ({"num_hidden_layers": 0}, "depth: 0 "),
    ],
)
def test_what_changes_the_function_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    import re

    assert any(re.search(says, line) for line in problems(**changes)), problems(**changes)


def test_an_unread_family_names_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "qwen4"}))
    with pytest.raises(UserError, match=r"'qwen4' is no family .*did you mean qwen3\?; known: arcee, .* vaultgemma\)$"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"a": 1', "\x00"])
def test_a_damaged_config_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json: not") as e:
        open_source(tmp_path)
    assert "\n" not in str(e.value)


def test_bookkeeping_keys_are_ignored(huggingface: Callable[..., Path]) -> None:
    folder = huggingface(transformers_version="9", use_cache=False, bos_token_id=1, pretraining_tp=2, is_decoder=True)
    with open_source(folder) as source:
        assert source.spec.width == 64


def test_a_spec_error_is_a_spec_error() -> None:
    with pytest.raises(SpecError):
        read({**LLAMA, "vocab_size": 0}, "config.json")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.sampled_from([0, -1, 1e308, "yarn", "longrope", {}, {"rope_type": "yarn"}, {"full_attention": {}}]),
)  # fmt: skip
NUMBERS = (
    "factor", "original_max_position_embeddings", "attention_factor", "low_freq_factor", "high_freq_factor",
    "short_factor", "long_factor", "mscale", "mscale_all_dim", "beta_fast", "truncate", "rope_theta",
    "partial_rotary_factor",
)  # fmt: skip
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "dynamic", "llama3", "yarn", "longrope", "default", 3])},
    optional=dict.fromkeys(NUMBERS, VALUES),
)


@given(
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    changes=st.dictionaries(
        st.sampled_from([*LLAMA, "head_dim", "sliding_window", "layer_types", "use_sliding_window", "rope_scaling"]),
        VALUES, max_size=3),
    rope=st.none() | ROPE,
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_config_is_a_spec_or_a_user_error(kind: str, changes: dict[str, Any], rope: Any) -> None:
    settings = {"rope_parameters": rope} if rope else {}
    config = {**LLAMA, "model_type": kind, "architectures": None, **settings, **changes}
    try:
        spec = read(config, "config.json").spec
    except UserError:
        return
    rope_tables(spec)
