"""A checkpoint folder behind the face that every runtime has, and the commands that use it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import backends
from backends.cli import main
from backends.generate import generate
from backends.numpy.model import Oracle
from backends.torch.checkpoint import save_weights
from backends.torch.model import Decoder
from backends.torch.runtime import TorchRuntime, load
from backends.torch.support import LEVELS, support
from parity_tests.cases import FEATURES, random_weights
from spec import Spec, UserError, dump, parse
from spec.config import merge

torch.set_num_threads(1)
SPEC: Spec = parse(merge(FEATURES["window_pattern"].model_dump(exclude_unset=True), {"vocab_size": 300}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "spec.yaml").write_text(dump(SPEC))
    save_weights({n: torch.from_numpy(w) for n, w in random_weights(SPEC).items()}, folder / "model.safetensors")
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(
        ["def main(): return 1"],
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    t.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_logits_prefill_and_steps_agree_with_the_oracle(checkpoint: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, 20)
    expected = Oracle(SPEC, random_weights(SPEC)).logits(ids[None])[0]
    with load(checkpoint, dtype="f64") as runtime:
        np.testing.assert_allclose(runtime.logits(ids[None])[0], expected, rtol=0, atol=1e-5)
        for _ in range(2):  # prefill begins again
            np.testing.assert_allclose(runtime.prefill(ids[:11]), expected[10], rtol=0, atol=1e-5)
            np.testing.assert_allclose(runtime.step(ids[11:12]), expected[11:12], rtol=0, atol=1e-5)
            np.testing.assert_allclose(runtime.step(ids[12:]), expected[12:], rtol=0, atol=1e-5)
    assert runtime.logits(ids[None]).dtype == np.float32


def test_the_registry_opens_it(checkpoint: Path) -> None:
    with backends.load(checkpoint) as runtime:
        info = runtime.info()
        assert (runtime.vocab_size, runtime.context) == (300, 48)
        assert info["backend"] == "torch"
        assert info["precision"] == ("float32" if info["device"] == "cpu" else info["precision"])
        assert runtime.eos_ids == {1}
        assert runtime.decode(runtime.encode("def main()")) == b"def main()"
        assert runtime.encode("a")[0] == 0


def test_context_sizes_the_session(checkpoint: Path) -> None:
    runtime = load(checkpoint, context=10)
    assert runtime.context == 10
    runtime.prefill(np.arange(9))
    runtime.step(np.array([1]))
    with pytest.raises(UserError, match="exceed"):
        runtime.step(np.array([1]))
    with pytest.raises(UserError, match="exceed"):
        runtime.logits(np.arange(11)[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "f23"}, "no such precision"),
        ({"device": "toaster"}, "torch cannot use it"),
        ({"threads": 0}, "threads=0"),
        ({"context": 0}, "context=0"),
    ],
)
def test_options_that_cannot_be_are_one_line(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        load(checkpoint, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("ids", [np.array([300]), np.array([-1]), np.zeros((1, 2), int), np.array([], int)])
def test_ids_that_are_none_are_refused(checkpoint: Path, ids: np.ndarray) -> None:
    with pytest.raises(UserError, match="ids:"):
        load(checkpoint).prefill(ids)


def test_a_step_needs_a_sequence_and_text_a_tokenizer() -> None:
    decoder = Decoder(SPEC)
    decoder.init_weights()
    runtime = TorchRuntime(decoder)
    with pytest.raises(UserError, match="call prefill first"):
        runtime.step(np.array([1]))
    with pytest.raises(UserError, match="no tokenizer"):
        runtime.encode("a")


def test_greedy_text_is_the_oracles(checkpoint: Path) -> None:
    oracle = Oracle(SPEC, random_weights(SPEC))
    with load(checkpoint, dtype="f64") as runtime:
        ids = runtime.encode("def ")
        heard: list[int] = []
        list(generate(runtime, ids, max_tokens=16, temperature=0, on_token=heard.append))
    for token in heard:
        assert token == int(oracle.logits(np.array([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(heard) > 3


def run_cli(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(args))
    except SystemExit as e:
        code = int(e.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_command_writes_text(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", str(checkpoint), "--prompt", "def ", "--max-tokens", "12", "--seed", "4"]
    code, text, _ = run_cli(capsys, *args)
    assert code == 0 and text.startswith("def ") and len(text) > 5
    code, data, _ = run_cli(capsys, *args, "--json")
    parsed = json.loads(data)
    assert code == 0 and parsed["prompt"] + parsed["text"] + "\n" == text
    assert parsed["info"]["backend"] == "torch" and 0 < len(parsed["ids"]) <= 12
    cut = parsed["text"][3:5]
    _, stopped, _ = run_cli(capsys, *args, "--stop", cut)
    assert stopped == "def " + parsed["text"][: parsed["text"].index(cut)] + "\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "absent", "--prompt", "a"], "no such file or folder"),
        (["generate", "{checkpoint}", "--prompt", "a", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "{checkpoint}", "--prompt", "a", "--backend", "torhc"], "did you mean torch?"),
        (["generate", "{checkpoint}", "--prompt", "a", "--dtype", "f31"], "no such precision"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_status_2(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    code, _, err = run_cli(capsys, *(a.format(checkpoint=checkpoint) for a in args))
    assert code == 2
    assert message in err and err.count("\n") == 1


def test_the_list_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_cli(capsys, "list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows.keys() == {b.name for b in backends.REGISTRY}
    assert rows["torch"]["installed"]
    assert rows["gguf"]["opens"] == "*.gguf" and "allotrope[gguf]" in rows["gguf"]["install"]
    _, table, _ = run_cli(capsys, "list")
    assert all(name in table for name in rows)


@pytest.mark.parametrize("name", FEATURES)
def test_torch_carries_every_feature(name: str) -> None:
    for level in LEVELS:
        assert support(FEATURES[name], level).ok
    refused = support(FEATURES[name], "q4")
    assert not refused.ok and "q4" in refused.refusals[0]


def test_nothing_is_logged_as_a_warning_on_a_cpu(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load(checkpoint, device="cpu").prefill(np.arange(4))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
