"""What a run costs each rank, by formulas alone: memory, traffic, arithmetic, and who has what.

Shapes: A accumulation steps, B sequences of one forward pass, T tokens, D model, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from backends.torch.loss import rows_at_once
from spec import config, cost
from spec.config import MoE, Spec
from spec.params import Param, params
from train.config import Memory, Optimizer, TrainConfig
from train.parallel import Degrees
from train.quant import levels

MOMENTS: Mapping[str, float] = {"adamw": 8, "adamw8bit": 2.04, "muon": 4, "lion": 4, "adafactor": 0, "sgd": 4}
"""Bytes that an optimizer keeps for each element of what it works on, float32 but for 8-bit AdamW (a scale for 256).
SOAP's and Adafactor's depend on the shape."""


@dataclass(frozen=True)
class Placement:
    """How the ranks divide one parameter: `divided` among those of a layer, then by rows among `shards`."""

    how: str
    divided: int
    shards: int
    columns: bool = False
    """Whether `divided` cuts the columns, not the rows."""

    def own(self, p: Param) -> int:
        """Elements that the rank with most of it has."""
        rows, columns = p.shape[0], p.size // p.shape[0]
        rows, columns = (rows, columns // self.divided) if self.columns else (rows // self.divided, columns)
        return ceil(rows / self.shards) * columns

    def gathered(self, p: Param) -> int:
        """Elements that a rank has while it computes with it."""
        return p.size // self.divided


def placement(p: Param, d: Degrees) -> Placement:
    """Where the elements of a parameter are (`parallel.shard`)."""
    *_, module, leaf = p.name.split(".")
    if leaf == "correction":
        return Placement("copies", 1, 1)
    if p.role == "experts" or ".experts." in p.name:
        return Placement("experts", d.ep, d.dp * d.tp // d.ep)
    if d.tp > 1 and module in ("q", "k", "v", "gate", "up"):
        return Placement("readers", d.tp, d.dp)
    if d.tp > 1 and module in ("o", "down"):
        return Placement("writers", d.tp if leaf == "weight" else 1, d.dp, columns=True)
    return Placement("whole", 1, d.dp * d.tp)


def describe(how: str, d: Degrees) -> str:
    """A placement in words."""
    copies = f", {d.replicate} copies" if d.replicate > 1 else ""
    first = {
        "experts": f"{d.ep} ranks have different experts, " if d.ep > 1 else "",
        "readers": f"heads and inner widths (rows) over tp {d.tp}, ",
        "writers": f"heads and inner widths (columns) over tp {d.tp}, ",
    }.get(how, "")
    n = {"experts": d.dp * d.tp // d.ep, "readers": d.dp, "writers": d.dp, "copies": 1}.get(how, d.dp * d.tp)
    if n == 1:
        return (first.removesuffix(", ") or "whole on each rank of its stage") + copies
    over = "dp x tp" if d.tp > 1 and how in ("experts", "whole") else "dp"
    return f"{first}rows over {n} ranks of {over} (FSDP2){copies}"


@dataclass(frozen=True)
class Stage:
    """What one stage of the pipeline costs each of its ranks, in bytes but for `flops`, an optimizer step's."""

    layers: range
    parameters: int
    """Elements that the rank with most of them has."""
    weights: float
    gradients: float
    moments: float
    gathered: float
    """Weights and gradients of the layers at work, whole, and of the root; of all layers in a pipeline."""
    activations: float
    flops: float
    traffic: Mapping[str, float]
    """Bytes that a rank sends in a step, by what for."""

    @property
    def memory(self) -> float:
        """All of it at once."""
        return self.weights + self.gradients + self.moments + self.gathered + self.activations


def _of(spec: Spec, layers: range) -> Iterator[Param]:
    """The parameters of a stage."""
    here = {"final_norm": layers.stop == spec.depth, "head": layers.stop == spec.depth}
    for p in params(spec):
        part, _, rest = p.name.partition(".")
        if int(rest.split(".")[0]) in layers if part == "layers" else here.get(part, layers.start == 0):
            yield p


def stage(c: TrainConfig, spec: Spec, d: Degrees, layers: range, place: int, width: int, device: str) -> Stage:
    """The cost of one stage. `width`: bytes of a number in the forward pass; `place`: which stage it is, from 0."""
    length = c.length(spec)
    micro, passes = c.batch.at_once(d.data), c.batch.passes(d.data)
    own = {p: placement(p, d) for p in _of(spec, layers)}
    count = sum(at.own(p) for p, at in own.items())
    trained = {p: at for p, at in own.items() if not p.name.endswith(".correction")}
    moments = sum(_moments(c.optimizer, p) * at.own(p) for p, at in trained.items())
    rounded = levels(c.quant, spec)  # what the optimizer changes lies beside what is read
    several = d.world > 1
    root = sum(at.gathered(p) for p, at in own.items() if not p.name.startswith("layers."))
    blocks: dict[str, int] = {}
    for p, at in own.items():
        if p.name.startswith("layers."):
            blocks[p.name.split(".")[1]] = blocks.get(p.name.split(".")[1], 0) + at.gathered(p)
    gathered = (sum(sorted(blocks.values())[-2:]) + root) * width * 2 if several else 0  # one works, the next one comes
    if d.pp > 1:  # torch's schedules keep weights and gradients whole from a step's first pass to its last
        gathered = (sum(blocks.values()) + root) * (width + 4)
    alive = 1 if d.pp == 1 else min(passes, d.pp - place) if c.parallel.schedule == "1f1b" else passes
    tokens = micro * length
    kept = alive * tokens * sum(_kept(spec.layers[i], spec.width, d.tp, c.memory, n) for n, i in enumerate(layers))
    again = max(_inner(spec.layers[i], spec.width, d.tp) for i in layers) if c.memory.checkpointing != "none" else 0
    logits = 0
    if layers.stop == spec.depth:
        rows = min(tokens // d.tp, rows_at_once(spec.vocab_size, device))
        logits = 2 * 4 * rows * spec.vocab_size + tokens // d.tp * spec.width
    activations = width * (kept + tokens * again) + logits
    return Stage(
        layers,
        count,
        4.0 * (count + sum(at.own(p) for p, at in own.items() if p.name in rounded)),
        4.0 * sum(at.own(p) for p, at in trained.items()),
        moments,
        float(gathered),
        float(activations),
        _flops(spec, layers, length) * c.batch.sequences * length / d.data / d.tp,
        _traffic(c, spec, d, layers, own, micro, passes, width),
    )


def _moments(o: Optimizer, p: Param) -> float:
    """Bytes an element that the optimizer keeps, its average of the weights included."""
    hidden = p.name.startswith("layers.") and p.role in ("linear", "experts") and len(p.shape) == 2
    average = 4 if o.ema is not None else 0
    if o.kind == "soap" and hidden:
        rows, columns = p.shape
        return 8 + 8 * (rows**2 + columns**2) / p.size + average  # two moments; statistics and their eigenvectors
    if o.kind == "adafactor":
        return (4 * sum(p.shape) / p.size if len(p.shape) == 2 else 4) + average
    return (MOMENTS["adamw"] if o.kind in ("muon", "soap") and not hidden else MOMENTS.get(o.kind, 8)) + average


def _inner(b: config.Block, width: int, tp: int) -> float:
    """Numbers a token that a layer's backward pass needs: the inputs and outputs of its norms, q, k, v before and
    after the rotation, the mix, and the MLP's inner vectors; under tensor parallelism the gathered inputs whole."""
    a, m = b.attention, b.mlp
    assert a.kv_heads is not None and a.head_dim is not None, "a resolved layer"
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    inner = 4 * width * (b.pre + b.post) + 3 * q + 3 * kv + (4 if m.gated else 2) * _hidden(m)
    if isinstance(m, MoE):
        inner += 2 * width * m.router.top_k  # sorted by expert, on the way in and out
    return inner / tp + (2 * width * (1 - 1 / tp) if tp > 1 else 0)


def _hidden(m: config.FeedForward) -> int:
    """Inner width of what a token passes."""
    if not isinstance(m, MoE):
        return m.hidden
    return m.hidden * m.router.top_k + (m.shared.hidden if m.shared else 0)


def _kept(b: config.Block, width: int, tp: int, memory: Memory, n: int) -> float:
    """Numbers a token that the n-th layer of a stage keeps until its backward pass."""
    full, least = _inner(b, width, tp), width / tp
    if memory.checkpointing == "none" or n % memory.every:
        return full
    if memory.checkpointing == "full":
        return least
    if memory.checkpointing == "budget":
        return least + memory.budget * (full - least)
    a, m = b.attention, b.mlp
    assert a.kv_heads is not None and a.head_dim is not None, "a resolved layer"
    heads = a.heads * a.head_dim
    products = heads + 2 * a.kv_heads * a.head_dim + 2 * width + (2 if m.gated else 1) * _hidden(m)
    saved = {"matmul": products, "attention": heads}
    return least + sum(saved[name] for name in memory.save) / tp


def _flops(spec: Spec, layers: range, length: int) -> float:
    """Floating-point operations a token of a stage's training (`cost.training_flops`)."""
    last = layers.stop == spec.depth
    own = [p for p in _of(spec, layers) if p.role in ("linear", "experts", "router")]
    linear = sum(p.size * cost.used(spec, p) for p in own)
    linear += spec.vocab_size * spec.width if last and spec.head.tied else 0
    attention = 0
    for i in layers:
        a = spec.layers[i].attention
        assert a.head_dim is not None, "a resolved layer"
        attention += 4 * a.heads * a.head_dim * cost.seen(spec.layers[i], length)
    return 3 * (2 * linear + attention)


def _traffic(
    c: TrainConfig,
    spec: Spec,
    d: Degrees,
    layers: range,
    own: Mapping[Param, Placement],
    micro: int,
    passes: int,
    width: int,
) -> dict[str, float]:
    """Bytes that a rank sends in a step. A gather or scatter of n bytes over k ranks sends n (k - 1) / k of them."""
    length = c.length(spec)
    out = dict.fromkeys(("fsdp gather", "fsdp reduce", "hsdp reduce", "tp", "ep", "pp"), 0.0)
    for p, at in own.items():
        elements, share = at.gathered(p), (at.shards - 1) / at.shards
        gathers = 2 if p.name.startswith("layers.") else 1
        out["fsdp gather"] += gathers * passes * elements * width * share
        out["fsdp reduce"] += 4 * elements * share * (passes if d.pp == 1 else 1)
        out["hsdp reduce"] += 8 * at.own(p) * (d.replicate - 1) / d.replicate
    stream = passes * micro * length * spec.width * width
    again = 1.5 if c.memory.checkpointing in ("full", "selective") else 1.0  # the recomputed forward pass
    for i in layers:
        m = spec.layers[i].mlp
        halves = 1 + (not isinstance(m, MoE) or m.shared is not None)
        out["tp"] += 4 * halves * again * stream * (d.tp - 1) / d.tp
        if isinstance(m, MoE):
            out["ep"] += 4 * again * m.router.top_k * stream / d.tp * (d.ep - 1) / d.ep
    neighbours = (layers.start > 0) + (layers.stop < spec.depth)
    out["pp"] = neighbours * stream / d.tp
    return {name: n for name, n in out.items() if n}
