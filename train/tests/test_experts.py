"""Routers' losses against their formulas in float64 by autograd, however a batch is cut; grouped products.

Shapes: B rows, T tokens, E experts, k chosen ones, N rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from backends.torch.model import Decoder
from backends.torch.modules import GroupedLinear, Router
from parity_tests.cases import FEATURES, random_weights
from spec import Spec
from spec.config import MoE
from spec.errors import UserError
from spec.load import load as load_spec
from train import parallel
from train.config import Experts
from train.data.batches import Rows
from train.engine import Pipelined, Whole
from train.losses import Losses
from train.losses.routers import Routers, check, routers_of
from train.parallel import Degrees, Ranks, Stage
from train.parallel.mesh import DIMENSIONS
from train.tests.conftest import SPEC

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
NAMES = ("moe", "moe_sigmoid", "moe_plain_scores", "moe_sinks", "moe_one")
BALANCE, Z = 0.3, 0.02
SETTINGS = Experts(balance=BALANCE, z=Z)
SCALE = 1 / 64
"""Exact in float32, as the routers have it."""
BOUND = 1e-11
"""Of a float64 gradient's error, in shares of the largest gradient's norm."""


def build(name: str, settings: Experts = SETTINGS) -> tuple[Decoder, Routers]:
    spec = FEATURES[name]
    model = Decoder(spec).double().train()
    model.load_state_dict({n: torch.from_numpy(w) for n, w in random_weights(spec).items()})
    found = routers_of(model, settings, ALONE)
    assert found is not None
    return model, found


def batch(spec: Spec, rows: int = 4, tokens: int = 24) -> Rows:
    """Rows of documents of several lengths, some targets masked."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, spec.vocab_size, (rows, tokens), generator=g)
    targets = torch.where(torch.rand(rows, tokens, generator=g) < 0.2, -100, ids.roll(-1, 1))
    segments = (torch.rand(rows, tokens, generator=g) < 0.15).cumsum(1)
    return Rows(ids.numpy(), targets.numpy(), segments.numpy())


def part(rows: Rows, which: Any) -> Rows:
    return Rows(*(None if a is None else a[which] for a in (rows.ids, rows.targets, rows.segments)))  # type: ignore[arg-type]


def without_documents(rows: Rows) -> Rows:
    return Rows(rows.ids, rows.targets, None)


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {n: parallel.whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = BOUND) -> None:
    largest = max(float(g.norm()) for g in wanted.values())
    for n, g in wanted.items():
        assert float((found[n] - g).norm()) <= bound * largest, n


def plain_losses(m: MoE, router: Router, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Balance loss and z-loss of one layer's logits [B, T, E], document by document as the papers have them."""
    scores = logits.softmax(-1) if m.router.score == "softmax" else logits.sigmoid()
    ranked = scores.detach() + (0 if router.correction is None else router.correction.double())
    balance, z = logits.new_zeros(()), logits.new_zeros(())
    for b in range(len(rows.ids)):
        segments = torch.zeros(rows.ids.shape[1]) if rows.segments is None else torch.from_numpy(rows.segments[b])
        for document in segments.unique():
            tokens = (segments == document) & torch.from_numpy(rows.targets[b] != -100)
            n = int(tokens.sum())
            if n == 0:
                continue
            chosen = ranked[b, tokens].topk(m.router.top_k).indices
            f = F.one_hot(chosen, m.experts).double().sum((0, 1)) * m.experts / (m.router.top_k * n)
            p = (scores[b, tokens] / scores[b, tokens].sum(-1, keepdim=True)).mean(0)
            balance = balance + n * (f * p).sum()
            z = z + logits[b, tokens].exp().sum(-1).log().square().sum()
    return balance, z


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formulas_by_autograd(name: str, documents: bool) -> None:
    model, routers = build(name)
    rows = batch(model.spec)
    rows = rows if documents else without_documents(rows)
    seen: list[tuple[Router, Tensor]] = []
    hooks = [r.register_forward_hook(lambda m, _, out: seen.append((m, out))) for r in routers.own.values()]  # type: ignore[arg-type]
    ids, targets, segments = rows.tensors(CPU)
    total = model(ids, targets, segments=segments)
    mixtures = [b.mlp for b in model.spec.layers if isinstance(b.mlp, MoE)]
    parts = [plain_losses(m, *found, rows) for m, found in zip(mixtures, seen, strict=True)]
    balance, z = (torch.stack(t).sum() for t in zip(*parts, strict=True))
    ((total + BALANCE * balance + Z * z) * SCALE).backward()
    wanted = gradients(model)
    for hook in hooks:
        hook.remove()

    model, routers = build(name)
    Whole(model, ALONE, "float32").backward([rows], SCALE)
    assert_close(gradients(model), wanted)
    added, figures = routers.collect(rows.valid, layers=True)
    weighted = (BALANCE * balance + Z * z).item() / rows.valid
    assert added == pytest.approx(weighted, rel=1e-6)
    assert figures["experts/balance"] == pytest.approx(balance.item() / rows.valid / len(mixtures), rel=1e-6)
    assert figures["experts/z"] == pytest.approx(z.item() / rows.valid / len(mixtures), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_accumulation_and_recomputation_change_nothing(name: str) -> None:
    """Four passes sum to one, and a layer that is computed again for its backward pass counts once."""
    spec = FEATURES[name]
    rows, results = batch(spec), []
    for cut, recomputed in ((4, False), (1, False), (2, True)):
        model, routers = build(name)
        if recomputed:
            for i, block in enumerate(model.layers):
                model.layers[i] = checkpoint_wrapper(block)
        pieces = [part(rows, slice(i, i + cut)) for i in range(0, 4, cut)]
        Whole(model, ALONE, "float32").backward(pieces, SCALE)
        grads = {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in gradients(model).items()}
        results.append((grads, routers.collect(rows.valid, layers=True)[1], routers.loads.clone()))
    for grads, figures, loads in results[1:]:
        assert_close(grads, results[0][0])
        assert torch.equal(loads, results[0][2])
        assert figures == pytest.approx(results[0][1], rel=1e-6)
    for load, layer in zip(results[0][2], routers.layers, strict=True):
        assert load.sum() == rows.valid * spec.layers[layer].mlp.router.top_k  # type: ignore[union-attr]


def test_packed_documents_weigh_what_padded_ones_do() -> None:
    """Three documents in one row, or each in a row of its own."""
    spec = FEATURES["moe"]
    lengths, g = (5, 9, 3), torch.Generator().manual_seed(1)
    documents = [torch.randint(0, spec.vocab_size, (n + 1,), generator=g) for n in lengths]
    packed = Rows(
        torch.cat([d[:-1] for d in documents])[None].numpy(),
        torch.cat([d[1:] for d in documents])[None].numpy(),
        torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].numpy(),
    )
    padded = Rows(
        torch.stack([F.pad(d[:-1], (0, 9 - len(d) + 1)) for d in documents]).numpy(),
        torch.stack([F.pad(d[1:], (0, 9 - len(d) + 1), value=-100) for d in documents]).numpy(),
        None,
    )
    found = []
    for rows in (packed, padded):
        model, routers = build("moe")
        Whole(model, ALONE, "float32").backward([rows], SCALE)
        found.append((gradients(model), routers.collect(rows.valid, layers=True)[1]))
    assert_close(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)


def test_figures_tell_a_collapsed_router() -> None:
    """All tokens on two of five experts, all scores equal."""
    model, routers = build("moe")
    with torch.no_grad():
        for r in routers.own.values():
            r.weight.zero_()
    rows = batch(model.spec)
    Whole(model, ALONE, "float32").backward([rows], SCALE)
    _, figures = routers.collect(rows.valid, layers=True)
    assert figures["experts/imbalance"] == figures["experts/imbalance_worst"] == pytest.approx(2.5)
    assert figures["experts/unused"] == pytest.approx(3 / 5)
    assert figures["experts/entropy"] == pytest.approx(torch.tensor(5.0).log().item())
    assert figures["experts/balance"] == pytest.approx(1)
    assert [n for n in figures if "/L" in n] == [f"experts/imbalance/L{i}" for i in routers.layers]
    assert routers.collect(rows.valid, layers=False)[1]["experts/unused"] == 1  # taken once


def test_validation_counts_nothing() -> None:
    model, routers = build("moe")
    Whole(model.eval(), ALONE, "float32").score(batch(model.spec))
    assert all(r.statistics is not None and r.statistics.grad is None for r in routers.own.values())


def test_the_correction_moves_against_the_load() -> None:
    model, routers = build("moe_sigmoid", Experts(bias_update=0.01))
    assert routers.balance.balance == 0
    before = [r.correction.clone() for r in routers.own.values() if r.correction is not None]
    rows = batch(model.spec)
    Whole(model, ALONE, "float32").backward([rows], SCALE)
    Losses(routers=routers).report(ALONE, torch.zeros(()), rows.valid, detailed=False)
    routers.correct()
    for n, (r, old) in enumerate(zip(routers.own.values(), before, strict=True)):
        load = routers.loads[n]
        assert r.correction is not None and len(set(load.tolist())) > 1
        torch.testing.assert_close(r.correction - old, 0.01 * (load.mean() - load).sign().double(), rtol=0, atol=1e-12)


def test_what_the_spec_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"experts\.balance: llama has no experts \(leave it out\)"):
        check(FEATURES["llama"], Experts(balance=0.01))
    said = r"experts\.bias_update: .* layers\[0\]\.mlp\.router\.correction is false \(set router: \{correction: true\}"
    with pytest.raises(UserError, match=said):
        check(FEATURES["moe"], Experts(bias_update=0.001))
    check(FEATURES["llama"], Experts())
    check(FEATURES["moe_sigmoid"], Experts(bias_update=0.001))  # its first layer is dense


def _ranks(rank: int, degrees: Degrees) -> Ranks:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", tuple(getattr(degrees, d) for d in DIMENSIONS), mesh_dim_names=DIMENSIONS)
    return Ranks(rank, 2, CPU, degrees, mesh, dist.new_group())


def _check_half(ranks: Ranks, settings: Experts, folder: Path) -> None:
    """Where FSDP gathers weights in 16 bits, corrections act in 32; a checkpoint holds them once, not by rank."""
    from train.checkpoint.tensors import Reader, save

    with torch.device("meta"):
        model = Decoder(FEATURES["moe_sigmoid"])
    parallel.shard(model, ranks, "bfloat16")
    parallel.allocate(model, CPU)
    model.init_weights()
    routers = Routers(model, settings, ranks)
    seen: list[Any] = []
    for r in routers.own.values():
        assert r.correction is not None
        r.correction.fill_(1.001)  # 16 bits make 1 of it
        r.register_forward_hook(lambda r, *_: seen.append((r.weight.dtype, *r.correction[:1].tolist())))  # type: ignore[arg-type, union-attr, index]
    rows = batch(model.spec)
    Whole(model, ranks, "bfloat16").backward([part(rows, slice(ranks.rank, None, 2))], SCALE)
    assert set(seen) == {(torch.bfloat16, torch.tensor(1.001).item())}
    routers.collect(rows.valid, layers=False)
    routers.correct()
    own = {n: p.detach() for n, p in model.named_parameters() if n.endswith("correction")}
    save(own, folder / "saved", ranks.control)
    reader = Reader(folder / "saved")
    assert {n: tuple(shape) for n, (shape, _) in reader.tensors.items()} == {n: tuple(p.shape) for n, p in own.items()}
    read = {n: torch.empty_like(p) for n, p in own.items()}
    reader.load(read, ranks.control)
    assert all(torch.equal(read[n], p) for n, p in own.items())
    assert len(reader.read_metadata().storage_data) == len(own)


def _distributed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    settings = Experts(balance=BALANCE, z=Z, bias_update=0.01)
    for degrees in (Degrees(dp=2), Degrees(tp=2), Degrees(pp=2)):
        ranks = _ranks(rank, degrees)
        for documents in (False, True):
            whole, alone = build("moe_sigmoid", settings)
            rows = batch(whole.spec)
            rows = rows if documents else without_documents(rows)
            engine: Any = Whole(whole, ALONE, "float32")
            one = Losses(engine.criterion, alone).report(ALONE, engine.backward([rows], SCALE), rows.valid, True)
            alone.correct()

            model = Decoder(whole.spec).double().train()
            model.load_state_dict({n: torch.from_numpy(w) for n, w in random_weights(whole.spec).items()})
            if degrees.pp > 1:
                model.keep(parallel.spans(model.spec, 2)[ranks.place("pp")])
            parallel.shard(model, ranks, "float32")
            routers = Routers(model, settings, ranks)
            mine = part(rows, slice(ranks.data, None, degrees.data))
            engine = Whole(model, ranks, "float32")
            if degrees.pp > 1:
                engine = Pipelined(model, ranks, Stage(model, ranks, "1f1b", torch.float64))
            loss = engine.backward([part(mine, slice(0, 1)), part(mine, slice(1, 2))], SCALE)
            if len(mine.ids) > 2:
                loss = loss + engine.backward([part(mine, slice(2, 3)), part(mine, slice(3, 4))], SCALE)
            two = Losses(engine.criterion, routers).report(ranks, loss, rows.valid, True)
            routers.correct()
            assert two[0] == pytest.approx(one[0], rel=1e-6)
            assert two[1] == pytest.approx(one[1], rel=1e-6)
            own = dict(model.named_parameters())
            assert_close(gradients(model), {n: g for n, g in gradients(whole).items() if n in own}, 1e-6)
            for n, p in whole.named_parameters():
                if n.endswith("correction") and n in own:
                    assert torch.equal(parallel.whole(own[n]), p), n
    _check_half(_ranks(rank, Degrees(dp=2)), settings, Path(folder))
    dist.destroy_process_group()


def test_two_ranks_balance_as_one_does(tmp_path: Path) -> None:
    """FSDP, tensor parallel (each rank routes half of a row) and stages: gradients within what float32 reductions
    round, the same figures, and the same corrections bit for bit."""
    mp.spawn(_distributed, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(3, 0, 5, 2), (0, 0, 10, 0), (0, 0, 0, 0), (4, 6, 0, 0)], ids=str)
def test_the_grouped_product_and_its_gradients(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """Against one product an expert: experts without rows get no gradient, and one may get all rows. Under autocast the
    product is 16-bit and the weight's gradient float32."""
    layer = GroupedLinear(4, 16, 24, bias=True)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    n = sum(counts)
    x, g = torch.randn(n, 16), torch.randn(n, 24)
    owner = torch.arange(4).repeat_interleave(torch.tensor(counts))
    rounded = x.to(dtype).requires_grad_()
    assert layer._grouped(rounded)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(rounded, torch.tensor(counts), owner)
    assert y.dtype == dtype
    y.backward(g.to(dtype))
    exact = rounded.detach().double().requires_grad_()
    weight = layer.weight.detach().to(dtype).double().requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()  # type: ignore[union-attr]
    parts = exact.split(counts)
    rows = [p @ w.T for p, w in zip(parts, weight.unflatten(0, (4, 24)), strict=True)]
    (torch.cat(rows) + bias.unflatten(0, (4, 24))[owner]).backward(g.to(dtype).double())
    u = torch.finfo(dtype).eps
    assert rounded.grad is not None and layer.weight.grad is not None and layer.bias is not None
    assert layer.weight.grad.dtype == torch.float32
    for found, wanted in ((rounded.grad, exact.grad), (layer.weight.grad, weight.grad), (layer.bias.grad, bias.grad)):
        assert found is not None and wanted is not None
        assert torch.linalg.norm(found.double() - wanted) <= 4 * u * torch.linalg.norm(wanted) + 1e-30
    empty = torch.tensor([c == 0 for c in counts]).repeat_interleave(24)
    assert not layer.weight.grad[empty].any()


MIXTURE = SPEC.replace(
    "  mlp: {hidden: 48}",
    "  mlp: {kind: moe, experts: 4, hidden: 48, router: {top_k: 2, score: sigmoid, correction: true}}",
)


def test_a_run_tells_its_balance_and_resumes_bit_for_bit(
    options: Callable[..., dict[str, Any]], train: Callable[..., Any], spec_file: Path, tmp_path: Path
) -> None:
    from backends.torch.checkpoint import load_decoder
    from train.watch import history

    spec_file.write_text(MIXTURE, encoding="utf-8")
    fields = {"experts": {"bias_update": 0.01, "balance": 0.001, "z": 1e-3}, "steps": 8, "log_every": 4}
    train(options("one", **fields))
    train(options("two", **fields), stop_after=3)
    train({"out": str(tmp_path / "two")}, resume=True)
    one, two = (load_decoder(tmp_path / n) for n in ("one", "two"))
    for (n, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), n
        if n.endswith("correction"):
            assert a.abs().amax() > 0
    steps = history(tmp_path / "one" / "training" / "train.jsonl")
    for m in steps:
        z = len(one.spec.layers) * (0.001 * m["experts/balance"] + 1e-3 * m["experts/z"])
        assert m["loss"] == pytest.approx(m["cross_entropy"] + z, rel=1e-6)
    assert ["experts/imbalance/L1" in m for m in steps] == [m["step"] % 4 == 0 for m in steps]


def test_settings_for_experts_are_refused_for_a_dense_spec(
    options: Callable[..., dict[str, Any]], train: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=r"experts\.z: mini has no experts"):
        train(options(experts={"z": 1e-3}))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"balance": 0.01}, {"bias_update": 0.01}], ids=["balance", "bias_update"])
def test_balancing_balances_and_costs_no_loss(
    how: dict[str, float], options: Callable[..., dict[str, Any]], train: Callable[..., Any], spec_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """150 steps from the same start: the load is nearer to even, and the cross-entropy within noise."""
    from train.watch import history

    spec_file.write_text(MIXTURE.replace("experts: 4", "experts: 8"), encoding="utf-8")
    ends = []
    for out, experts in (("without", {"balance": 0.0}), ("with", how)):
        train(options(out, experts=experts, steps=150))
        last = history(tmp_path / out / "training" / "train.jsonl")[-30:]
        ends.append([sum(m[n] for m in last) / 30 for n in ("experts/imbalance", "cross_entropy")])
    (uneven, plain), (even, balanced) = ends
    assert even < 1 + 0.6 * (uneven - 1)
    assert balanced < plain + 0.03


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look at inputs
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_compiled_layers_whose_rows_could_be_grouped_compute_what_plain_ones_do(autocast: bool) -> None:
    """Widths of whole 16 bytes: torch's grouped product would take them, and no graph of it does on a CPU."""
    spec = load_spec("tiny-moe")
    losses: list[Tensor] = []
    for compiled in (False, True):
        decoder = Decoder(spec)
        decoder.init_weights(0)
        for block in decoder.layers if compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        ids = torch.randint(0, spec.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(decoder(ids, ids))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3 if autocast else 1e-5, atol=0)
