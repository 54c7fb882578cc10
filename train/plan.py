"""`--check`: what a run would cost each rank and where its model could go, before anything is started."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spec import cost
from spec.config import Spec
from spec.load import load
from spec.params import params
from spec.show import print_targets, short, size
from train import estimate, optim, parallel, ready
from train.checkpoint import init, newest
from train.config import TrainConfig
from train.data import prepare
from train.data.tokens import cache_folder
from train.parallel import Degrees
from train.ready import Ready
from train.session import out_folder

HAS = "How the ranks divide the model"


@dataclass(frozen=True)
class Plan:
    """A run, before it is one."""

    spec: Spec
    degrees: Degrees
    stages: list[estimate.Stage]
    micro: int
    """Sequences of one forward pass on one rank."""
    passes: int
    """Forward passes of a step on one rank."""
    length: int
    ready: Ready
    device: str

    @property
    def bubble(self) -> float:
        """Share of a step in which a pipeline's rank waits for others (Narayanan et al. 2021)."""
        idle = self.degrees.pp - 1
        return idle / (self.passes + idle)


def degrees(c: TrainConfig, ranks: int | None) -> Degrees:
    """Those of `ranks` ranks, or of those that the launcher started, or of as many as the degrees ask for."""
    p = c.parallel
    if ranks is None and parallel.world_size() == 1:
        ranks = p.replicate * (p.dp or -(-p.ep // p.tp)) * p.tp * p.pp
    return parallel.degrees(p, ranks or parallel.world_size())


def make(c: TrainConfig, ranks: int | None = None, *, resume: bool = False, force: bool = False) -> Plan:
    """The plan. Raises `UserError` with a line for everything that would stop the run."""
    found = newest(out_folder(c)) if resume else None
    spec = init.spec_of(c) if found is None else load(found)
    d = degrees(c, ranks)
    device = parallel.choose_device(c.device)
    given = found or init.tokenizer_of(c) or c.tokenizer
    known = ready.check(c, spec, d, device, out_folder(c, spec), given, resume=resume, force=force)
    width = parallel.DTYPES[known.precision].itemsize
    stages = [estimate.stage(c, spec, d, span, n, width, device.type) for n, span in enumerate(known.stages)]
    micro, passes = c.batch.at_once(d.data), c.batch.passes(d.data)
    return Plan(spec, d, stages, micro, passes, c.length(spec), known, parallel.describe(device, c.device))


def placements(plan: Plan) -> dict[str, str]:
    """How the ranks divide each part of the model, in words."""
    d, found = plan.degrees, {}
    for p in params(plan.spec):
        first, *rest = p.name.split(".")
        part = first if first != "layers" else "norms" if "norm" in p.name else rest[1]
        name = {"embed": "embedding", "embed_norm": "norms", "final_norm": "norms", "attn": "attention"}.get(part, part)
        how = estimate.placement(p, d).how
        leaf = p.name.split(".")[-2]
        if how in ("readers", "writers"):
            name = f"{name} {leaf}"
        elif name == "mlp":
            name = leaf if leaf in ("router", "shared_gate") else "experts" if p.role == "experts" else name
        found.setdefault(estimate.describe(how, d), []).append(name)
    return {" ".join(dict.fromkeys(names)): how for how, names in found.items()}


def facts(c: TrainConfig, plan: Plan) -> dict[str, Any]:
    """Everything that is printed, as JSON can hold it: sizes in bytes, a step's arithmetic in operations."""
    flops = float(c.batch.sequences * plan.length) * cost.training_flops(plan.spec, plan.length)
    return {
        "spec": plan.spec.name,
        "parameters": cost.count(plan.spec).total,
        "ranks": plan.degrees.world,
        "degrees": asdict(plan.degrees),
        "device": plan.device,
        "precision": plan.ready.precision,
        "sequences": {"step": c.batch.sequences, "rank": c.batch.sequences // plan.degrees.data, "pass": plan.micro},
        "passes": plan.passes,
        "quant": plan.ready.quant or None,
        "length": plan.length,
        "flops": {"step": flops, "rank": max(s.flops for s in plan.stages), "run": flops * c.steps},
        "memory": max(s.memory for s in plan.stages),
        "bubble": plan.bubble,
        "placements": placements(plan),
        "stages": [
            {**asdict(s), "layers": [s.layers.start, s.layers.stop], "memory": s.memory, "traffic": dict(s.traffic)}
            for s in plan.stages
        ],
    }


def show(
    c: TrainConfig,
    console: Console,
    ranks: int | None = None,
    *,
    as_json: bool = False,
    resume: bool = False,
    force: bool = False,
) -> None:
    """Print the plan. Raises `UserError` for what would stop the run."""
    plan = make(c, ranks, resume=resume, force=force)
    text = prepare.described(c.data, cache_folder(c.data.cache))
    if as_json:
        console.out(json.dumps(facts(c, plan), indent=2), highlight=False)
        return
    console.print(_rows(_summary(c, plan, text)))
    if plan.degrees.world > 1:
        console.print(_table(HAS, ("", ""), placements(plan).items()))
    console.print(_costs(plan))
    print_targets(c.init or c.spec, plan.ready.targets)


def _summary(c: TrainConfig, plan: Plan, text: str) -> dict[str, str]:
    spec, d, found = plan.spec, plan.degrees, facts(c, plan)
    per_step = c.batch.sequences * plan.length
    degrees = " x ".join(f"{name} {n}" for name, n in asdict(d).items() if name != "ep") + f" (ep {d.ep})"
    state = sum(s.weights + s.moments for s in plan.stages) * d.dp * d.tp
    bubble = f", {plan.bubble:.0%} of a step spent waiting ({c.parallel.schedule})" if d.pp > 1 else ""
    return {
        "spec": f"{spec.name}: {short(cost.count(spec).total)} parameters, {spec.depth} layers, width {spec.width}",
        "data": text,
        "loss": plan.ready.loss,
        **({"quant": plan.ready.quant} if plan.ready.quant else {}),
        "tokenizer": c.tokenizer or f"byte-level BPE of {spec.vocab_size} tokens, trained on the data",
        "ranks": f"{d.world} = {degrees}",
        "step": f"{c.batch.sequences} sequences of {plan.length} = {per_step:,} tokens; a rank sees "
        f"{c.batch.sequences // d.data} in {plan.passes} pass(es) of {plan.micro}{bubble}",
        "run": f"{c.steps:,} steps = {short(c.steps * per_step)} tokens, {short(found['flops']['run'])}FLOP; "
        f"a step {short(found['flops']['step'])}FLOP, a rank of it {short(found['flops']['rank'])}FLOP",
        "learning rate": optim.describe(c),
        "memory": f"about {size(found['memory'])} a rank, and what torch and the collectives take",
        "device": plan.device,
        "precision": plan.ready.arithmetic,
        "disk": f"{size((c.checkpoint.keep + 1) * state)} in {out_folder(c, spec)} while saving",
    }


def _costs(plan: Plan) -> Table:
    """Memory and traffic of a rank, a column for each stage of the pipeline."""
    rows: dict[str, list[str]] = {"layers": [f"{s.layers.start}..{s.layers.stop - 1}" for s in plan.stages]}
    rows["parameters"] = [f"{s.parameters:,}" for s in plan.stages]
    for name in ("weights", "gradients", "moments", "gathered", "activations", "memory"):
        if any(getattr(s, name) for s in plan.stages):
            rows[name if name != "memory" else "together"] = [size(getattr(s, name)) for s in plan.stages]
    rows["arithmetic a step"] = [f"{short(s.flops)}FLOP" for s in plan.stages]
    for name in dict.fromkeys(n for s in plan.stages for n in s.traffic):
        rows[f"{name} a step"] = [size(s.traffic.get(name, 0)) for s in plan.stages]
    heads = [f"stage {n}" if len(plan.stages) > 1 else "" for n in range(len(plan.stages))]
    return _table("What a rank needs and sends", ("", *heads), [(name, *cells) for name, cells in rows.items()])


def _rows(rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _table(title: str, heads: tuple[str, ...], rows: Any) -> Table:
    table = Table(title=title, box=box.SIMPLE, title_justify="left", show_header=any(heads))
    for n, head in enumerate(heads):
        table.add_column(head, justify="left" if n == 0 or title == HAS else "right")
    for row in rows:
        table.add_row(*row)
    return table
