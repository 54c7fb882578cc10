"""What llama.cpp carries, as a user is told before anything is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backends.gguf.recipe import recipe
from backends.gguf.support import levels, support
from backends.gguf.types import TYPES
from parity_tests.cases import FEATURES
from spec import load, params
from spec.load import presets

PRESETS = {
    "gemma-2-2b": "gemma2", "gemma-3-1b": "gemma3", "gpt2": "gpt2", "llama-3.2-1b": "llama",
    "mistral-7b": "granite_swa", "nano": "llama", "olmo-2-1b": "olmo2", "phi-3-mini": "granite_swa",
    "qwen3-0.6b": "qwen3", "qwen3-30b-a3b": "qwen3moe", "smollm2-135m": "llama", "tiny": "llama", "tiny-moe": "llama",
}  # fmt: skip


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_carried_at_every_level(name: str) -> None:
    spec = load(name)
    for level in levels():
        got, weighed = support(spec, level), support(spec, level, importance=True)
        assert weighed.ok, weighed.refusals
        assert weighed.carrier == PRESETS[name]
        if not got.ok:
            assert len(got.refusals) == 1 and "needs importance: --calibrate" in got.refusals[0]
            assert level[:3] in ("iq1", "iq2", "iq3") or level == "q2_k_s"


def test_it_needs_neither_gguf_nor_llama_cpp() -> None:
    code = (
        "import sys; sys.modules['gguf'] = sys.modules['llama_cpp'] = None\n"
        "from spec import load\nfrom backends.gguf.support import support\n"
        "print(support(load('gpt2'), 'q4_k_m').carrier)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])  # fmt: skip
    assert done.stdout.strip() == "gpt2"


def test_an_unknown_level_names_the_nearest() -> None:
    got = support(load("tiny"), "q4_k_n")
    assert "did you mean q4_k" in got.refusals[0]


def test_a_refusal_names_the_field_its_value_and_what_comes_nearest() -> None:
    got = support(FEATURES["attn_softcap"], "f32")
    assert got.refusals[0].startswith("block.attention.softcap: 2")
    assert "nearest: gemma2" in got.refusals[0] and "and 1 more)" in got.refusals[0]


def test_a_field_that_differs_by_layer_is_refused_once() -> None:
    assert len(support(FEATURES["gemma2"], "f32").refusals) == 1


def test_narrow_matrices_are_announced() -> None:
    notes = " ".join(support(FEATURES["uneven_width"], "q4").notes)
    assert "stay f16" in notes and "36" in notes


Q4_K_M = {"layers.0.attn.v.weight": "q6_k", "layers.4.attn.v.weight": "q6_k", "layers.5.attn.v.weight": "q4_k",
          "layers.0.mlp.down.weight": "q6_k", "layers.2.mlp.down.weight": "q4_k", "layers.15.mlp.down.weight": "q6_k",
          "layers.3.attn.q.weight": "q4_k", "embed.weight": "q6_k", "final_norm.weight": "f32"}  # fmt: skip


def test_q4_k_m_is_llama_cpps_own_mixture() -> None:
    """As llama.cpp's quantizer chooses for Llama 3.2 1B (16 layers, tied head)."""
    kinds = recipe(load("llama-3.2-1b"), "q4_k_m")
    assert {n: kinds[n] for n in Q4_K_M} == Q4_K_M
    more = [i for i in range(16) if kinds[f"layers.{i}.attn.v.weight"] == "q6_k"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]


@pytest.mark.parametrize("level", ["q4_0", "q8_0", "q5_k_s", "q2_k", "iq4_nl", "iq3_m", "tq2_0", "mxfp4"])
def test_every_native_level_names_types_for_all_tensors(level: str) -> None:
    spec = load("qwen3-0.6b")
    kinds = recipe(spec, level)
    assert set(kinds) == {p.name for p in params(spec)}
    assert set(kinds.values()) <= set(TYPES)
    assert all(p.shape[-1] % TYPES[kinds[p.name]].block == 0 for p in params(spec) if p.matrix)
