"""Presets: they load, and their sizes are the published ones."""

from __future__ import annotations

import pytest

from spec import Spec, load, params, presets
from spec.config import MoE
from spec.cost import count, weight_bytes

PUBLISHED = {
    "gpt2": 124_439_808,
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "gemma-3-1b": 999_885_952,
    "llama-3.2-1b": 1_235_814_400,
    "olmo-2-1b": 1_484_916_736,
    "gemma-2-2b": 2_614_341_888,
    "phi-3-mini": 3_821_079_552,
    "mistral-7b": 7_241_732_096,
    "qwen3-30b-a3b": 30_532_122_624,
}
OURS = {"tiny": 3_410_176, "tiny-moe": 8_136_960, "nano": 26_223_104}


def test_every_preset_is_tested() -> None:
    assert set(presets()) == {*PUBLISHED, *OURS}


@pytest.mark.parametrize("name", [*PUBLISHED, *OURS])
def test_parameter_count_is_the_published_one(name: str) -> None:
    spec = load(name)
    assert spec.name == name
    assert count(spec).total == sum(p.size for p in params(spec)) == {**PUBLISHED, **OURS}[name]


@pytest.mark.parametrize("name", list(OURS))
def test_our_presets_fit_every_level(name: str) -> None:
    """K-quants need input widths that are multiples of 256, the portable levels multiples of 32."""
    spec = load(name)
    assert all(p.shape[-1] % 256 == 0 for p in params(spec) if p.matrix)
    vectors = sum(p.size for p in params(spec) if not p.matrix)
    matrices = count(spec).total - vectors
    assert weight_bytes(spec, "q4") <= matrices * 4.95 / 8 + 4 * vectors + 1


def _config(spec: Spec) -> object:
    """The transformers configuration that says the same, from the spec's own numbers."""
    import transformers as t

    b = spec.layers[-1]
    a, m, n = b.attention, b.mlp, spec.depth
    if spec.name == "gpt2":
        return t.GPT2Config(
            vocab_size=spec.vocab_size, n_positions=spec.context, n_embd=spec.width, n_layer=n, n_head=a.heads
        )
    common = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "intermediate_size": m.hidden,
        "num_hidden_layers": n,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "tie_word_embeddings": spec.head.tied,
    }
    kinds = {
        "qwen3-0.6b": t.Qwen3Config,
        "gemma-3-1b": t.Gemma3TextConfig,
        "olmo-2-1b": t.Olmo2Config,
        "gemma-2-2b": t.Gemma2Config,
        "phi-3-mini": t.Phi3Config,
        "mistral-7b": t.MistralConfig,
        "qwen3-30b-a3b": t.Qwen3MoeConfig,
    }
    if spec.name not in ("olmo-2-1b", "phi-3-mini"):
        common["head_dim"] = a.head_dim
    if isinstance(m, MoE):
        common |= {"num_experts": m.experts, "moe_intermediate_size": m.hidden}
    return kinds.get(spec.name, t.LlamaConfig)(**common, pad_token_id=None)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_transformers_counts_the_same(name: str) -> None:
    """The same dimensions make a model of the same size there, and of the same matrices."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    spec = load(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(_config(spec))
    theirs = dict(model.named_parameters())  # a tied head appears once
    assert sum(p.numel() for p in theirs.values()) == PUBLISHED[name]
    largest = max(p.size for p in params(spec))
    fused = (2 * 3072 * 8192, 2 * 128 * 768 * 2048)  # gate and up of Phi-3 and Qwen3-MoE
    assert max(p.numel() for p in theirs.values()) in (largest, *fused)
