"""Conversions as a user runs them: what comes out, what is refused and how, and that nothing is ever lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import allotrope, output
from convert.cli import main
from convert.pipeline import VerificationFailed, convert
from convert.sources import open_source
from convert.tests.conftest import weights, write_checkpoint
from spec import Spec, UserError, dump, parse

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

OLD = b"the old artifact"
Writes = Callable[..., Path]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output that exists already, alone in its folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(OLD)
    return folder / "model.gguf"


def command(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, list[str], str]:
    """Exit status, lines on stderr and stdout of `convert ARGS`."""
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in args])
    said = capsys.readouterr()
    return int(e.value.code or 0), said.err.splitlines(), said.out


def untouched(out: Path) -> bool:
    return out.read_bytes() == OLD and [p.name for p in out.parent.iterdir()] == [out.name]


def child(script: str, *args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True,
                          timeout=120, check=False, **options)  # fmt: skip


# What comes out


def test_a_conversion_is_verified_described_and_alone(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "small.q4.gguf"
    seen: list[int] = []
    result = convert(checkpoint, "gguf", "q4", out, progress=lambda stage, done, total: seen.append(done))
    assert result.report is not None and result.report.ok and seen[-1] == checkpoint_bytes(checkpoint)
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "small.q4.gguf", "small.q4.gguf.md", "small.q4.gguf.receipt.json"]  # fmt: skip
    receipt = json.loads((out.parent / "small.q4.gguf.receipt.json").read_text())
    with open_source(checkpoint) as source:
        assert receipt["source"]["hash"] == source.hash()
        assert receipt["spec_hash"] == source.spec.hash
    assert receipt["parity"]["checks"]["packing"]["status"] == "PASS"
    assert embedded_receipt(out) == {k: v for k, v in receipt.items() if k != "report"}
    card = (out.parent / "small.q4.gguf.md").read_text()
    assert receipt["source"]["hash"] in card and "| packing | PASS |" in card


def checkpoint_bytes(folder: Path) -> int:
    return sum(w.nbytes for w in load_file(folder / "model.safetensors").values())


def embedded_receipt(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    field = GGUFReader(path).fields["allotrope.receipt"]
    return json.loads(bytes(field.parts[field.data[0]]).decode())


def test_threads_and_blocks_change_no_byte(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = convert(checkpoint, "gguf", "q4", tmp_path / "a.gguf", verify=False, threads=1).out.read_bytes()
    monkeypatch.setattr("convert.sources.base.BLOCK", 64 * 24)
    b = convert(checkpoint, "gguf", "q4", tmp_path / "b.gguf", verify=False, threads=5).out.read_bytes()
    assert a == b


@pytest.mark.parametrize("case", ["plain", "tied", "biased", "llama3", "longrope", "half-heads"])
def test_a_float32_llama_equals_transformers_in_float64(case: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from backends.gguf.runtime import load
    from convert.tests.test_families import LONG, float64_logits, transformers_model

    config: dict[str, Any] = {
        "plain": {"num_key_value_heads": 4},
        "tied": {"tie_word_embeddings": True},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "llama3": {"rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 5e5}},
        "longrope": {"rope_parameters": {
            "rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4, **LONG}},
        "half-heads": {"head_dim": 32},
    }[case]  # fmt: skip
    model = transformers_model("Llama", config)
    with torch.no_grad():  # an ordinary scale: logits of a few units
        for n, p in model.named_parameters():
            p.copy_(p * 0.3 if "norm" not in n else (p - 1) * 0.3 + 1)
    model.save_pretrained(tmp_path / "hf")
    result = convert(tmp_path / "hf", "gguf", "f32", tmp_path / "f32.gguf", verify=False)
    ids = np.random.default_rng(1).integers(0, 96, (1, 48))
    with load(result.out, threads=1, context=64, exact=True) as runtime:
        got = runtime.logits(ids).astype(np.float64)
    expected = float64_logits(model, ids)
    assert np.sum((got - expected) ** 2) / np.sum(expected**2) <= 1e-11


@pytest.mark.parametrize("level", ["bf16", "q8", "q6_k", "q4_k_m"])
def test_every_kind_of_level_is_written_and_verified(level: str, checkpoint: Path, tmp_path: Path) -> None:
    result = convert(checkpoint, "gguf", level, tmp_path / "x.gguf")
    assert result.report is not None and result.report["packing"].status == "PASS"
    assert result.bits == pytest.approx({"bf16": 16, "q8": 8.5}.get(level, result.bits))


# Dry runs


def test_a_dry_run_expects_what_a_real_one_makes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.gguf"
    status, _, said = command(capsys, checkpoint, "--quant", "q4", "--out", out, "--check", "--json")
    expected = json.loads(said)
    assert status == 0 and not out.exists()
    result = convert(checkpoint, "gguf", "q4", out, verify=False)
    assert abs(expected["bytes"] - out.stat().st_size) < 2048
    assert {k: expected[k] for k in ("levels", "bits_per_weight", "carrier", "weights")} == {
        k: result.to_dict()[k] for k in ("levels", "bits_per_weight", "carrier", "weights")
    }
    status, _, said = command(capsys, checkpoint, "--quant", "q4", "--out", tmp_path / "y.gguf", "--check")
    assert status == 0 and "q4" in said and "bits/weight" in said and "about" in said


def test_a_dry_run_refuses_what_a_real_one_refuses(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = {"heads": 4, "softcap": 5.0, "clip": 3.0}
    s = parse({"vocab_size": 32, "width": 32, "depth": 1, "context": 16, "embedding": {"scale": 2.0},
               "block": {"attention": attention, "mlp": {"hidden": 64}}})  # fmt: skip
    folder = write_checkpoint(tmp_path / "c", s, weights(s))
    for flags in (["--check"], []):
        status, said, _ = command(capsys, folder, "--quant", "q4", "--out", out, "--force", *flags)
        assert status == 2 and said and all(line.startswith("convert: gguf: ") for line in said)
        assert untouched(out)


# Refusals: one clear line, exit status 2, the old file intact


def broken(checkpoint: Path, how: str, small: Spec) -> tuple[list[str], str]:
    """Damage a checkpoint; returns further arguments and what the message must say."""
    file = checkpoint / "model.safetensors"
    w = dict(load_file(file))
    match how:
        case "missing":
            file.unlink()
            return [], "no model.safetensors"
        case "truncated":
            file.write_bytes(file.read_bytes()[:-100])
            return [], "truncated"
        case "corrupt":
            file.write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{" * 500)
            return [], "corrupt header"
        case "shape":
            w["final_norm.weight"] = np.ones(60, np.float32)
            save_file(w, file)
            return [], "final_norm.weight: shape [60], the model needs [64]"
        case "nan":
            w["layers.2.mlp.down.weight"][7, 3] = np.nan
            save_file(w, file)
            return [], "layers.2.mlp.down.weight: nan at row 7, column 3"
        case "huge":
            w["layers.2.mlp.down.weight"][7, 3] = 1e9
            save_file(w, file)
            return [], "layers.2.mlp.down.weight: row 7: a weight of 1e+09 is beyond q4"
        case "spec":
            (checkpoint / "spec.yaml").write_text(dump(small).replace("heads: 4", "heads: 5"))
            return [], "spec.yaml: block.attention"
        case "yaml":
            (checkpoint / "spec.yaml").write_text("a: [1,\nb")
            return [], "not valid YAML"
        case "level":
            return ["--quant", "q4_k_x"], "no such level (did you mean q4_k_"
        case "target":
            return ["--to", "gguv"], "--to gguv: nothing is converted to it (did you mean gguf?)"
        case "runtime":
            return ["--to", "torch"], "--to torch: nothing is converted to it (known: coreml, gguf"
        case "threads":
            return ["--threads", "0"], "--threads 0"
        case "option":
            return ["--quantt", "q4"], "--quantt"
        case "text":
            return ["--text", "nowhere.txt"], "--text nowhere.txt: no such file"
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["missing", "truncated", "corrupt", "shape", "nan", "huge", "spec", "yaml", "level",
                                 "target", "runtime", "threads", "option", "text"])  # fmt: skip
def test_bad_input_is_one_line_and_loses_nothing(
    how: str, checkpoint: Path, small: Spec, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args, says = broken(checkpoint, how, small)
    status, said, printed = command(capsys, checkpoint, *([] if "--quant" in args else ["--quant", "q4"]),
                                    "--out", out, "--force", *args)  # fmt: skip
    lines = [line for line in said if "%" not in line]  # progress may have begun
    assert status == 2 and not printed
    assert len(lines) == (2 if how == "spec" else 1), said
    assert says in lines[0] and lines[0].startswith("convert: ")
    assert untouched(out)


def test_an_unknown_config_key_is_one_line(huggingface: Writes, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = huggingface()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "logit_scale": 0.5}))
    status, said, _ = command(capsys, folder, "--out", out, "--force")
    assert status == 2 and len(said) == 1 and "logit_scale: 0.5 is an unknown key" in said[0]
    assert untouched(out)


def test_an_existing_output_needs_force(checkpoint: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = command(capsys, checkpoint, "--out", out)
    assert status == 2 and "exists; --force replaces it" in said[0] and untouched(out)
    assert command(capsys, checkpoint, "--out", out, "--force", "--no-verify")[0] == 0
    assert out.read_bytes()[:4] == b"GGUF"
    status, said, _ = command(capsys, checkpoint, "--out", out.parent, "--force")
    assert status == 2 and "is a folder" in said[0]
    status, said, _ = command(capsys, checkpoint, "--out", checkpoint / "model.safetensors", "--force")
    assert status == 2 and "must end with .gguf" in said[0]


def test_two_conversions_never_write_one_file(checkpoint: Path, out: Path) -> None:
    with output.reserved(out), pytest.raises(UserError, match="another conversion is writing it"):
        convert(checkpoint, "gguf", "q8", out, force=True)
    assert untouched(out)
    convert(checkpoint, "gguf", "q8", out, force=True, verify=False)


def test_a_full_disk_is_seen_before_the_work(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("convert.output.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    status, said, _ = command(capsys, checkpoint, "--out", out, "--force")
    assert status == 2 and "0.0 MB are free on its disk" in said[0] and untouched(out)


def test_a_disk_too_full_for_the_card_loses_nothing(
    checkpoint: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out.parent / "model.gguf.md.partial").mkdir()  # the card cannot be written
    with pytest.raises(UserError, match=r"model.gguf.md: Is a directory"):
        convert(checkpoint, "gguf", "q8", out, force=True, verify=False)
    (out.parent / "model.gguf.md.partial").rmdir()
    assert untouched(out)


LIMITED = """
import resource, sys
from convert import cli, show
limit = int(sys.argv.pop(1))
def full(self, stage, done, total, tell=show.Reporting.__call__):
    if done > total / 3:  # the disk fills up while rows are written
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))
    tell(self, stage, done, total)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
else:
    show.Reporting.__call__ = full
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.parametrize("limit", [30000, 0])
def test_a_disk_that_fills_up_loses_nothing(checkpoint: Path, out: Path, limit: int) -> None:
    done = child(LIMITED, str(limit), checkpoint, "--quant", "q8", "--out", out, "--force", "--no-verify")
    lines = [line for line in done.stderr.splitlines() if "%" not in line]
    assert done.returncode == 2 and len(lines) == 1 and "File too large" in lines[0], done.stderr
    assert untouched(out)


INTERRUPTED = """
import os, signal, sys
from convert import cli, show
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
number = int(sys.argv.pop(1))
def stop(self, stage, done, total, tell=show.Reporting.__call__):
    tell(self, stage, done, total)
    if done > total / 3:
        os.kill(os.getpid(), number)
show.Reporting.__call__ = stop
cli.main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_mid_write_loses_nothing(checkpoint: Path, out: Path, number: int, status: int) -> None:
    done = child(INTERRUPTED, str(int(number)), checkpoint, "--quant", "q8", "--out", out, "--force", "--no-verify")
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and untouched(out)
    if number == signal.SIGINT:
        assert done.stderr.splitlines()[-1] == "convert: interrupted; nothing was written"


def test_after_a_kill_the_next_conversion_works(checkpoint: Path, out: Path) -> None:
    args = (checkpoint, "--quant", "q8", "--out", out, "--force", "--no-verify")
    done = child(INTERRUPTED, str(int(signal.SIGKILL)), *args)
    assert done.returncode == -signal.SIGKILL and out.read_bytes() == OLD
    assert output.partial(out).exists()
    convert(checkpoint, "gguf", "q8", out, force=True, verify=False)
    assert out.read_bytes()[:4] == b"GGUF" and not output.partial(out).exists()


WITHOUT = """
import sys
class Hide:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "llama_cpp" else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = [Hide(f) for f in sys.meta_path]
from convert.cli import main
main()
"""


@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_a_missing_llama_cpp_is_one_line_that_says_how_to_install_it(
    checkpoint: Path, out: Path, flags: list[str]
) -> None:
    done = child(WITHOUT, checkpoint, "--quant", "q4", "--out", out, "--force", *flags)
    assert done.returncode == 2
    assert done.stderr == "convert: gguf needs llama_cpp: pip install 'allotrope[gguf]'\n"
    assert untouched(out)


def test_what_fails_verification_never_gets_the_name(checkpoint: Path, out: Path) -> None:
    file = checkpoint / "model.safetensors"
    w = dict(load_file(file))
    w["layers.1.mlp.up.weight"][0, 0] += 3

    def tamper(stage: str, done: int, total: int) -> None:
        if done >= total:  # the source changes between reading and verifying: the artifact is another model's
            save_file(w, file)

    with pytest.raises(VerificationFailed, match=r"packing: layers\.1\.mlp\.up\.weight"):
        convert(checkpoint, "gguf", "q8", out, force=True, progress=tamper)
    assert untouched(out)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = """
import sys, time
from convert.cli import main
try:
    main(["--help"])
except SystemExit as e:
    assert not e.code
heavy = {"numpy", "torch", "pydantic", "gguf", "llama_cpp", "transformers", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = child(script)
    assert done.returncode == 0, done.stderr
    assert "--quant" in done.stdout


def test_allotrope_hands_on_to_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        allotrope.main(["convert", "--help"])
    assert not e.value.code and "Usage: convert" in capsys.readouterr().out
    with pytest.raises(SystemExit) as e:
        allotrope.main(["convrt"])
    assert e.value.code == 2 and "did you mean convert?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        allotrope.main(["--help"])
    assert not e.value.code and "allotrope COMMAND" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_a_few_blocks_whatever_the_model(tmp_path: Path) -> None:
    peaks = []
    for depth in (2, 12):
        s = parse({"vocab_size": 4096, "width": 1024, "depth": depth, "context": 64,
                   "block": {"attention": {"heads": 16}, "mlp": {"hidden": 4096}}})  # fmt: skip
        folder = write_checkpoint(tmp_path / str(depth), s, weights(s))
        script = """
import sys
from convert.pipeline import convert
convert(sys.argv[1], "gguf", "q4", sys.argv[2], verify=False, threads=2)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
        if not os.path.exists("/proc/self/status"):  # noqa: PTH110
            pytest.skip("needs /proc")
        done = child(script, folder, tmp_path / f"{depth}.gguf")
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 24e6  # the model grew by 670 MB
