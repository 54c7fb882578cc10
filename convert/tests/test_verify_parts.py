"""The parts of a verification that need no runtime: gates, reports, samples, streamed weights, text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from backends.base import QuantizedTensor, Tokenizer
from backends.folder import write_json, write_tokenizer
from backends.numpy.model import Oracle
from backends.text import Text
from convert import gates
from convert.quantize import quantize
from convert.sources import open_source
from convert.verify import sample
from convert.verify.packing import compare_values, difference
from convert.verify.report import Check, Report, Status, dumps
from convert.verify.stock import check_stock
from convert.verify.tokens import check_tokenizer, fuzz
from convert.verify.weights import SourceRows, source_weights
from parity_tests.cases import FEATURES, random_ids
from parity_tests.checkpoints import llama, write_checkpoint
from spec.errors import UserError
from spec.load import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("verify") / "checkpoint", llama(width=64, depth=1))


def test_gates_grow_with_the_control_and_no_faster() -> None:
    low, high = (gates.gate("arithmetic", "f16", c, layers=4, positions=64).limit for c in (1e-6, 1e-5))
    assert high - low == pytest.approx(gates.RATIO["arithmetic"] * 9e-6)


def test_a_graph_gate_never_lets_a_structural_bug_through() -> None:
    """Whatever depth and length do to the bound: a usable gate lies under the smallest bug."""
    for layers in (1, 8, 126):
        for positions in (16, 4096, 131072):
            probe = gates.gate("graph", "f32", 0.0, layers=layers, positions=positions)
            widest = gates.gate("graph", "f32", probe.ceiling, layers=layers, positions=positions)
            assert widest.usable and widest.limit <= gates.STRUCTURAL * 1.001


def test_a_control_beyond_the_bound_is_unusable() -> None:
    assert not gates.gate("arithmetic", "f16", 1.0, layers=2, positions=64).usable
    assert not gates.gate("arithmetic", "f16", math.inf, layers=2, positions=64).usable


@pytest.mark.parametrize(
    ("level", "budget"),
    [("q4_k_m", "q4_k"), ("q4", "q4"), ("q4_0", "q4_0"), ("q6_k", "q6_k"), ("iq2_xxs", "iq2"), ("iq4_xs", "iq4_xs")],
)
def test_every_level_finds_its_budget(level: str, budget: str) -> None:
    assert gates.kl_budget(level) == gates.KL_BUDGET[budget]


def test_every_level_that_ships_has_a_budget() -> None:
    from backends.gguf.recipe import LEVELS as NATIVE
    from convert.levels import LEVELS as PORTABLE

    assert [n for n in (*PORTABLE, *NATIVE) if gates.kl_budget(n) is None] == []


def test_a_report_survives_json() -> None:
    checks = [
        Check("packing", Status.FAIL, 3, 0, "layers.0.attn.q.weight: 5 codes differ", details={"wrong": {"a": "b"}}),
        Check("graph", Status.NOT_RUN, reason="too long"),
        Check(
            "arithmetic", Status.PASS, 1e-6, 3e-6, "fine", ("flag",), {"control": np.float64(1e-6), "worst": math.inf}
        ),
    ]
    report = Report("a.gguf", "gguf", "q4", "runs/tiny", 64, 1.5, checks, {"numpy": np.__version__})
    again = Report.from_dict(json.loads(dumps(report.to_dict())))
    assert [(c.name, c.status, c.measured, c.gate) for c in again.checks] == [
        (c.name, c.status, c.measured, c.gate) for c in checks
    ]
    assert not again.ok and [c.name for c in again.failures] == ["packing"]
    assert again.flagged == ["graph: NOT_RUN (too long)", "arithmetic: flag"]
    assert again["arithmetic"].margin == pytest.approx(1 / 3) and again["packing"].margin == math.inf


def test_a_report_without_checks_is_no_pass() -> None:
    assert not Report("a", "gguf", "q4", "s").ok


def test_a_table_and_its_markdown_name_every_check() -> None:
    report = Report("a", "gguf", "q4", "s", checks=[Check("graph", Status.PASS, 1e-12, 4e-12, "a | b")])
    assert "| graph | PASS | 1.00e-12 | 4.00e-12 | 0.25 | a \\| b |" in report.markdown()
    assert report.table().row_count == 1


def test_streamed_weights_are_the_weights(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    whole = source.tensor("embed.weight")
    rows = SourceRows(source, "embed.weight")
    for step in (7, 100, len(whole)):
        parts = [rows[r : r + step] for r in range(0, len(whole), step)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(rows[50:60], whole[50:60])
    index = np.array([3, 380, 3, 0])
    np.testing.assert_array_equal(rows[index], whole[index])


def test_the_oracle_runs_on_streamed_weights(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import convert.verify.weights as weights

    source = open_source(checkpoint)
    ids = random_ids(source.spec, 1, 8)
    whole = Oracle(source.spec, source.tensor).logits(ids)
    monkeypatch.setattr(weights, "_KEEP", 0)
    np.testing.assert_array_equal(Oracle(source.spec, source_weights(source)).logits(ids), whole)


def test_the_sample_shrinks_with_the_model() -> None:
    assert sample.affordable(llama(context=2048)) == 256
    assert sample.affordable(FEATURES["llama"]) == 47
    assert sample.affordable(load("llama-3.2-1b")) in range(48, 96)
    assert sample.affordable(load("mistral-7b")) == 16


def test_ids_are_the_texts_own(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    ids = sample.token_ids(source.spec, source.tokenizer, "def f(x):\n    return x\n" * 9, 20)
    assert ids.shape == (1, 20)
    assert source.tokenizer is not None
    assert sample.open_tokenizer(source.tokenizer).decode(ids[0].tolist()).startswith("def f(x):")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"  \n"])
def test_a_text_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as e:
        sample.read_text(file)
    assert str(file) in str(e.value) and "\n" not in str(e.value)


def test_fuzzed_texts_hold_every_byte_every_special_token_and_are_the_same_every_time() -> None:
    texts = fuzz(["<|eos|>"], count=100)
    joined = "".join(texts)
    assert all(chr(i) in joined for i in range(1, 256))
    assert any("before <|eos|>after" in t for t in texts)
    assert "\ufffd" in joined and any(ord(c) > 0xFFFF for c in joined)
    assert texts == fuzz(["<|eos|>"], count=100)


def test_one_code_one_scale_and_one_row_are_differences() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    q = quantize(x, 4)
    assert compare_values(q, quantize(x, 4), 0) == ""
    codes, scales = q.codes.copy(), q.scales.copy()
    codes[2, 5] += 1 if codes[2, 5] < 7 else -1
    assert "1 codes differ, first [102, 5]" in compare_values(QuantizedTensor(codes, q.scales, 4), q, 100)
    scales[3, 1] *= 2
    assert "1 scales differ, first [3, 1]" in compare_values(QuantizedTensor(q.codes, scales, 4), q, 0)
    assert "codes differ" in compare_values(q[np.array([1, 0, 2, 3])], q, 0) or "scales" in compare_values(
        q[np.array([1, 0, 2, 3])], q, 0
    )
    assert difference("values", x, x[:2], 0) == "values of shape [4, 64], not [2, 64]"


def test_a_tokenizer_that_a_client_builds_by_rules_of_its_own_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    """transformers builds Qwen's tokenizer for `qwen2`, whatever tokenizer.json says."""
    pytest.importorskip("transformers")
    source = open_source(checkpoint)
    assert source.tokenizer is not None
    write_tokenizer(tmp_path, source.tokenizer, 64)
    config = {"vocab_size": 384, "hidden_size": 64, "num_attention_heads": 4}
    for kind, equal in (("llama", True), ("qwen2", False)):
        write_json(tmp_path / "config.json", {"model_type": kind, **config})
        check = check_stock(tmp_path, source.tokenizer, 300)
        assert (check is None) == equal
        if check is not None:
            assert check.status is Status.FAIL and "AutoTokenizer (Qwen2Tokenizer)" in check.reason


@pytest.mark.parametrize("strips", [True, False])
def test_a_prefix_space_may_stay_or_go_but_always(strips: bool) -> None:
    """What SentencePiece puts before a text: llama.cpp gives it back, `tokenizers` takes it away."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, trainers

    fast = Fast(models.BPE(byte_fallback=True, unk_token="<unk>"))  # noqa: S106
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    fast.train_from_iterator([sample.corpus()[:5000]], trainers.BpeTrainer(vocab_size=300, special_tokens=tokens))
    words = Text(fast, {})

    class Runtime:
        eos_ids: frozenset[int] = frozenset()
        forgets = False
        """Whether it does the other thing for long texts."""

        def encode(self, text: str) -> list[int]:
            return fast.encode(text, add_special_tokens=False).ids

        def decode(self, ids: Sequence[int]) -> bytes:
            whole = b"".join((words._pieces or {}).get(i, b"") for i in ids)
            return words.decode(ids) if strips != (self.forgets and len(ids) > 3) else whole

    tokenizer = Tokenizer(json=json.loads(fast.to_str()))
    runtime = Runtime()
    assert check_tokenizer(runtime, tokenizer, 40).status is Status.PASS
    ends = check_tokenizer(runtime, replace(tokenizer, eos="<unk>"), 1)
    assert ends.status is Status.FAIL and "does not end at [0]" in ends.reason
    runtime.forgets = True
    assert check_tokenizer(runtime, tokenizer, 40).status is Status.FAIL
