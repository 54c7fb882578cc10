"""The loop: resuming, accumulation, what is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from backends.torch.checkpoint import empty
from spec.errors import UserError
from spec.load import load as load_spec
from spec.params import params
from train import checkpoint, config, loop, optim, ready, session
from train.checkpoint import newest, number
from train.data.feed import feed
from train.engine import Whole
from train.parallel import Degrees, Ranks
from train.tests.conftest import saved_tensors, write_text
from train.watch import TIMING, history

Options = Callable[..., dict[str, Any]]
Train = Callable[..., session.Result]


def journal(out: Path | str) -> list[dict[str, Any]]:
    """The steps of a run without what depends on the clock."""
    steps = history(Path(out) / "training" / "train.jsonl")
    return [{k: v for k, v in m.items() if k not in TIMING} for m in steps]


def assert_equal(a: Path, b: Path) -> None:
    """Two checkpoints hold the same bits."""
    x, y = saved_tensors(a), saved_tensors(b)
    assert x.keys() == y.keys()
    different = [k for k in x if not torch.equal(x[k], y[k])]
    assert not different
    assert (a / checkpoint.STATE).read_text() == (b / checkpoint.STATE).read_text()


@pytest.mark.parametrize("document_mask", [False, True], ids=["packed", "masked"])
def test_resuming_twice_is_bit_exact(document_mask: bool, options: Options, train: Train, tmp_path: Path) -> None:
    common = {"steps": 9, "data__document_mask": document_mask, "validation__every": 3, "checkpoint__keep": 1}
    train(options("whole", **common))
    halves = options("parts", **common)
    train(halves, stop_after=4)
    assert number(newest(tmp_path / "parts") or Path()) == 4
    train({"out": halves["out"]}, resume=True, stop_after=6)
    result = train({"out": halves["out"]}, resume=True)
    assert (result.step, result.steps) == (9, 9)
    whole, parts = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert whole is not None and parts is not None
    assert_equal(whole, parts)
    assert journal(tmp_path / "whole") == journal(tmp_path / "parts")
    assert len(journal(tmp_path / "parts")) == 9


def test_a_journal_that_ran_ahead_of_the_checkpoint_is_cut(options: Options, train: Train, tmp_path: Path) -> None:
    train(options(), stop_after=4)
    file = tmp_path / "run" / "training" / "train.jsonl"
    with file.open("a", encoding="utf-8") as f:
        f.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train({"out": str(tmp_path / "run")}, resume=True)
    assert [m["step"] for m in history(file)] == list(range(1, 9))
    assert history(file)[4]["loss"] != 1.0


def test_changed_data_is_detected_on_resume(options: Options, train: Train, tmp_path: Path) -> None:
    train(options(), stop_after=4)
    (tmp_path / "text" / "file03.txt").write_text("something else\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"--resume: the data or the tokenizer \(.*\) changed since step 4"):
        train({"out": str(tmp_path / "run")}, resume=True)


def test_another_spec_is_refused_on_resume(options: Options, train: Train, tmp_path: Path, spec_file: Path) -> None:
    train(options(), stop_after=2)
    other = tmp_path / "other.yaml"
    other.write_text(spec_file.read_text(encoding="utf-8").replace("depth: 2", "depth: 3"), encoding="utf-8")
    with pytest.raises(UserError, match="is not the spec that"):
        train({"out": str(tmp_path / "run"), "spec": str(other)}, resume=True)
    with pytest.raises(UserError, match=r"steps: 1, and .*run is at step 2 already"):
        train({"out": str(tmp_path / "run"), "steps": 1}, resume=True)
    with pytest.raises(UserError, match=r"init: .*run goes on from its own weights"):
        train({"out": str(tmp_path / "run"), "init": str(tmp_path / "other")}, resume=True)
    spec_file.unlink()  # the run has its own
    assert train({"out": str(tmp_path / "run")}, resume=True).step == 8


def test_an_existing_run_is_never_overwritten_by_chance(options: Options, train: Train, tmp_path: Path) -> None:
    train(options(), stop_after=2)
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"is already there \(--resume continues the run, --force replaces it"):
        train(options())
    train(options(steps=3), force=True)
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step-000003"]
    assert (tmp_path / "run" / "notes.txt").read_text(encoding="utf-8") == "mine"
    with pytest.raises(UserError, match="no run to resume"):
        train({"out": str(tmp_path / "elsewhere")}, resume=True)


def make_run(options: dict[str, Any]) -> loop.Run:
    """A run in this process, without its folder."""
    c = config.layered(options)
    spec = load_spec(c.spec)
    _, data = session.text(c, spec, Console(file=StringIO()))
    decoder = empty(spec, torch.float32, "cpu")
    decoder.init_weights(c.seed)
    decoder.train()
    torch.manual_seed(c.seed)
    ranks = Ranks(0, 1, torch.device("cpu"))
    return loop.Run(
        c,
        ranks,
        decoder,
        Whole(decoder, ranks, "float32"),
        optim.build(decoder, spec, c.optimizer),
        *feed(c, data, spec.context, ranks),
    )


def plain(options: Options, spec_file: Path, **fields: Any) -> dict[str, Any]:
    """Options without dropout, whose random numbers depend on the batch's shape."""
    spec_file.write_text(spec_file.read_text(encoding="utf-8").replace("  dropout: 0.1\n", ""), encoding="utf-8")
    return options(**fields)


def gradients(run: loop.Run) -> tuple[float, float, dict[str, torch.Tensor]]:
    loss, norm, _ = loop.gradients(run)
    return loss, float(norm), {n: p.grad.clone() for n, p in run.decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("document_mask", [False, True], ids=["packed", "masked"])
def test_accumulation_changes_nothing_but_rounding(document_mask: bool, options: Options, spec_file: Path) -> None:
    """The gradient of four passes is a sum of four in another order: each within a few n u of their magnitudes."""
    data = plain(options, spec_file, batch__sequences=8, data__document_mask=document_mask)
    one = gradients(make_run(data))
    four = gradients(make_run({**data, "batch": {"sequences": 8, "micro": 2}}))
    assert one[0] == pytest.approx(four[0], rel=1e-6)
    assert one[1] == pytest.approx(four[1], rel=1e-5)
    for name, grad in one[2].items():
        assert torch.linalg.norm(grad - four[2][name]) <= 1e-5 * torch.linalg.norm(grad), name


def test_a_step_with_nan_gradients_is_skipped_and_counted(options: Options) -> None:
    run = make_run(options())
    loop.train_step(run)
    before = {n: p.detach().clone() for n, p in run.decoder.named_parameters()}
    moments = {n: t.clone() for n, t in optim.state(run.optimizer).items()}
    weight = run.decoder.get_parameter("layers.0.mlp.up.weight")
    hook = weight.register_hook(lambda g: g * float("nan"))
    m = loop.train_step(run)
    hook.remove()
    assert (m.step, m.skipped, run.skipped_in_a_row) == (2, 1, 1)
    assert math.isnan(m.grad_norm)
    for n, p in run.decoder.named_parameters():
        assert torch.equal(p, before[n])
    assert moments["layers.0.mlp.up.weight/step"] == 1
    assert all(torch.equal(t, moments[n]) for n, t in optim.state(run.optimizer).items())
    m = loop.train_step(run)
    assert (m.step, m.skipped, run.skipped_in_a_row) == (3, 1, 0)
    assert math.isfinite(m.grad_norm)
    assert not torch.equal(weight, before["layers.0.mlp.up.weight"])


def test_a_run_that_diverged_ends_with_one_error(options: Options, train: Train) -> None:
    wild = {"optimizer__lr": 1e30, "optimizer__clip": None, "optimizer__max_skipped": 3, "checkpoint__every": 1}
    with pytest.raises(UserError, match=r"not finite for 3 steps in a row .* lower optimizer\.lr=1e\+30"):
        train(options(**wild, steps=40))


def test_a_run_learns_and_leaves_everything(options: Options, train: Train, tmp_path: Path) -> None:
    result = train(options(steps=60, validation__every=20))
    out = tmp_path / "run"
    steps = journal(out)
    assert [m["step"] for m in steps] == list(range(1, 61))
    assert steps[0]["loss"] == pytest.approx(math.log(300), abs=0.2)
    assert steps[-1]["loss"] < 4.5
    scored = [m["val_loss"] for m in steps if "val_loss" in m]
    assert len(scored) == 3 and scored[-1] < scored[0]
    m = result.metrics
    assert m is not None and m.val_loss == scored[-1]
    assert m.val_bits_per_byte is not None and 0.5 < m.val_bits_per_byte < 8
    assert (out / "training" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert config.parse(config.read(out / checkpoint.CONFIG)).steps == 60
    weights = load_file(out / "model.safetensors")
    spec = load_spec(out)
    assert {(p.name, p.shape) for p in params(spec)} == {(n, tuple(t.shape)) for n, t in weights.items()}
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_weights_begin_at_the_seed(options: Options, train: Train, tmp_path: Path) -> None:
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(options(out, seed=seed, steps=2))
    a, b, c = (load_file(tmp_path / out / "model.safetensors") for out in "abc")
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["embed.weight"], c["embed.weight"])
    assert journal(tmp_path / "a") == journal(tmp_path / "b")


def test_bfloat16_trains_close_to_float32(options: Options, train: Train, tmp_path: Path) -> None:
    train(options("wide", steps=20))
    train(options("half", steps=20, precision="bfloat16"))
    wide, half = journal(tmp_path / "wide"), journal(tmp_path / "half")
    assert half[-1]["loss"] == pytest.approx(wide[-1]["loss"], rel=0.02)
    assert half[-1]["loss"] != wide[-1]["loss"]
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"linear"}),
        ({"decay_embeddings": True}, {"linear", "embedding"}),
        ({"decay_norms": True}, {"linear", "gain"}),
    ],
)
def test_who_decays(fields: dict[str, bool], expected: set[str], spec_file: Path) -> None:
    spec = load_spec(spec_file)
    decoder = empty(spec, torch.float32, "cpu")
    roles = {id(decoder.get_parameter(p.name)): p.role for p in params(spec)}
    chosen = config.layered({"optimizer": fields}).optimizer
    groups = optim.build(decoder, spec, chosen).param_groups
    decayed = {roles[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == expected
    assert sum(len(g["params"]) for g in groups) == len(roles)


def test_batches_that_ranks_cannot_share_are_refused(options: Options, tmp_path: Path) -> None:
    c = config.layered(options(batch__sequences=3))
    with pytest.raises(UserError, match=r"batch\.sequences: 3 does not divide evenly over 2 ranks"):
        ready.check(c, load_spec(c.spec), Degrees(dp=2), torch.device("cpu"), tmp_path / "run", None)


def test_a_text_of_a_few_bytes_trains(options: Options, train: Train, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("to be or not to be\n", encoding="utf-8")
    result = train(options(data__source=str(tmp_path / "few.txt"), steps=2))
    assert result.step == 2 and result.metrics is not None and result.metrics.val_loss is None


def test_a_tokenizer_of_the_users_goes_into_the_checkpoint(options: Options, train: Train, tmp_path: Path) -> None:
    train(options("first", steps=1))
    result = train(options("second", steps=2, tokenizer=str(tmp_path / "first")), stop_after=1)
    with pytest.raises(UserError, match=r"tokenizer: .* was begun with another"):
        train({"out": str(result.out), "tokenizer": str(tmp_path / "elsewhere")}, resume=True)
    (tmp_path / "first").rename(tmp_path / "moved")
    assert train({"out": str(result.out)}, resume=True).step == 2
    (tmp_path / "moved").rename(tmp_path / "first")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (result.out / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    write_text(tmp_path / "text", seed=5)
    big = options("third", tokenizer=str(tmp_path / "first"))
    spec = Path(big["spec"])
    spec.write_text(spec.read_text(encoding="utf-8").replace("vocab_size: 300", "vocab_size: 280"), encoding="utf-8")
    with pytest.raises(UserError, match="vocab_size: 280 is fewer than the tokenizer's 300 tokens"):
        train(big)
