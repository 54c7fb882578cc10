"""The arithmetic of `show`, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from spec import cost, load, parse
from spec.tests.test_load import SMALL


def test_flops_of_gpt2() -> None:
    body = 12 * 12 * 768**2  # a layer: 4 d^2 in attention, 8 d^2 in the MLP
    head = 50257 * 768
    attention = 12 * 4 * 768 * 1024
    assert cost.flops(load("gpt2")) == 2 * (body + head) + attention == 284_812_800
    assert cost.flops(load("gpt2"), 1) == 2 * (body + head) + 12 * 4 * 768
    assert cost.training_flops(load("gpt2")) == 3 * 284_812_800


def test_flops_do_not_depend_on_tying() -> None:
    untied, tied = parse(SMALL), parse({**SMALL, "head": {"tied": True}})
    assert cost.flops(untied) == cost.flops(tied) == 2 * (4 * (4 * 32**2 + 3 * 32 * 64) + 64 * 32) + 4 * 4 * 32 * 16


def test_windows_cap_attention() -> None:
    spec = load("mistral-7b")
    at_window, at_context = cost.flops(spec, 4096), cost.flops(spec, 32768)
    assert at_window == at_context
    assert cost.flops(spec, 4095) == at_window - 32 * 4 * 4096


def test_kv_cache() -> None:
    assert cost.cache_bytes_per_token(load("llama-3.2-1b")) == 16 * 2 * 8 * 64 * 2 == 32_768
    assert cost.cache_bytes(load("llama-3.2-1b"), 1000) == 32_768_000
    local, globals_ = 22 * 2 * 256 * 512 * 2, 4 * 2 * 256 * 32768 * 2
    assert cost.cache_bytes(load("gemma-3-1b")) == local + globals_ == 145_752_064
    assert cost.cache_bytes(load("gemma-3-1b"), 512, width=4) == 26 * 2 * 256 * 512 * 4


def test_weights_at_each_level() -> None:
    spec, matrices, vectors = load("tiny"), 3_407_872, 2_304
    assert cost.weight_bytes(spec, "f32") == 4 * (matrices + vectors)
    assert cost.weight_bytes(spec, "f16") == cost.weight_bytes(spec, "bf16") == 2 * matrices + 4 * vectors
    assert cost.weight_bytes(spec, "q8") == matrices * 34 // 32 + 4 * vectors
    assert cost.weight_bytes(spec, "q4") == -(-matrices * 495 // 800) + 4 * vectors


def test_matrices_that_no_group_divides_stay_in_16_bits() -> None:
    narrow = parse({**SMALL, "block": {"attention": {"heads": 4}, "mlp": {"hidden": 48}}})
    down = 4 * 32 * 48
    even = cost.count(narrow).total - down - 9 * 32
    assert cost.weight_bytes(narrow, "q8") == even * 34 // 32 + 2 * down + 4 * 9 * 32


def test_training_state_is_16_bytes_a_parameter() -> None:
    assert cost.training_bytes(load("gpt2")) == 16 * 124_439_808


def test_counts_by_part() -> None:
    n = cost.count(load("gpt2"))
    assert n.embedding == 50257 * 768
    assert n.positions == 1024 * 768
    assert n.attention == 12 * (4 * 768**2 + 4 * 768)
    assert n.mlp == 12 * (8 * 768**2 + 5 * 768)
    assert n.norms == 25 * 2 * 768
    assert n.head == 0
    assert n.body == n.total - n.embedding - n.positions
    qwen = cost.count(load("qwen3-0.6b"))
    assert qwen.attention == 28 * (2 * 1024 * 2048 + 2 * 1024 * 1024 + 2 * 128), "QK-norms are part of attention"


@pytest.mark.parametrize("width", [2, 4])
def test_activations_grow_with_the_sequence(width: int) -> None:
    spec = load("tiny")
    layer = 2 * 2 * 256 + 3 * 256 + 3 * 128 + 4 * 512  # norms, q and mix, k and v, MLP
    assert cost.activation_bytes(spec, 10, width) == 10 * (4 * layer * width + 8 * 4096)
