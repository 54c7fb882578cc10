"""Levels against bits per weight: a small trained model end to end, every peer's decoding, and bad input."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.cli import main
from evals.quant.decoded import Job
from evals.quant.report import comma_separated, markdown
from evals.quant.study import Options, Study, run
from evals.quant.variants import DEFAULT, PEERS, Variant, known, parse
from evals.quant.worker import clustered_error
from parity_tests.checkpoints import VOCAB, llama, write_checkpoint
from spec.errors import UserError

SPEC = llama(context=64)


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that learnt for a moment to count: its logits are far from flat."""
    torch = pytest.importorskip("torch")
    from backends.torch.model import Decoder

    decoder = Decoder(SPEC)
    decoder.init_weights(0)
    optimizer = torch.optim.AdamW(decoder.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        ids = (torch.randint(VOCAB, (8, 1), generator=generator) + torch.arange(33)) % VOCAB
        loss = decoder(ids[:, :-1], ids[:, 1:]) / 256
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {n: t.detach().numpy() for n, t in decoder.state_dict().items()}
    return write_checkpoint(tmp_path_factory.mktemp("quant") / "counted", SPEC, weights)


@pytest.fixture(scope="module")
def job(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("peers")
    for name in ("files", "shared"):
        (folder / name).mkdir()
    np.save(folder / "ids.npy", (np.arange(16)[:, None] * 7 + np.arange(32)) % VOCAB)
    return Job(checkpoint, folder / "files", folder / "shared", folder / "ids.npy", "stdlib", 1)


def error(job: Job, variant: Variant) -> tuple[float, float]:
    """(relative squared error of all matrices, bits per weight) of a variant that is made here and now."""
    from convert.sources import open_source

    made = importlib.import_module(variant.maker).make(job, **variant.settings)
    with open_source(job.source) as source:
        wrong = total = 0.0
        for name in made.names():
            want = source.tensor(name)
            if want.ndim > 1:
                wrong += float(np.square(made.tensor(name) - want).sum())
                total += float(np.square(want).sum())
            else:
                np.testing.assert_allclose(made.tensor(name), want, rtol=1e-3)
    return wrong / total, made.bits


@pytest.fixture(scope="module")
def study(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, dict[str, Any]]:
    """One command over ours, a peer's, and one that breaks."""
    pytest.importorskip("llama_cpp")
    out = tmp_path_factory.mktemp("study") / "result"
    PEERS["broken"] = Variant("broken", "nobody", "evals.quant.report")  # a module without `make`
    levels = "q8,q4,llama.cpp-q4_k_m,broken"
    status = main(["quant", str(checkpoint), "--levels", levels, "--text", "stdlib", "--tokens", "1024",
                   "--threads", "1", "--out", str(out)])  # fmt: skip
    del PEERS["broken"]
    return out, status, json.loads((out / "quant.json").read_text(encoding="utf-8"))


def test_the_divergence_falls_with_the_bits(study: tuple[Path, int, dict[str, Any]]) -> None:
    _, status, result = study
    rows = {r["name"]: r for r in result["rows"]}
    assert list(rows) == ["q8", "q4", "llama.cpp-q4_k_m", "broken"]
    assert status == 1 and "ended with status 1" in rows["broken"]["reason"]
    assert 0 < rows["q8"]["kl_mean"] < 0.1 * rows["q4"]["kl_mean"]
    assert rows["q8"]["kl_mean"] < rows["llama.cpp-q4_k_m"]["kl_mean"]
    assert rows["q8"]["bits"] == 8.5 and 4.5 <= rows["q4"]["bits"] <= 4.95 and rows["llama.cpp-q4_k_m"]["bits"] > 4.5
    assert rows["q8"]["kl_se"] > 0 and rows["q8"]["top1"] >= rows["q4"]["top1"]
    assert result["baseline"] == "llama.cpp-q4_k_m" and rows["llama.cpp-q4_k_m"]["against"]["kl_ratio"] == 1
    assert rows["q8"]["against"]["kl_ratio"] < 0.1 and rows["q4"]["against"]["kl_ratio_se"] > 0


def test_table_and_plot_are_written(study: tuple[Path, int, dict[str, Any]]) -> None:
    out, _, result = study
    assert (out / "quant.png").stat().st_size > 10_000 and b"llama.cpp-q4_k_m" in (out / "quant.svg").read_bytes()
    assert (out / "quant.md").read_text(encoding="utf-8") == markdown(result)
    table = list(csv.DictReader((out / "quant.csv").read_text(encoding="utf-8").splitlines()))
    assert [float(r["kl_mean"]) for r in table[:3]] == [r["kl_mean"] for r in result["rows"][:3]]
    assert "ended with status 1" in table[3]["reason"]


def test_what_was_measured_is_not_measured_again(
    study: tuple[Path, int, dict[str, Any]], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, before = study

    def work(*_: object) -> None:
        raise AssertionError("everything is there")

    monkeypatch.setattr(Study, "_work", work)
    variants = [v for r in before["rows"][:3] for v in parse([r["name"]], ["fast"])]
    absent = Variant("other-int4", "other", "evals.quant.other", needs=("no_such_package",))
    again = run(checkpoint, [*variants, absent], Options("stdlib", 1024, threads=1), out, quiet)
    assert again["rows"][:-1] == before["rows"][:3]
    assert again["rows"][-1]["reason"] == "needs no_such_package, not installed"
    assert "other-int4: needs no_such_package" in markdown(again) and "other-int4" in comma_separated(again)


def test_two_studies_do_not_write_one_folder(checkpoint: Path, tmp_path: Path) -> None:
    def say(_: str) -> None:
        run(checkpoint, parse(["q8"], ["fast"]), Options("stdlib", 256), tmp_path, quiet)

    with pytest.raises(UserError, match="another study"):
        run(checkpoint, parse(["q8"], ["fast"]), Options("stdlib", 256), tmp_path, say)


def test_neighbouring_tokens_are_not_counted_as_independent() -> None:
    alike = np.repeat(np.random.default_rng(0).standard_normal((64, 1)), 32, 1)
    assert clustered_error(alike) == pytest.approx(alike[:, 0].std(ddof=1) / 8)


@pytest.mark.parametrize("name", ["ort-int4", "ort-int4-sym", "ort-int4-g128"])
def test_products_decode_to_what_onnxruntime_computes(name: str, job: Job) -> None:
    ort = pytest.importorskip("onnxruntime")
    from evals.quant.onnxruntime import read

    wrong, bits = error(job, PEERS[name])
    assert 1e-4 < wrong < 2e-2 and bits == {"ort-int4": 4.625, "ort-int4-sym": 4.5, "ort-int4-g128": 4.15625}[name]
    files = sorted(job.folder.glob("*.onnx"))
    for file in (files[0], files[-1]):  # the embedding, a look-up, and the head, a product
        session = ort.InferenceSession(file)
        want = read(file)
        if "int64" in session.get_inputs()[0].type:
            got = session.run(None, {"x": np.arange(len(want))})[0]
        else:
            got = session.run(None, {"x": np.eye(want.shape[1], dtype=np.float16)})[0].T
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-5)


def test_llama_cpp_quantizes_as_our_writer_does(job: Job) -> None:
    pytest.importorskip("llama_cpp")
    own, theirs = (error(job, v) for v in (*parse(["q4_k_m"], ["fast"]), PEERS["llama.cpp-q4_k_m"]))
    assert own == pytest.approx(theirs)


def test_an_importance_matrix_changes_what_llama_cpp_writes(job: Job) -> None:
    pytest.importorskip("llama_cpp")
    plain, weighted = (error(job, PEERS[f"llama.cpp-q4_0{x}"]) for x in ("", "-imatrix"))
    assert weighted[1] == plain[1] and weighted[0] != plain[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in PEERS if not n.startswith("llama.cpp")])
def test_every_peer_decodes(name: str, job: Job) -> None:
    if PEERS[name].absent:
        pytest.skip(f"needs {PEERS[name].absent}")
    wrong, bits = error(job, PEERS[name])
    assert 1e-6 < wrong < 5e-2 and 3 < bits < 9


def test_names_stand_for_ours_natives_and_peers() -> None:
    names = [v.name for v in parse(["q4", "f16", "Q4_K_M", "mlx-q4", "ort-hqq"], ["fast", "best"])]
    assert names == ["q4", "q4-best", "f16", "q4_k_m", "q4_k_m-importance", "mlx-q4", "ort-hqq"]
    assert set(DEFAULT) <= set(known())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "q4_k_mm", "--text", "stdlib"], "--levels q4_k_mm: no such level (did you mean q4_k_m?)"),
        (["--levels", "mlx-lm-4bit", "--text", "stdlib"], "did you mean mlx-lm-"),
        (["--levels", ",", "--text", "stdlib"], "--levels: names none"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: No such file"),
        ([], "--text"),
        (["--levels", "q4", "--effort", "bset", "--text", "stdlib"], "--effort bset: no such effort"),
        (
            ["--levels", "ort-gptq", "--calibrate", "nowhere.txt", "--text", "stdlib"],
            "--calibrate nowhere.txt: No such",
        ),
        (["--levels", "q8", "--baseline", "q4_k_m", "--text", "stdlib"], "--baseline q4_k_m: is none of what"),
        (["--levels", "q8", "--tokens", "9", "--text", "stdlib"], "--tokens 9: at least"),
        (["--levels", "q8", "--threads", "0", "--text", "stdlib"], "--threads 0: must be at least 1"),
        (["--levels", "q8", "--out", "{checkpoint}/spec.yaml", "--text", "stdlib"], "is a file; name a folder"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["quant", str(checkpoint), *[a.format(checkpoint=checkpoint) for a in arguments]]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and not list(tmp_path.iterdir())


def test_a_source_without_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", SPEC, tokenizer=False)
    with pytest.raises(UserError, match="no tokenizer"):
        run(bare, parse(["q8"], ["fast"]), Options("stdlib"), tmp_path / "out", quiet)


def test_help_names_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quant", "--help"]) == 0
    assert "Example: python -m evals quant" in capsys.readouterr().out
