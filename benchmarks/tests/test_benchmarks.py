"""The measuring itself, and the model that is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks.cli import main
from benchmarks.convert import tensors_equal
from benchmarks.measure import Cost, Summary, run
from benchmarks.model import VOCAB, write
from spec import UserError

MB = 1 << 20


def test_time_and_peak_are_the_childs_own() -> None:
    """Measured from a small process, as the command line is: a child's peak begins at its parent's size."""
    code = (
        "import json, sys; from benchmarks.measure import run\n"
        "a = run([sys.executable, '-c', 'import time; time.sleep(0.3)'])\n"
        "b = run([sys.executable, '-c', 'x = bytearray(200 << 20)\\nx[::1024] = bytes(len(x) // 1024)'])\n"
        "print(json.dumps([a.seconds, a.peak, b.peak]))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, small, large = json.loads(done.stdout)
    assert 0.3 <= seconds < 10
    assert small < 100 * MB
    assert 200 * MB < large < 300 * MB


def test_a_failing_command_says_its_last_line() -> None:
    with pytest.raises(UserError, match=r"ended with status 3: the reason$"):
        run(
            [
                sys.executable,
                "-c",
                "import sys; print('x', file=sys.stderr); print('the reason', file=sys.stderr); sys.exit(3)",
            ]
        )


def test_costs_add_up() -> None:
    assert Cost(1.0, 5).then(Cost(2.5, 3)) == Cost(3.5, 5)
    assert Summary.of([3.0, 1.0, 2.0]).text() == "2.0 (1.0..3.0)"
    assert Summary.of([2e6, 4e6]).text(1e6, 0) == "3 (2..4)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    assert 9e6 < write(folder, 10) < 11e6
    return folder


def test_the_model_is_a_folder_that_transformers_opens(model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    found = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with safe_open(model / "model.safetensors", "np") as f:
        total = sum(int(np.prod(f.get_slice(name).get_shape())) for name in f.keys())  # noqa: SIM118
        assert f.get_tensor("lm_head.weight").std() == pytest.approx(256**-0.5, rel=0.01)
    assert sum(p.numel() for p in found.parameters()) == total
    assert torch.isfinite(found(torch.arange(8)[None]).logits).all()


def test_both_tokenizer_files_say_the_same(model: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from tokenizers import Tokenizer

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    ours = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert ours.get_vocab_size() == theirs.get_piece_size() == VOCAB
    for text in ("def main():", "    return x + 1", "a  b", "naïve ☃", "self.assertEqual(a, b)"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)
        assert ours.decode(ours.encode(text, add_special_tokens=False).ids) == text


def test_unusable_options_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for args, said in ((["--repeats", "0"], "--repeats 0"), (["--quant", "q4_k_n"], "no such level")):
        with pytest.raises(SystemExit) as e:
            main(["convert", *args])
        assert e.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_both_tools_make_the_same_q8_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Native types go through the same ggml code, so nothing but time and memory may differ."""
    with pytest.raises(SystemExit) as e:
        main(["convert", "--size", "10", "--repeats", "1", "--quant", "q8_0", "--folder", str(tmp_path), "--json"])
    assert e.value.code == 0
    result = json.loads(capsys.readouterr().out)
    (level,) = result["levels"]
    assert level["equal_tensors"]["same"] == level["equal_tensors"]["of"] > 0
    assert set(level["tools"]) == {"allotrope", "allotrope, verified", "llama.cpp"}
    assert all(tool["seconds"]["median"] > 0 for tool in level["tools"].values())
    assert list(tmp_path.iterdir()) == []


def test_different_tensors_are_counted(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    files = []
    for n, tensors in enumerate(({"a": 0.0, "b": 1.0}, {"a": 0.0, "b": 2.0, "c": 3.0})):
        files.append(tmp_path / f"{n}.gguf")
        writer = gguf.GGUFWriter(files[-1], "llama")
        for name, value in tensors.items():
            writer.add_tensor(name, np.full(32, value, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert tensors_equal(files[0], files[1]) == {"same": 1, "of": 3}


def test_all_trainers_see_the_same_batches() -> None:
    from benchmarks.train import LLAMA
    from benchmarks.trainer import batch, specification
    from spec.cost import count

    size = {**LLAMA, "batch": 2, "length": 8}
    assert np.array_equal(batch(size, 3), batch(size, 3))
    assert not np.array_equal(batch(size, 3), batch(size, 4))
    assert batch(size, 0).shape == (2, 9)
    assert count(specification(size)).total == 5_639_424


def test_a_trainer_that_fails_says_why() -> None:
    from benchmarks.train import Tool

    with Tool("no such tool", {"threads": 1}) as tool, pytest.raises(UserError, match="ended with status 1: KeyError"):
        tool.answer()


def test_mfu_needs_hardware_whose_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.mfu import Options, benchmark

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="has no known peak at bfloat16"):
        benchmark(Options("examples/billion", 1, 128, 1, "bfloat16", "auto", "none"), lambda line: None)


@pytest.mark.slow
def test_training_is_measured_beside_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit) as e:
        main(["train", "--rounds", "1", "--steps", "1", "--batch", "1", "--length", "32", "--threads", "1", "--json"])
    assert e.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["tools"]) == {"transformers", "allotrope", "allotrope, compiled"}
    assert result["tools"]["transformers"]["ratio"]["median"] == 1
    losses = [tool["loss"] for tool in result["tools"].values()]
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    assert losses == pytest.approx([8.3] * 3, rel=0.05)  # log of the vocabulary


@pytest.mark.slow
def test_a_gpu_reaches_its_share_of_the_peak() -> None:
    """45 % of an H100's or H200's bfloat16 at a billion parameters."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or not any(n in torch.cuda.get_device_name() for n in ("H100", "H200")):
        pytest.skip("needs an H100 or H200")
    from benchmarks.mfu import Options, benchmark

    found = benchmark(Options("examples/billion", 8, 2048, 10, "bfloat16", "auto", "none"), lambda line: None)
    assert found["mfu"] >= 0.45
