"""Checkpoints of several ranks: bit for bit with as many, the same run with fewer or otherwise divided; what is kept;
weights to begin with; exports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from backends.torch.checkpoint import load_decoder
from backends.torch.model import Decoder
from convert.sources import open_source
from spec.errors import UserError
from spec.load import load as load_spec
from train import checkpoint, config, parallel, session
from train.checkpoint import init, lock, newest, number
from train.checkpoint.tensors import Reader, Stager, quiet, save
from train.config import Parallel
from train.data import tokenizer
from train.data.feed import feed
from train.data.prepare import text
from train.tests.conftest import saved_tensors
from train.tests.launch import begin, spawn
from train.watch import history

Options = Callable[..., dict[str, Any]]
Train = Callable[..., session.Result]

ROOT = Path(__file__).parents[2]

UNEVEN = """\
version: 1
name: uneven
vocab_size: 301
width: 32
depth: 2
context: 32
block:
  attention: {heads: 2, kv_heads: 2, sinks: true}
  mlp: {hidden: 48}
"""
"""301 rows over 2 or 4 ranks, and 2 sinks over 4, two of which have none."""


def losses(out: Path | str) -> list[float]:
    """A run's losses."""
    return [m["loss"] for m in history(Path(out) / "training" / "train.jsonl")]


def _train(rank: int, ports: list[int], world: int, jobs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for port, (data, how) in zip(ports, jobs, strict=True):
        begin(rank, world, port)
        c = config.layered(data)
        if how.get("resume"):
            c, out, _ = session.resumed(data)
            c = c.model_copy(update={"out": str(out)})
        session.train(c, console=Console(file=StringIO()), **how)


def on_ranks(world: int, *jobs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Trainings one after another on gloo processes."""
    spawn(_train, world, world, list(jobs), starts=len(jobs))


@pytest.fixture
def uneven(options: Options, tmp_path: Path) -> Options:
    """Options of the model whose vocabulary no number of ranks divides."""

    def make(out: str, **fields: Any) -> dict[str, Any]:
        data = options(out, **{"batch__sequences": 4, "steps": 6, "validation__every": 2, **fields})
        Path(data["spec"]).write_text(UNEVEN, encoding="utf-8")
        return data

    return make


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits."""
    x, y = saved_tensors(a), saved_tensors(b)
    assert x.keys() == y.keys()
    assert not [k for k in x if not torch.equal(x[k], y[k])]
    assert json.loads((a / checkpoint.STATE).read_text()) == json.loads((b / checkpoint.STATE).read_text())


def newest_of(out: Path) -> Path:
    """The newest checkpoint, which is there."""
    found = newest(out)
    assert found is not None
    return found


def test_two_ranks_resume_bit_for_bit_twice_and_one_goes_on(uneven: Options, train: Train, tmp_path: Path) -> None:
    """In the background too. What two ranks saved, one goes on with, and the other way round: the same batches, and
    losses that differ by the rounding of other sums."""
    whole = uneven("whole", checkpoint__asynchronous=True)
    parts, back = {**whole, "out": str(tmp_path / "parts")}, {**whole, "out": str(tmp_path / "back")}
    train({**whole, "out": str(tmp_path / "one")})
    train(back, stop_after=3)
    again = {"out": parts["out"]}
    on_ranks(
        2,
        (whole, {}),
        (parts, {"stop_after": 2}),
        (again, {"resume": True, "stop_after": 4}),
        (again, {"resume": True}),
        ({"out": back["out"]}, {"resume": True}),
    )
    assert_same(newest_of(tmp_path / "whole"), newest_of(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    state = checkpoint.read(newest_of(tmp_path / "whole"))
    assert state["world"] == 2 and state["degrees"]["dp"] == 2
    assert {k for k in saved_tensors(newest_of(tmp_path / "whole")) if "random" in k} == {
        "random/0/cpu",
        "random/1/cpu",
    }
    assert losses(tmp_path / "back") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)
    one = checkpoint.read(newest_of(tmp_path / "one"))["data"]
    assert checkpoint.read(newest_of(tmp_path / "back"))["data"] == one == state["data"]
    result = train({"out": parts["out"], "steps": 8}, resume=True)
    assert result.step == 8


MESHES = {
    "dp4": {},
    "tp2-dp2": {"tp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2},
    "pp2-dp2": {"pp": 2},
    "replicate2-dp2": {"replicate": 2, "dp": 2},
}


def _every_mesh(rank: int, ports: list[int], folder: Path, spec_file: str) -> None:
    """Each mesh writes, and each reads what each wrote."""
    spec = load_spec(spec_file)

    def on_mesh(name: str, act: Callable[[Decoder, parallel.Ranks], None]) -> None:
        begin(rank, 4, ports.pop())
        with parallel.ranks("cpu", Parallel(**MESHES[name])) as ranks:
            with torch.device("meta"):
                decoder = Decoder(spec)
            if ranks.degrees.pp > 1:
                decoder.keep(parallel.spans(spec, ranks.degrees.pp)[ranks.place("pp")])
            parallel.shard(decoder, ranks, "float32")
            parallel.allocate(decoder, ranks.device)
            decoder.init_weights(3)
            act(decoder, ranks)

    for name in MESHES:
        on_mesh(name, lambda d, ranks: save(Stager(ranks.device)(_named(d)), folder / name, ranks.control))  # noqa: B023
    for name in MESHES:
        on_mesh(name, lambda d, ranks: _compare(d, ranks, folder))


def _named(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {f"model/{n}": p.detach() for n, p in decoder.named_parameters()}


def _compare(decoder: Decoder, ranks: parallel.Ranks, folder: Path) -> None:
    expected = {n: parallel.whole(p) for n, p in decoder.named_parameters()}
    for written in MESHES:
        with torch.no_grad():
            for p in decoder.parameters():
                p.fill_(7.0)
        Reader(folder / written).load(_named(decoder), ranks.control)
        for n, p in decoder.named_parameters():
            assert torch.equal(parallel.whole(p), expected[n]), (written, n)


@pytest.mark.slow
def test_what_any_mesh_wrote_every_other_reads(uneven: Options, tmp_path: Path) -> None:
    spec_file = uneven("any")["spec"]
    spawn(_every_mesh, 4, tmp_path, spec_file, starts=2 * len(MESHES))
    whole = Decoder(load_spec(spec_file))
    whole.init_weights(3)
    quiet()
    for name in MESHES:
        reader = Reader(tmp_path / name)
        into = {f"model/{n}": torch.full_like(p, 7.0) for n, p in whole.named_parameters()}
        assert {n: tuple(shape) for n, (shape, _) in reader.tensors.items()} == {
            n: tuple(t.shape) for n, t in into.items()
        }
        reader.load(into)
        assert all(torch.equal(into[f"model/{n}"], p) for n, p in whole.named_parameters())


@pytest.mark.slow
def test_a_run_goes_on_from_four_ranks_to_two_to_one(uneven: Options, train: Train, tmp_path: Path) -> None:
    """Each time otherwise divided, the order of tokens and the losses stay those of the run on one rank."""
    data = uneven("many", steps=8)
    train({**data, "out": str(tmp_path / "one")})
    out = {"out": data["out"]}
    on_ranks(4, (data, {"stop_after": 2}), ({**out, "parallel": {"tp": 2}}, {"resume": True, "stop_after": 4}))
    on_ranks(2, ({**out, "parallel": {"tp": 1, "pp": 2}, "batch": {"micro": 1}}, {"resume": True, "stop_after": 6}))
    train({**out, "parallel": {"pp": 1}, "batch": {"micro": 4}}, resume=True)
    assert losses(data["out"]) == pytest.approx(losses(tmp_path / "one"), rel=3e-5)
    a, b = newest_of(tmp_path / "many"), newest_of(tmp_path / "one")
    assert checkpoint.read(a)["data"] == checkpoint.read(b)["data"]
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    begun = Decoder(load_spec(b))
    begun.init_weights(0)
    for name, p in begun.named_parameters():
        moved = torch.linalg.norm(y[name] - p.detach())
        assert torch.linalg.norm(x[name] - y[name]) <= 1e-2 * moved, name


# What is kept.


def test_the_best_step_is_kept_and_marked(options: Options, train: Train, tmp_path: Path) -> None:
    """A learning rate that ruins the model from the seventh step on: the validation loss is lowest before."""
    data = options(steps=12, validation__every=2, checkpoint__keep=1)
    train(data, stop_after=6)
    train({"out": data["out"], "optimizer": {"lr": 5.0}}, resume=True)
    out = tmp_path / "run"
    scored = {m["step"]: m["val_loss"] for m in history(out / "training" / "train.jsonl") if "val_loss" in m}
    best = min(scored, key=lambda step: scored[step])
    assert best < 12
    assert [number(p) for p in checkpoint.steps(out)] == [best, 12]
    assert (out / "checkpoints" / "best").resolve() == out / "checkpoints" / f"step-{best:06d}"
    assert checkpoint.read(newest_of(out))["best"] == [best, scored[best]]
    found = checkpoint.best_of(checkpoint.read(newest_of(out)), newest_of(out))
    assert found == checkpoint.Best(best, scored[best])
    load_decoder(out / "checkpoints" / "best")


def test_a_run_goes_on_knowing_its_best_step(options: Options, train: Train, tmp_path: Path) -> None:
    data = options(steps=8, validation__every=2, checkpoint__keep=1)
    train(data, stop_after=4)
    state = newest_of(tmp_path / "run") / checkpoint.STATE
    saved = json.loads(state.read_text())
    assert saved["best"][0] == 4
    state.write_text(json.dumps({**saved, "best": [4, 0.01]}))  # better than anything to come
    train({"out": data["out"]}, resume=True)
    assert [number(p) for p in checkpoint.steps(tmp_path / "run")] == [4, 8]
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step-000004"


def test_the_clock_saves_too(options: Options, train: Train, tmp_path: Path) -> None:
    train(options(steps=6, checkpoint__minutes=1e-9, checkpoint__keep=9, validation__every=100))
    assert [number(p) for p in checkpoint.steps(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_weights_of_16_bits_are_published_and_all_bits_resumed(options: Options, train: Train, tmp_path: Path) -> None:
    common = {"steps": 4, "checkpoint__dtype": "bfloat16", "checkpoint__shard_size": 3e-5}
    train(options("whole", **common))
    parts = options("parts", **common)
    train(parts, stop_after=2)
    train({"out": parts["out"]}, resume=True)
    assert_same(newest_of(tmp_path / "whole"), newest_of(tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("model-step-000004-*-of-*.safetensors"))) > 1
    decoder = load_decoder(tmp_path / "parts")
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    trained = saved_tensors(newest_of(tmp_path / "parts"))
    assert all(torch.equal(trained[f"model/{n}"].bfloat16(), p) for n, p in decoder.named_parameters())


# Beginning and going on.


def cli(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m train` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "train", *argv],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def written(data: dict[str, Any], folder: Path) -> str:
    """A configuration as a file."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return str(file)


def test_whether_a_run_goes_on_is_seen_from_its_folder(options: Options, train: Train, tmp_path: Path) -> None:
    c = config.layered(options(steps=4))
    out = tmp_path / "run"
    assert session.going_on(c) == (False, False)
    train(options(steps=4), stop_after=2)
    assert session.going_on(c) == (True, False)
    shutil.rmtree(out / "checkpoints" / "step-000002")
    assert session.going_on(c) == (False, False)  # weights lie there, and nothing to go on from
    (out / "model.safetensors").unlink()
    for name in ("spec.yaml", "tokenizer.json", "tokenizer_config.json"):
        (out / name).unlink()
    (out / "checkpoints" / ".step-000003.partial").mkdir()
    assert session.going_on(c) == (False, True)


def test_what_torchrun_starts_again_is_its_own_run(
    options: Options, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = options(steps=4)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not session.restarted(data)  # nothing is there yet
    train(data, stop_after=2)
    assert session.restarted(data)
    assert not session.restarted({**data, "seed": 1})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not session.restarted(data)


@pytest.mark.slow
def test_one_command_begins_goes_on_and_ends(options: Options, tmp_path: Path) -> None:
    file = written(options(steps=6), tmp_path)
    strict = cli("--config", file, "--resume")
    assert strict.returncode == 2 and "no run to resume" in strict.stderr
    first = cli("--config", file, "--continue", "--stop-after", "3")
    assert first.returncode == 0, first.stderr
    second = cli("--config", file, "--continue")
    assert second.returncode == 0 and "resumed: step 3 of 6" in second.stdout, second.stderr
    third = cli("--config", file, "--continue")
    assert third.returncode == 0 and "trained 6 steps" in third.stdout
    restarted = cli("--config", file, "--force", TORCHELASTIC_RESTART_COUNT="1")
    assert restarted.returncode == 0 and "resumed: step 6 of 6" in restarted.stdout
    both = cli("--config", file, "--force", "--continue")
    assert both.returncode == 2 and "--continue and --force contradict each other" in both.stderr


# Weights to begin with.


@pytest.fixture
def llama(options: Options, train: Train, tmp_path: Path) -> Path:
    """A Hugging Face folder with a model of random weights and a tokenizer."""
    import transformers

    train(options("tokenizer", steps=1))
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    c = transformers.LlamaConfig(
        vocab_size=303, hidden_size=40, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, rope_parameters=rope, bos_token_id=0, eos_token_id=0,
        pad_token_id=None,
    )  # fmt: skip
    folder = tmp_path / "llama"
    transformers.LlamaForCausalLM(c).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "tokenizer" / name, folder / name)
    return folder


def first_batch(c: config.TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and targets [B, T] of a run's first step."""
    spec = init.spec_of(c)
    _, data = text(c, spec, Console(quiet=True), init.tokenizer_of(c))
    ranks = parallel.Ranks(0, 1, torch.device("cpu"))
    batches, _ = feed(c, data, c.data.length or spec.context, ranks)
    [rows], _ = batches.next(c.batch.sequences, c.batch.sequences)
    batches.close()
    return torch.from_numpy(rows.ids), torch.from_numpy(rows.targets)


def test_a_hugging_face_folder_is_fine_tuned_from_its_own_loss(
    llama: Path, options: Options, train: Train, tmp_path: Path
) -> None:
    """Its spec, tokenizer and weights, in sequences shorter than its context: the first loss is transformers' own."""
    import transformers

    data = options("tuned", init=str(llama), steps=2, data__length=24)
    del data["spec"]
    train(data)
    ids, targets = first_batch(config.layered(data))
    assert ids.shape == (4, 24)
    model = transformers.LlamaForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert losses(data["out"])[0] == pytest.approx(expected, rel=1e-5)
    spec = load_spec(data["out"])
    assert (spec.vocab_size, spec.width, spec.context) == (303, 40, 96)
    # The tuned model and a GGUF of it begin where it ended.
    again = {**options("again", init=data["out"], steps=1, data__length=24)}
    del again["spec"]
    train(again)
    with torch.no_grad():
        tuned = load_decoder(data["out"])
        ids, targets = first_batch(config.layered(again))
        expected = float(tuned(ids, targets)) / targets.numel()
    assert losses(again["out"])[0] == pytest.approx(expected, rel=1e-6)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tuned" / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_not_that_of_the_weights_is_refused(
    llama: Path, options: Options, train: Train, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name, content in tokenizer.train(["another text " * 50], 303, 96).files().items():
        (other / name).write_bytes(content)
    data = options(init=str(llama), data__length=24)
    del data["spec"]
    with pytest.raises(UserError, match=r"tokenizer: .*other: .*llama has other tokens than the run's tokenizer: \d+"):
        train({**data, "tokenizer": str(other)})
    assert init.tokenizer_of(config.layered({**data, "tokenizer": str(tmp_path / "tokenizer")})) is None
    (llama / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"init: .*llama has no tokenizer \(give .*--tokenizer"):
        train(data)
    assert not (tmp_path / "run" / "training").exists()


def test_a_spec_that_the_weights_do_not_fit_is_refused(llama: Path, options: Options, tmp_path: Path) -> None:
    from spec.load import dump

    c = config.layered({**options(init=str(llama))})
    with pytest.raises(
        UserError, match=r"mini\.yaml is not what the weights of .*llama were trained with: embed\.weight"
    ):
        init.spec_of(c)
    own = init.spec_of(config.layered({"init": str(llama)}))
    file = tmp_path / "own.yaml"
    given = config.layered({"init": str(llama), "spec": str(file)})
    file.write_text(dump(own).replace("context: 96", "context: 4096").replace("name: llama", "name: longer"))
    assert init.spec_of(given).context == 4096
    file.write_text(dump(own).replace("theta: 500.0", "theta: 501.0"))
    with pytest.raises(UserError, match=r"layers\[0\]\.attention\.position\.theta 501\.0, and there 500\.0"):
        init.spec_of(given)
    with pytest.raises(UserError, match=r"init: .*nothing: no such folder or file"):
        init.spec_of(config.layered({"init": str(tmp_path / "nothing")}))


# Exports.


@pytest.mark.parametrize(
    ("target", "said"),
    [("gguff:q4", "no such backend"), ("gguf:q5", "no such precision level"), ("hf", "alibi, which transformers")],
)
def test_an_export_that_cannot_be_is_refused_at_the_start(
    target: str, said: str, options: Options, train: Train, tmp_path: Path
) -> None:
    data = options(checkpoint__export=target)
    alibi = UNEVEN.replace("sinks: true", "position: {kind: alibi}, softcap: 2.0")
    Path(data["spec"]).write_text(alibi, encoding="utf-8")
    with pytest.raises(UserError, match=rf"checkpoint\.export: {target}: .*{said}|checkpoint\.export: hf: .*which"):
        train(data)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_checkpoints_are_exported_beside_the_training(options: Options, train: Train, tmp_path: Path) -> None:
    """What fails is said and stops nothing; what is done is a verified artifact of its step."""
    common = {"checkpoint__export": "hf:f32, gguf:q8", "checkpoint__export_every": 4, "checkpoint__keep": 1}
    result = train(options(steps=10, **common, checkpoint__best=False))
    assert result.step == 10
    log = (tmp_path / "run" / "training" / "export.log").read_text()
    found = {p.parent.name for p in (tmp_path / "run" / "exports").glob("step-*/mini.f32-hf")}
    assert "step-000010" in found and found <= {"step-000004", "step-000008", "step-000010"}, log
    assert (tmp_path / "run" / "exports" / "step-000010" / "mini.q8.gguf").is_file(), log
    with open_source(tmp_path / "run" / "exports" / "step-000010" / "mini.f32-hf") as source:
        trained = load_file(tmp_path / "run" / "model.safetensors")
        assert all(torch.equal(torch.from_numpy(source.tensor(n)), trained[n]) for n in source.names())
    assert [number(p) for p in checkpoint.steps(tmp_path / "run")][-1] == 10


# One run at a time.


HOLD = """
import sys, torch
from pathlib import Path
from train.checkpoint import alone
from train.parallel import Ranks
with alone(Path(sys.argv[1]), Ranks(0, 1, torch.device("cpu"))):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_run_at_a_time(
    options: Options, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused before it touches anything; what was killed holds nothing."""
    monkeypatch.setattr(lock, "WAIT", 0.2)
    out = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"run: another run is training there \(wait for its end, or .*--out\)"):
            train(options(steps=1))
        assert [p.name for p in out.iterdir()] == [lock.LOCK]
        other.kill()
    assert train(options(steps=1)).step == 1
    with pytest.raises(UserError, match="no such file"):
        train(options("refused", data__source=str(tmp_path / "nowhere")))
    assert not (tmp_path / "refused").exists()
