"""Hugging Face families: the spec that is read computes transformers' float64 logits; unknown keys are errors."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.hf.carriers import KEYS
from backends.hf.config import config
from backends.hf.fit import examine
from backends.numpy.model import Oracle
from convert.families import Config, Family, read, reader
from convert.families.table import FAMILIES, ROWS
from convert.sources import open_source
from convert.tests import published_mixtures
from convert.tests.conftest import LLAMA
from convert.tests.published_configs import PUBLISHED as DENSE
from spec import SpecError, UserError
from spec.rope import rope_tables

PUBLISHED = {**DENSE, **published_mixtures.MIXTURES}
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
    "longrope": {"rope_scaling": {"type": "su", "factor": 4.0, "original_max_position_embeddings": 32, **LONG}},
}  # fmt: skip


@pytest.mark.parametrize("kind", OLD_LAYOUT)
def test_both_config_layouts_mean_the_same(kind: str) -> None:
    old = {**LLAMA, **OLD_LAYOUT[kind], "rope_theta": 5e5}
    scaling = {k: v for k, v in old["rope_scaling"].items() if k != "type"}
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": 5e5}
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
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map.AutoModel: 'x.py' names code .* .remove auto_map if"),
        ({"auto_map": {"AutoModel": "x.LlamaModelPlus"}}, "auto_map.AutoModel: 'x.LlamaModelPlus' names code"),
        ({"auto_map": {"AutoTokenizer": ["x.LlamaTokenizer", None]}}, "auto_map.AutoTokenizer: .* names code"),
        ({"auto_map": ["x.LlamaModel"]}, "auto_map: .* is no mapping"),
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
    with pytest.raises(UserError, match=r"'qwen4' is no family .*did you mean qwen3\?.*\n.*: arcee, .* vaultgemma$"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"a": 1', "\x00"])
def test_a_damaged_config_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json: not") as e:
        open_source(tmp_path)
    assert "\n" not in str(e.value)


def test_a_missing_context_is_asked_for_by_its_meaning() -> None:
    """transformers saves BLOOM without one."""
    data = {k: v for k, v in PUBLISHED["bloom-560m"].items() if k != "seq_length"}
    with pytest.raises(UserError, match=r"seq_length: is missing \(.*: the context length in tokens, such as 2048\)$"):
        read(data, "config.json")


def test_bookkeeping_keys_are_ignored(huggingface: Callable[..., Path]) -> None:
    folder = huggingface(transformers_version="9", use_cache=False, bos_token_id=1, pretraining_tp=2, is_decoder=True)
    with open_source(folder) as source:
        assert source.spec.width == 64


@pytest.mark.parametrize("name", FAMILIES)
def test_remote_code_by_the_names_of_transformers_own_classes_is_accepted(name: str) -> None:
    """Of each family alike, and of any class whose name goes on otherwise it is refused."""
    pytest.importorskip("transformers")
    from transformers.models.auto import configuration_auto, modeling_auto

    f = FAMILIES[name]
    own = {
        "AutoConfig": configuration_auto.CONFIG_MAPPING[name].__name__,
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES.get(name),
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name),
        "AutoModelForSequenceClassification":
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(name),
    }  # fmt: skip
    for auto, cls in own.items():
        for named, fine in ((cls, True), (f"owner/repo--modeling.{cls}", True), (f"modeling.{cls}Plus", False)):
            c = Config({"auto_map": {auto: named}}, "config.json", f)
            if cls is not None and not fine:
                with pytest.raises(SpecError, match=rf"auto_map.{auto}: 'modeling.{cls}Plus' names code"):
                    c.done()
            elif cls is not None:
                c.done()


def test_remote_code_that_is_not_run_is_noted(huggingface: Callable[..., Path]) -> None:
    folder = huggingface(auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    with open_source(folder) as source:
        assert "the folder's own code (auto_map) is not run: read as LlamaForCausalLM" in source.notes


def test_a_spec_error_is_a_spec_error() -> None:
    with pytest.raises(SpecError):
        read({**LLAMA, "vocab_size": 0}, "config.json")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.sampled_from([0, -1, 1e308, "yarn", "longrope", {}, {"rope_type": "yarn"}, {"full_attention": {}}]),
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("name", PUBLISHED)


@CONFIGS
def test_published_configs_are_read_as_transformers_reads_them(name: str) -> None:
    """What transformers makes of an older layout, in its own present one, is the same spec."""
    transformers = pytest.importorskip("transformers")
    data = PUBLISHED[name]
    kept = copy.deepcopy({k: v for k, v in data.items() if k not in ("auto_map", "architectures")})
    if (kept.get("rope_scaling") or {}).get("type") == "su":
        kept["rope_scaling"]["type"] = "longrope"  # 5.23 renames it too late to find the original context
    theirs = transformers.CONFIG_MAPPING[data["model_type"]].from_dict(kept).to_dict()
    assert read({**theirs, "architectures": None}, "config.json").spec.hash == read(data, "config.json").spec.hash


@CONFIGS
def test_what_is_read_is_written_as_the_same_spec(name: str) -> None:
    """Both directions are one table."""
    found = read(PUBLISHED[name], "config.json")
    assert examine(found.spec, found.row).refusals == ()
    written = config(found.spec, found.row, "float32", None)
    assert read(written, "config.json").spec.hash == found.spec.hash


@CONFIGS
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_key_of_a_published_config_may_be_anything(name: str, data: st.DataObject) -> None:
    """A spec or one clear error; and a key that is not known is named."""
    keys = st.sampled_from(sorted({*PUBLISHED[name], "unheard_of"} - {"model_type"}))
    changed = {**PUBLISHED[name], **data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=3))}
    said = ""
    try:
        rope_tables(read(changed, "config.json").spec)
    except UserError as e:
        said = str(e)
    assert "unheard_of" not in changed or "unheard_of: " in said or "architectures: " in said


@pytest.mark.parametrize("f", ROWS, ids=lambda f: f.name)
def test_defaults_are_those_of_transformers(f: Family) -> None:
    """Every value that is filled in where config.json is silent, and nothing else."""
    transformers = pytest.importorskip("transformers")
    kind = transformers.CONFIG_MAPPING[f.name]
    said, whole = _declared(kind), kind()
    c = Config(whole.to_dict() | {"vocab_size": 96}, "config.json", f)
    f.tidy(c)
    reader.read(c, reader.choose(c))
    for key in c.taken & set(f.defaults):
        ours = f.defaults[key]
        outer, _, inner = key.rpartition(".")
        if key in ("rope_theta", "partial_rotary_factor", "rotary_emb_base", "rotary_pct", "rope_local_base_freq"):
            continue  # below, as they come out
        if outer:
            assert getattr(getattr(whole, outer), inner) == ours, key
        elif key in said:
            assert said[key] == ours, key
        else:
            assert ours in (None, 1.0) or getattr(whole, key, ours) == ours, key
    silent = _smallest(f)
    loud = kind.from_dict(copy.deepcopy(silent)).to_dict() | {"architectures": None}
    assert read(silent, "config.json").spec.hash == read(loud, "config.json").spec.hash


def _declared(kind: Any) -> dict[str, Any]:
    """Defaults as a config class declares them, before it fills any in."""
    return {f.name: f.default for f in dataclasses.fields(kind)}


def _smallest(f: Family) -> dict[str, Any]:
    """A config.json that says nothing but sizes."""
    keys = {**KEYS, **f.carriers[0].keys}
    sizes = {"width": 2560, "depth": 9, "heads": 160, "hidden": 96, "context": 64}
    out = {"model_type": f.name, "vocab_size": 96, **{keys[n]: v for n, v in sizes.items() if keys[n]}}
    if (m := f.carriers[0].mixture) is not None:
        out |= {m.experts: 6, m.top_k: 2, m.hidden: 96}
        out |= {m.shared_hidden: 1} if m.shared == "required" and f.defaults.get(m.shared_hidden) is None else {}
    return out


@pytest.mark.parametrize("f", ROWS, ids=lambda f: f.name)
def test_every_key_of_a_familys_own_config_class_has_a_place(f: Family) -> None:
    transformers = pytest.importorskip("transformers")
    whole = transformers.CONFIG_MAPPING[f.name](**{k: v for k, v in _smallest(f).items() if k != "model_type"})
    assert read({**whole.to_dict(), "architectures": [f.architecture]}, "config.json").family is f
    wrong = {**whole.to_dict(), "architectures": None, "unheard_of": 1}
    with pytest.raises(UserError, match="unheard_of: 1 is an unknown key"):
        read(wrong, "config.json")


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    **published_mixtures.REFUSALS,
    "alibi": ("falcon-7b", {"alibi": True}, r"alibi: True changes the function .*supported: False"),
    "falcon-post-norm": ("falcon-7b", {"apply_residual_connection_post_layernorm": True}, "changes the function"),
    "qk-norm-by-head": ("command-r", {"use_qk_norm": True}, r"use_qk_norm: True changes the function"),
    "stablelm-qk-norm": ("stablelm-2", {"qk_layernorm": True}, r"qk_layernorm: True changes the function"),
    "layer-scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, r"inverse_layer_idx: True changes"),
    "unscaled": ("gpt2", {"scale_attn_weights": False}, r"scale_attn_weights: False changes"),
    "cross-attention": ("gpt2", {"add_cross_attention": True}, r"add_cross_attention: True changes"),
    "bidirectional": ("gemma-2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention: True changes"),
    "projected": ("opt", {"word_embed_proj_dim": 512}, r"word_embed_proj_dim: 512 differs from hidden_size, 768"),
    "post-norm": ("opt", {"do_layer_norm_before": False}, r"do_layer_norm_before: False changes the function"),
    "no-final-norm": ("opt", {"_remove_final_layer_norm": True}, r"_remove_final_layer_norm: True changes"),
    "biased-mpt": ("mpt-7b", {"no_bias": False}, r"no_bias: False changes the function"),
    "mpt-learned": ("mpt-7b", {"attn_config": {"alibi": False}}, r"attn_config.alibi: False changes the function"),
    "mpt-norms": ("mpt-7b", {"attn_config": {"qk_ln": True}}, r"attn_config.qk_ln: True changes the function"),
    "mpt-unknown": ("mpt-7b", {"attn_config": {"softcap": 1}}, r"attn_config.softcap: 1 is an unknown key"),
    "mpt-wrong": ("mpt-7b", {"attn_config": 3}, r"attn_config: 3 is no mapping"),
    "biased-phi": ("phi-4-mini", {"lm_head_bias": True}, r"lm_head_bias: True changes the function"),
    "phi3-linear": ("phi-4-mini", {"rope_scaling": {"type": "linear", "factor": 2.0}},
                    r"rope_scaling.rope_type: 'linear' is no scaling of phi3"),
    "whole-heads": ("llama-2", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor: 0.5 is not used by llama"),
    "two-activations": ("gemma", {"hidden_act": "silu", "hidden_activation": "relu"},
                        r"hidden_activation: 'relu' differs from hidden_act, silu"),
    "olmo3-theta": ("gemma-2", {"model_type": "olmo3", "architectures": None, "rope_theta": 1e4},
                    r"rope_theta: 10000.0 holds for all layers in transformers 4, and for some in 5"),
    "layer-types": ("exaone-4", {"layer_types": ["chunked_attention"] * 4}, r"layer_types: 'chunked_attention' does"),
    "too-few": ("exaone-4", {"layer_types": ["full_attention"]}, r"layer_types: '1 entries' does not describe"),
    "nope": ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers: \[1, 0\] does not describe the layers"),
    "no-window": ("gemma-2", {"sliding_window": None}, r"sliding_window: is missing, and layer_types names"),
    "by-layer": ("llama-2", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "by layer type"),
    "original": ("llama-2", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
                 r"original_max_position_embeddings: 32 is read by transformers 4 here, and not by 5"),
    "originals": ("llama-3.2", {"original_max_position_embeddings": 32}, r"and rope_scaling's differ"),
    "flat": ("gemma-3-1b", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": None},
             r"rope_parameters: has no settings by kind of layer, which gemma3_text reads alone"),
    "switch": ("smollm3", {"layer_types": ["sliding_attention"] * 8, "sliding_window": 8},
               r"use_sliding_window: False contradicts layer_types"),
    "olmo3-local": ("gemma-2", {"model_type": "olmo3", "architectures": None, "rope_local_base_freq": 1e4},
                    r"rope_local_base_freq: 10000.0 is an unknown key"),
    "by-unknown": ("gemma-3-1b", {"rope_parameters": {"full_attention": {}, "chunked": {}}},
                   r"chunked: .* unknown kind"),
    "truncate": ("gemma-3-1b", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}},
                 r"rope_scaling.truncate: False is not read"),
    "other-code": ("phi-3-mini-128k", {"auto_map": {"AutoModelForCausalLM": "modeling.MyModel"}},
                   "auto_map.AutoModelForCausalLM: 'modeling.MyModel' names code of the folder's own"),
    "classes": ("gpt2", {"architectures": ["GPT2DoubleHeadsModel"]}, "is another function than GPT2LMHeadModel"),
    "scalar": ("gemma-2", {"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar: 0 must be positive"),
    "head-size": ("command-r7b", {"head_dim": 64}, r"head_dim: 64 differs from hidden_size .*, 128 "),
    "both-names": ("bloom-560m", {"n_head": 8}, r"num_attention_heads: 16 is an unknown key"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_options_that_are_not_carried_are_refused_by_key_and_value(case: str) -> None:
    import re

    name, changes, says = REFUSALS[case]
    with pytest.raises(UserError) as e:
        read({**PUBLISHED[name], **changes}, "config.json")
    assert re.search(says, str(e.value)), str(e.value)


def test_an_unread_family_says_what_the_nearest_could_not_place() -> None:
    data = {**PUBLISHED["qwen3"], "model_type": "qwen9", "linear_conv_kernel_dim": 4}
    with pytest.raises(UserError, match=r"mean qwen3\?\); of its keys, qwen3, the nearest, has no place for "
                                        r"linear_conv_kernel_dim\n"):  # fmt: skip
        read(data, "config.json")


@pytest.mark.parametrize(
    ("model_type", "inner", "says"),
    [
        ("gemma3", {"model_type": "gemma3_text"}, "text model is read from a folder of its own: gemma3_text"),
        ("gemma3", {}, "text model is read from a folder of its own: gemma3_text"),
        ("llava", {"model_type": "llama"}, "text model is read from a folder of its own: llama"),
        ("qwen2_vl", {"model_type": "qwen2_vl_text"}, r"none that is read \(the nearest is qwen2\)"),
        ("qwen2_vl", None, r"none that is read \(the nearest is qwen2\)"),
        ("qwen3_5_moe", {"model_type": "qwen3_5_moe_text"}, "some of its layers are no attention"),
        ("new", {"model_type": "llama4_text"}, "nor is its text model, llama4_text: its attention sees chunks"),
        ("new", {"model_type": 3}, r"none that is read\n"),
    ],
)
def test_a_multimodal_folder_names_the_family_of_its_text_model(model_type: str, inner: Any, says: str) -> None:
    data = {"model_type": model_type, "text_config": inner, "vision_config": {}}
    with pytest.raises(UserError, match=rf"^config.json: model_type: '{model_type}' is .*{says}"):
        read(data, "config.json")


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


def test_only_where_gpt_oss_says_nothing_has_it_a_scaling_of_its_own() -> None:
    """transformers takes an empty object at its word."""
    config = {k: v for k, v in PUBLISHED["gpt-oss-20b"].items() if k not in ("rope_scaling", "rope_parameters")}
    scalings = [read({**config, **more}, "config.json").spec.layers[0].attention.position
                for more in ({}, {"rope_parameters": None}, {"rope_parameters": {}})]  # fmt: skip
    kinds = [getattr(getattr(p, "scaling", None), "kind", None) for p in scalings]
    assert kinds == ["yarn", "yarn", None]
