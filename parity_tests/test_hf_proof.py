"""Every feature that transformers carries, at every level, through the checks that guard a conversion; and folders as
transformers' own tokenizers and our own readers see them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import torch
import transformers

from backends import folder
from backends.base import Tokenizer
from backends.hf.support import levels, support
from backends.text import Text
from convert.families import read
from convert.pipeline import convert
from convert.sources import open_source
from convert.verify.report import Status
from convert.verify.run import Session, door
from parity_tests import artifacts
from parity_tests.cases import FEATURES, random_weights
from parity_tests.checkpoints import llama, write_checkpoint
from spec import Spec, load, params
from spec.load import presets

torch.set_num_threads(1)

SPECS: dict[str, Spec] = {**FEATURES, "wide": llama(), "wide_tied": llama(head={"tied": True})}


def carried() -> list[object]:
    """Every pair of feature and level that transformers takes; 16-bit and packed ones of each feature quickly."""
    out: list[object] = []
    for name, spec in SPECS.items():
        for level in levels():
            if support(spec, level).ok:
                marks = [] if level in ("f16", "q4") else [pytest.mark.slow]
                out.append(pytest.param(name, level, id=f"{name}-hf-{level}", marks=marks))
    return out


@pytest.mark.parametrize(("feature", "level"), carried())
def test_the_artifact_is_proved(feature: str, level: str, tmp_path: Path) -> None:
    spec = SPECS[feature]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", spec, tokenizer=False)
    result = convert(checkpoint, "hf", level, tmp_path / "out", verify=False)
    source = open_source(checkpoint)
    session = Session(source, door("hf").open_artifact(tmp_path / "out", spec, level, 1), level)
    for check in (session.packing(), session.graph(), session.arithmetic(), session.invariants()):
        assert check.status is Status.PASS, check
    graph = session.graph()
    assert graph.gate is not None and graph.gate < 1e-8, "a gate that sees every structural bug"
    kept = session.shipped.stored()
    assert all(kept.hashed(p.name) for p in params(spec) if p.matrix)
    assert result.size == pytest.approx(sum(f.stat().st_size for f in (tmp_path / "out").iterdir()), rel=0.2)


@pytest.mark.parametrize("name", presets())
def test_presets_are_carried(name: str) -> None:
    spec = load(name)
    for level in levels():
        assert support(spec, level).ok, support(spec, level).refusals


CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "llama-llama3": {"rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16, "rope_theta": 5e5}},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "llama-yarn": {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4,
        "beta_fast": 16.0, "truncate": False}},
    "llama-longrope": {"rope_parameters": {
        "rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 1e4,
        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}},
    "mistral": {"sliding_window": None, "head_dim": 24},
    "mistral-window": {"sliding_window": 7},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "qwen3-layers": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 6,
                     "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_written_is_read_as_the_same_spec_and_weights(case: str, tmp_path: Path) -> None:
    kind = case.split("-")[0]
    spec = read({"model_type": kind, **SIZES, **CONFIGS[case]}, "config.json").spec
    weights = random_weights(spec)
    path = artifacts.write("hf", spec, weights, tmp_path / "m")
    told = json.loads((path / "config.json").read_text())["model_type"]
    assert told in (kind, "llama")  # a Mistral without a window is one
    with open_source(path) as source:
        assert source.spec.hash == spec.hash
        for name in source.names():
            np.testing.assert_array_equal(source.tensor(name), weights[name])


TEXTS = ["Hello world", "  two  spaces\n\tand a tab", "naïve café 漢字 🙂", "def f(x):\n    return x + 1\n", ""]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma", "gpt2", "mistral", "phi3", "cohere", "falcon"])
def test_transformers_tokenizes_as_the_source_does(arch: str, add_bos: bool, tmp_path: Path) -> None:
    """The architecture that config.json names does not talk AutoTokenizer into another tokenizer."""
    import tokenizers

    from parity_tests.checkpoints import tokenizer_json

    source = json.loads(tokenizer_json())
    tokenizer = Tokenizer(source, bos="<|bos|>", eos="<|eos|>", pad="<|pad|>", add_bos=add_bos, chat_template=TEMPLATE)
    folder.write_tokenizer(tmp_path, tokenizer, 128)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": arch}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain, ours = tokenizers.Tokenizer.from_str(tokenizer_json()), Text.read(tmp_path)
    assert ours is not None
    for text in TEXTS:
        want = [0] * add_bos + plain.encode(text, add_special_tokens=False).ids
        assert theirs(text).input_ids == want == ours.encode(text)
        assert theirs.decode(want, skip_special_tokens=True) == text
    said = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert said == "[user] Hi\n"
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")


def test_a_conversion_with_a_tokenizer_is_verified_whole(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", llama(head={"tied": True}))
    result = convert(checkpoint, "hf", "q8", tmp_path / "out")
    assert result.report is not None and result.report.ok
    assert {c.name: c.status for c in result.report.checks}["tokenizer"] is Status.PASS
    assert (tmp_path / "out" / "README.md").is_file()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (0, 1)
