"""Small checkpoints to convert: ours and Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.families import read
from spec import Spec, dump, params, parse
from spec.layout import Layout

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float32",
}  # fmt: skip


def weights(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """Canonical float32 weights with norms and biases that matter."""
    rng = np.random.default_rng(seed)
    out = {}
    for p in params(spec):
        scale, mean = (0.1, 1.0) if p.role == "gain" else (0.08, 0.0)
        out[p.name] = (mean + scale * rng.standard_normal(p.shape)).astype(np.float32)
    return out


@pytest.fixture
def small() -> Spec:
    """A spec that stock llama.cpp carries."""
    return parse({
        "name": "small", "vocab_size": 96, "width": 64, "depth": 3, "context": 128,
        "block": {"attention": {"heads": 4, "kv_heads": 2}, "mlp": {"hidden": 160}},
    })  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path, small: Spec) -> Path:
    """Our checkpoint folder, without a tokenizer."""
    return write_checkpoint(tmp_path / "checkpoint", small, weights(small))


def write_checkpoint(folder: Path, spec: Spec, tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    (folder / "spec.yaml").write_text(dump(spec))
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_huggingface(folder: Path, config: Mapping[str, Any], seed: int = 0, shards: int = 1) -> Path:
    """A Hugging Face folder with random weights for a config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    found = read(config, "config.json", "model")
    spec = found.spec
    canonical = weights(spec, seed)
    outside = {
        n: v
        for b in Layout(found.row.rules, spec).rules
        for n, v in zip(b.external, b.apply([canonical[p.name] for p in b.canonical]), strict=True)
    }
    if shards == 1:
        save_file(outside, folder / "model.safetensors")
        return folder
    names = sorted(outside)
    where = {n: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: outside[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.fixture
def huggingface(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small Hugging Face Llama; keyword arguments change its config.json."""

    def write(shards: int = 1, **changes: Any) -> Path:
        return write_huggingface(tmp_path / "hf", {**LLAMA, **changes}, shards=shards)

    return write
