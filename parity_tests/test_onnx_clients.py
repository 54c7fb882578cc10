"""onnxruntime-genai opens what we write, unmodified, and says what the oracle says."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime_genai")

import backends
from backends.numpy.model import Oracle
from backends.text import Text
from convert.tokenizers import read_tokenizer
from parity_tests.artifacts import opened, values, write
from parity_tests.cases import random_weights
from parity_tests.checkpoints import llama, write_checkpoint
from spec import Spec

og: Any = importlib.import_module("onnxruntime_genai")  # a native module without types

MOE: dict[str, Any] = {"kind": "moe", "experts": 8, "hidden": 128, "router": {"top_k": 2}}
PATCHES: dict[str, dict[str, Any]] = {
    "llama": {"head": {"tied": True}},
    "window": {"block": {"attention": {"window": 4}}},
    "sinks": {"block": {"attention": {"sinks": True, "softcap": 5.0}}},
    "alibi": {"block": {"attention": {"position": {"kind": "alibi"}}}},
    "learned": {"embedding": {"positions": {}}, "block": {"attention": {"position": {"kind": "none"}}}},
    "mixed": {"pattern": [{}, {"attention": {"position": {"kind": "alibi"}}}]},
    "heads_differ": {"pattern": [{}, {"attention": {"kv_heads": 4, "head_dim": 32}}]},
    "narrow_heads": {"block": {"attention": {"head_dim": 12}}},
    "moe": {"block": {"mlp": MOE}},
    "moe_shared": {
        "block": {
            "mlp": {
                **MOE,
                "router": {"top_k": 3, "score": "sigmoid", "correction": True, "scale": 2.5},
                "shared": {"hidden": 64, "gate": True},
            }
        },
        "overrides": {"0": {"mlp": {"kind": "dense", "hidden": 256}}},
    },
}
NEW = 16
END = 1
"""The test tokenizer's EOS."""


def folder(spec: Spec, path: Path, level: str = "f32", **options: Any) -> Path:
    checkpoint = write_checkpoint(path / "checkpoint", spec, random_weights(spec))
    return write("onnx", spec, random_weights(spec), path / "m", level, read_tokenizer(checkpoint), **options)


def generate(path: Path, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Greedy continuations of a padded batch, without the prompts."""
    model = og.Model(str(path))
    pad = json.loads((path / "genai_config.json").read_text())["model"]["pad_token_id"]
    longest = max(map(len, prompts))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + new, min_length=longest + new, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([p + [pad] * (longest - len(p)) for p in prompts], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(t) for t in generator.get_sequence(i)[longest:]] for i in range(len(prompts))]


def check_greedy(path: Path, prompts: list[list[int]]) -> None:
    """Every token is the oracle's choice, or ties with it within the runtime's own error."""
    artifact = opened("onnx", path)
    oracle = Oracle(artifact.spec, values(artifact))
    for prompt, new in zip(prompts, generate(path, prompts), strict=True):
        assert len(new) == NEW
        ids = np.array([prompt + new])
        with backends.load(path, threads=1) as runtime:
            slack = 2 * np.abs(runtime.logits(ids) - (want := oracle.logits(ids))).max()
        chosen = want[0, len(prompt) - 1 : -1]
        chosen[:, END] = -np.inf  # not before min_length
        gaps = chosen.max(-1) - chosen[np.arange(NEW), new]
        assert (gaps <= slack).all(), gaps
        assert slack < 0.5 * chosen[np.isfinite(chosen)].std(), "an allowance that lets anything pass"


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("name", PATCHES)
def test_genai_continues_as_the_oracle(name: str, profile: str, tmp_path: Path) -> None:
    path = folder(llama(**PATCHES[name]), tmp_path, profile=profile)
    check_greedy(path, [[5, 6, 7, 30, 31, 77]])


@pytest.mark.parametrize("profile", ["ort", "portable"])
@pytest.mark.parametrize("level", ["f16", "q8", "q4"])
def test_genai_continues_quantized_models_as_the_oracle(level: str, profile: str, tmp_path: Path) -> None:
    check_greedy(folder(llama(head={"tied": True}), tmp_path, level, profile=profile), [[5, 6, 7, 30, 31, 77]])


@pytest.mark.parametrize(("level", "profile"), [("q8", "ort"), ("q4", "ort"), ("q4", "portable")])
def test_genai_continues_mixtures_of_quantized_experts(level: str, profile: str, tmp_path: Path) -> None:
    check_greedy(folder(llama(block={"mlp": MOE}), tmp_path, level, profile=profile), [[5, 6, 7, 30, 31, 77]])


@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_genai_continues_a_batch_of_unequal_prompts(profile: str, tmp_path: Path) -> None:
    check_greedy(folder(llama(), tmp_path, profile=profile), [[5, 6, 7, 30, 31, 77, 8], [44, 45, 46]])


def test_genai_takes_a_prompt_in_pieces(tmp_path: Path) -> None:
    path = folder(llama(), tmp_path)
    prompt = [5, 6, 7, 30, 31, 77, 8, 9, 10]
    model = og.Model(str(path))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + NEW, min_length=len(prompt) + NEW)
    generator = og.Generator(model, params)
    for piece in (prompt[:4], prompt[4:5], prompt[5:]):
        generator.append_tokens(np.array([piece], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(t) for t in generator.get_sequence(0)[len(prompt) :]] == generate(path, [prompt])[0]


def test_genai_reads_the_tokenizer(tmp_path: Path) -> None:
    path = folder(llama(), tmp_path)
    theirs, ours = og.Tokenizer(og.Model(str(path))), Text.read(path)
    assert ours is not None
    for text in ("def main(argv):\n    return 0\n", "Hello world 123", "naïve café — ½"):
        ids = [int(t) for t in theirs.encode(text)]
        assert ids == ours.encode(text)[1:], "genai leaves the BOS to the chat template"
        assert theirs.decode(np.array(ids, np.int32)) == text


def test_genai_reads_the_chat_template(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_checkpoint(tmp_path / "checkpoint", llama()))
    assert tokenizer is not None
    tokenizer.chat_template = "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    path = write("onnx", llama(), random_weights(llama()), tmp_path / "m", tokenizer=tokenizer)
    theirs = og.Tokenizer(og.Model(str(path)))
    messages = json.dumps([{"role": "user", "content": "hi"}])
    assert theirs.apply_chat_template(messages=messages, add_generation_prompt=False) == "<|bos|>user: hi\n"


def test_a_model_without_a_tokenizer_opens_too(tmp_path: Path) -> None:
    spec = llama()
    path = write("onnx", spec, random_weights(spec), tmp_path / "m")
    assert len(generate(path, [[5, 6, 7]])[0]) == NEW


def test_shared_caches_are_for_the_fused_attention_alone(tmp_path: Path) -> None:
    for name, shared in (("llama", True), ("mixed", False)):
        path = folder(llama(**PATCHES[name]), tmp_path / name)
        config = json.loads((path / "genai_config.json").read_text())
        assert config["search"]["past_present_share_buffer"] is shared
        assert config["search"]["max_length"] == 128
