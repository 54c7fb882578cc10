"""Losses equal plain computations over whole logits in float64; teachers and the user's own files are held to rules.

Shapes: B sequences, T tokens, V vocab.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends.torch import loss as chunked
from backends.torch.checkpoint import load_decoder, save_weights
from backends.torch.model import Decoder
from backends.torch.modules import Head
from parity_tests.cases import FEATURES
from spec import Spec, parse
from spec.errors import SpecError, UserError
from spec.load import read_yaml
from train import config, losses, parallel
from train.data import tokenizer
from train.data.batches import Rows
from train.engine import Pipelined, Whole
from train.losses import user
from train.losses.objective import Distilled, Objective, Smoothed, Written
from train.parallel import Degrees, Ranks, Stage
from train.parallel.mesh import DIMENSIONS
from train.tests.conftest import SPEC

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "loss.py"
ALONE = Ranks(0, 1, CPU)
SCALE = 1 / 64

Options = Callable[..., dict[str, Any]]
Plain = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits, targets, the teacher's logits) -> summed loss, over whole logits."""


def smoothed(logits: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
    z = logits.logsumexp(-1)[targets != -100].square().sum()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1) + 0.01 * z


def kl(p: Tensor, q: Tensor, targets: Tensor, temperature: float) -> Tensor:
    p, q = ((t / temperature).softmax(-1)[targets != -100] for t in (p, q))
    return temperature**2 * (p * (p / q).log()).sum()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def loss_config(**fields: Any) -> config.Loss:
    return config.Loss(kind="distillation", teacher="folder", **fields)


def distilled(teacher: Decoder, text: Objective, **fields: Any) -> Objective:
    return Distilled(CPU, text, teacher, loss_config(**fields))


OBJECTIVES: dict[str, tuple[Callable[[Decoder], Objective], Plain]] = {
    "cross_entropy": (lambda t: Objective(CPU), lambda x, y, t: cross_entropy(x, y)),
    "smoothed": (
        lambda t: Smoothed(CPU, 0.1, 0.0),
        lambda x, y, t: F.cross_entropy(x, y, reduction="sum", label_smoothing=0.1),
    ),
    "z": (
        lambda t: Smoothed(CPU, 0.0, 0.5),
        lambda x, y, t: cross_entropy(x, y) + 0.5 * x.logsumexp(-1)[y != -100].square().sum(),
    ),
    "both": (lambda t: Smoothed(CPU, 0.1, 0.01), smoothed),
    "distilled": (
        lambda t: distilled(t, Objective(CPU), temperature=2.0, text_weight=0.5),
        lambda x, y, t: kl(t, x, y, 2.0) + 0.5 * cross_entropy(x, y),
    ),
    "reverse": (
        lambda t: distilled(t, Objective(CPU), divergence="reverse", temperature=0.7, text_weight=0.0),
        lambda x, y, t: kl(x, t, y, 0.7),
    ),
    "distilled_smoothed": (
        lambda t: distilled(t, Smoothed(CPU, 0.1, 0.01)),
        lambda x, y, t: kl(t, x, y, 1.0) + smoothed(x, y, t),
    ),
    "user": (
        lambda t: Written(CPU, user.load(f"{EXAMPLE}:focal", t.spec.vocab_size, CPU)),
        lambda x, y, t: -((1 - x.softmax(-1)) ** 2 * x.log_softmax(-1))[y != -100].gather(-1, y[y != -100, None]).sum(),
    ),
}


def decoder(spec: Spec, seed: int) -> Decoder:
    model = Decoder(spec).double()
    model.init_weights(seed)
    with torch.no_grad():  # initial logits are nearly flat
        for p in model.parameters():
            p *= 3
    return model


@pytest.mark.parametrize("feature", ["gemma2", "head_bias"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_equals_a_computation_over_whole_logits(name: str, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a chunk, masked targets, packed documents; a tied head with scale and softcap, or one with a bias."""
    spec = FEATURES[feature]
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", 3 * spec.vocab_size)
    monkeypatch.setattr(chunked, "LEAST_ROWS", 1)
    monkeypatch.setattr(chunked, "LEAST_ROWS", 1)
    student, teacher = decoder(spec, 1), decoder(FEATURES["gemma2"], 2).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, spec.vocab_size, (2, 13), generator=g)
    targets = torch.where(torch.rand(2, 13, generator=g) < 0.3, -100, ids.roll(-1, 1))
    segments = (torch.arange(13) >= 5).long().expand(2, -1)
    make, plain = OBJECTIVES[name]
    objective = make(teacher)

    logits, taught = (m(ids, segments=segments).flatten(0, 1) for m in (student, teacher))
    expected = plain(logits, targets.flatten(), taught)
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    extras = objective.extras(ids, segments)
    found = student(ids, targets, segments=segments, criterion=objective, extras=extras)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for p, a, b in zip(
        student.parameters(), torch.autograd.grad(found, list(student.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, p=p: f"{p.shape}: {m}")
    told = dict(zip(objective.parts, objective.take().tolist(), strict=True))
    if told:  # added up in float32
        assert told["cross_entropy"] == pytest.approx(cross_entropy(logits, targets.flatten()).item(), rel=1e-6)
        assert not objective.take().any()


def test_masked_logits_are_never_read_into_a_sum() -> None:
    """A masked row may hold anything, infinity too."""
    logits = torch.randn(4, 9, requires_grad=True)
    targets = torch.tensor([3, -100, 0, -100])
    for objective in (Smoothed(CPU, 0.1, 1e-3), Objective(CPU)):
        poisoned = torch.where((targets == -100)[:, None], torch.full((), 3e38), logits)
        a = torch.autograd.grad(objective(logits, targets), logits)[0]
        b = torch.autograd.grad(objective(poisoned, targets), logits)[0]
        assert torch.equal(a, b)
        assert not a[1].any() and not a[3].any()


class Peak(TorchDispatchMode):
    """Bytes of the storages that were made inside the block and live at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.live:
                storage = t.untyped_storage()
                self.live.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


@pytest.mark.parametrize(("name", "chunks"), [("cross_entropy", 3), ("both", 3), ("distilled_smoothed", 8)])
def test_a_vocabulary_of_256k_needs_a_few_chunks(name: str, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen: the peak is that of one chunk's own arrays, with the weight's gradient and its sum beside them."""
    vocab, width, rows = 2**18, 4, 8
    monkeypatch.setattr(chunked, "LEAST_ROWS", 1)
    monkeypatch.setitem(chunked.CHUNK_ELEMENTS, "cpu", rows * vocab)
    shape = {"vocab_size": vocab, "width": width, "depth": 1, "context": 32}
    block = {"block": {"attention": {"heads": 2}, "mlp": {"hidden": 8}}}
    spec = parse({"version": 1, "name": "wide", **shape, **block}, "wide")
    head = Head(spec, torch.nn.Embedding(1, 1))
    torch.nn.init.normal_(head.weight, std=0.1)
    teacher: Any = SimpleNamespace(spec=spec, head=head)
    objective = OBJECTIVES[name][0](teacher)
    x, targets = torch.randn(1, 16 * rows, width, requires_grad=True), torch.randint(0, vocab, (1, 16 * rows))
    extras = [torch.randn(1, 16 * rows, width)] if objective.parts[1:] else []
    with Peak() as peak:
        head(x, targets, None, objective, extras).backward()
    chunk, gradient = rows * vocab * 4, vocab * width * 4
    assert peak.most <= chunks * chunk + 3 * gradient + 2**20


def write_loss(folder: Path, body: str) -> str:
    file = folder / "mine.py"
    file.write_text(f"import torch\nimport torch.nn.functional as F\n\n\n{body}\n", encoding="utf-8")
    return f"{file}:f"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def g(x, y):\n    return x.sum()", "has no function or class f (known: g)"),
        ("f = 3", "has no function or class f (nor any)"),
        ("def f(x):\n    return x.sum()", "f(x) cannot be called: too many positional arguments (a loss takes (logits"),
        ("def f(x, y, weights):\n    return x.sum()", "cannot be called: missing a required argument: 'weights'"),
        ("def f(x, y):\n    return F.cross_entropy(x, y, reduction='none')", "returned shape [4], no scalar tensor"),
        ("def f(x, y):\n    return 1.0", "returned a float, no scalar tensor"),
        ("def f(x, y):\n    return x.argmax(-1).sum()", "returned shape [], no scalar tensor"),
        ("def f(x, y):\n    return x.detach().sum()", "returned a number that has no gradient"),
        ("def f(x, y):\n    return F.cross_entropy(x, y)", "is no sum over targets"),
        ("def f(x, y):\n    return (x * 0 + float('nan')).sum()", "is no sum over targets: nan for four rows"),
        ("def f(x, y):\n    return x.logsumexp(-1).sum()", "for a masked target (-100), which must add nothing"),
        (
            "def f(x, y):\n    return -x.log_softmax(-1).gather(1, y[:, None]).sum()",
            "mine.py:6: RuntimeError: index -100",
        ),
        ("def f(x, y:\n    return x", "mine.py:5: SyntaxError"),
        ("raise RuntimeError('no')\ndef f(x, y): ...", "mine.py:5: RuntimeError: no"),
    ],
)
def test_a_function_that_is_no_loss_is_refused_in_one_line(body: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        user.load(write_loss(tmp_path, body), 50, CPU)
    assert said in str(e.value)
    assert str(e.value).startswith("loss.kind: ") and "\n" not in str(e.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss\.kind: .*none\.py: no such file"):
        user.load(f"{tmp_path / 'none.py'}:f", 50, CPU)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "crossentropy"}, "loss.kind: 'crossentropy' is no loss (did you mean cross_entropy?"),
        ({"kind": "distillation"}, "loss.teacher: is missing, and loss.kind is distillation"),
        ({"teacher": "x"}, "is for distillation, and loss.kind is cross_entropy"),
        ({"temperature": 2}, "loss.temperature: 2.0 is for distillation"),
        ({"kind": "a/mine.py:f", "z": 1e-4}, "loss.z: 0.0001 is for cross_entropy and distillation"),
        ({"kind": "a/mine.py:f", "label_smoothing": 0.1}, "loss.label_smoothing: 0.1 is for cross_entropy"),
        (
            {"kind": "distillation", "teacher": "x", "text_weight": 0, "label_smoothing": 0.1},
            "loss.label_smoothing: 0.1 belongs to the cross-entropy, and loss.text_weight is 0",
        ),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as e:
        config.layered({"loss": fields})
    assert said in str(e.value)


def test_paths_are_absolute_since_a_run_may_be_resumed_elsewhere() -> None:
    c = config.layered({"loss": {"kind": "distillation", "teacher": "hf:owner/name"}})
    assert c.loss.teacher == "hf:owner/name"
    c = config.layered({"loss": {"kind": "distillation", "teacher": "runs/large"}})
    assert c.loss.teacher == str(Path.cwd() / "runs/large")
    c = config.layered({"loss": {"kind": "mine.py:f"}})
    assert c.loss.kind == f"{Path.cwd() / 'mine.py'}:f"
    assert config.parse(read_yaml(config.dump(c), "")) == c


@pytest.fixture
def teacher_run(options: Options, train: Callable[..., Any], tmp_path: Path) -> Path:
    """A run of six steps to learn from."""
    train(options("large", steps=6))
    return tmp_path / "large"


def journal(run: Path) -> list[dict[str, Any]]:
    from train.watch import history

    return history(run / "training" / "train.jsonl")


def test_a_run_learns_from_a_teacher(
    teacher_run: Path, options: Options, train: Callable[..., Any], tmp_path: Path
) -> None:
    """From its own weights too: then nothing diverges, and only the text is left. Resuming is bit for bit."""
    distillation = {"kind": "distillation", "teacher": str(teacher_run), "temperature": 2.0}
    common = {"tokenizer": str(teacher_run), "loss": distillation, "steps": 6}
    train(options("small", **common))
    steps = journal(tmp_path / "small")
    for m in steps:
        assert m["loss"] == pytest.approx(m["cross_entropy"] + m["divergence"], rel=1e-5)
        assert m["divergence"] > 0
    assert steps[-1]["divergence"] < steps[0]["divergence"]
    train(options("again", **common), stop_after=3)
    train({"out": str(tmp_path / "again")}, resume=True)
    one, two = (load_decoder(tmp_path / n) for n in ("small", "again"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_run_minimises_what_a_file_of_ones_own_says(
    options: Options, train: Callable[..., Any], tmp_path: Path
) -> None:
    train(options("mine", loss={"kind": f"{EXAMPLE}:focal"}, steps=2))
    for m in journal(tmp_path / "mine"):
        assert 0 < m["loss"] < m["cross_entropy"]


def test_nothing_diverges_from_oneself(teacher_run: Path) -> None:
    tok, student = tokenizer.load(teacher_run), load_decoder(teacher_run).eval()
    c = config.layered({"spec": str(teacher_run), "loss": {"kind": "distillation", "teacher": str(teacher_run)}})
    objective = losses.build(losses.Setting(c, student.spec, tok, 16, torch.float32, ALONE))
    ids = torch.randint(0, 300, (2, 16))
    total = student(ids, ids, criterion=objective, extras=objective.extras(ids, None))
    plain, divergence = objective.take().tolist()
    assert total.item() == pytest.approx(plain, rel=1e-6)
    assert abs(divergence) < 1e-3


def test_a_teacher_comes_from_a_hugging_face_folder_or_a_gguf_file(teacher_run: Path, tmp_path: Path) -> None:
    """What is converted without loss teaches the same."""
    from convert.pipeline import convert

    tok, spec = tokenizer.load(teacher_run), load_decoder(teacher_run).spec
    ids = torch.randint(0, 300, (2, 16))
    found = []
    for n, target in enumerate(("", "hf", "gguf")):
        path = teacher_run
        if target:
            path = tmp_path / ("teacher.gguf" if target == "gguf" else "teacher")
            convert(teacher_run, target, "f32", path, verify=False)
        c = config.layered({"loss": {"kind": "distillation", "teacher": str(path)}})
        objective = losses.build(losses.Setting(c, spec, tok, 16, torch.float32, ALONE))
        found.append(objective.extras(ids, None)[0])
        assert n == 0 or torch.allclose(found[0], found[n], rtol=0, atol=1e-5), target


def test_a_teacher_that_does_not_fit_is_refused(teacher_run: Path, tmp_path: Path) -> None:
    tok, model = tokenizer.load(teacher_run), load_decoder(teacher_run)
    spec = model.spec

    def said(path: Path, spec: Spec = spec, length: int = 16) -> str:
        c = config.layered({"loss": {"kind": "distillation", "teacher": str(path)}})
        with pytest.raises(UserError) as e:
            losses.build(losses.Setting(c, spec, tok, length, torch.float32, ALONE))
        assert "\n" not in str(e.value)
        return str(e.value)

    def folder(name: str, text: str | None) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "spec.yaml").write_text((teacher_run / "spec.yaml").read_text(encoding="utf-8"), encoding="utf-8")
        save_weights(model, path / "model.safetensors")
        if text is not None:
            (path / "tokenizer.json").write_text(text, encoding="utf-8")
            config_file = "tokenizer_config.json"
            (path / config_file).write_bytes((teacher_run / config_file).read_bytes())
        return path

    other = parse({**read_yaml(SPEC, ""), "vocab_size": 301}, "")
    assert "has 300 logits, and the spec has vocab_size 301 (set it to 300)" in said(teacher_run, spec=other)
    assert "has a context of 32 tokens, and sequences have 64 (data.length 32)" in said(teacher_run, length=64)
    assert "has no tokenizer to compare" in said(folder("without", None))
    data = json.loads(tok.json)
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    swapped = folder("swapped", json.dumps(data))
    assert "has other tokens than the run's tokenizer: 2 differ ('a', 'b'); give the run" in said(swapped)
    assert f"--tokenizer {swapped}" in said(swapped)
    data = json.loads(tok.json)
    data["model"]["merges"] = []
    assert "cuts text into tokens otherwise than the run's tokenizer" in said(folder("cut", json.dumps(data)))
    assert f"loss.teacher: {tmp_path / 'nowhere'}: no such folder or file" in said(tmp_path / "nowhere")


def _student(spec: Spec, teacher: Path, ranks: Ranks) -> tuple[Any, Decoder]:
    """An engine that distils, over a decoder in float64, in parts where there are several ranks."""
    model = decoder(spec, 1).train()
    if ranks.degrees.pp > 1:
        model.keep(parallel.spans(spec, 2)[ranks.place("pp")])
    if ranks.world > 1:
        parallel.shard(model, ranks, "float32")
    c = config.layered({"loss": {"kind": "distillation", "teacher": str(teacher), "z": 1e-3}})
    tok = tokenizer.load(teacher)
    objective = losses.build(losses.Setting(c, spec, tok, 32, torch.float64, ranks))
    if ranks.degrees.pp == 1:
        return Whole(model, ranks, "float32", criterion=objective), model
    return Pipelined(model, ranks, Stage(model, ranks, "1f1b", torch.float64), criterion=objective), model


def _distributed(rank: int, folder: str, teacher: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (4, 33), generator=g)
    targets = torch.where(torch.rand(4, 32, generator=g) < 0.3, -100, ids[:, 1:])
    segments = (torch.arange(32) >= 11).long().expand(4, -1)
    spec = FEATURES["gemma2"].model_copy(update={"vocab_size": 300, "head": FEATURES["llama"].head})
    whole, reference = _student(spec, teacher, ALONE)

    def rows(which: slice) -> Rows:
        return Rows(*(t[which].contiguous().numpy() for t in (ids[:, :-1], targets, segments)))

    expected = whole.backward([rows(slice(0, 4))], SCALE).item()
    sums = whole.criterion.take()
    for degrees in (Degrees(dp=2), Degrees(tp=2), Degrees(pp=2)):
        mesh = init_device_mesh("cpu", tuple(getattr(degrees, d) for d in DIMENSIONS), mesh_dim_names=DIMENSIONS)
        engine, model = _student(spec, teacher, Ranks(rank, 2, CPU, degrees, mesh))
        mine = range(4)[rank::2] if degrees.dp == 2 else range(4)
        found = engine.backward([rows(slice(n, n + 1)) for n in mine], SCALE).double()
        told = engine.criterion.take()
        for t in (found, told):
            dist.all_reduce(t)
        assert found.item() == pytest.approx(expected, rel=1e-6), degrees
        torch.testing.assert_close(told, sums, rtol=1e-5, atol=0)
        own = dict(reference.named_parameters())
        for n, p in model.named_parameters():
            wanted = own[n].grad
            assert p.grad is not None and wanted is not None
            # sums over ranks round in float32 at most
            assert torch.linalg.norm(parallel.whole(p.grad) - wanted) <= 1e-6 * torch.linalg.norm(wanted), n
    dist.destroy_process_group()


def test_two_ranks_distil_as_one_does(teacher_run: Path, tmp_path: Path) -> None:
    """The teacher in shards; on ranks that have half of each row; on the last stage of a pipeline."""
    mp.spawn(_distributed, (str(tmp_path), teacher_run), nprocs=2)  # type: ignore[attr-defined]
