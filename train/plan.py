"""`--check`: what a run would cost and where its model could go, before anything is trained."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from spec import cost
from spec.load import load as load_spec
from spec.show import print_targets, short, size
from train import optim, parallel
from train.config import TrainConfig
from train.data import prepare
from train.data.tokens import cache_folder
from train.session import out_folder


def show(c: TrainConfig, console: Console) -> None:
    """Print the plan. Raises `UserError` for what would stop the run."""
    from backends.targets import targets

    spec = load_spec(c.spec)
    device = parallel.choose_device(c.device)
    precision, why = parallel.choose_precision(c.precision, device)
    world = parallel.world_size()
    length = c.data.length or spec.context
    micro = c.batch.micro or max(1, c.batch.sequences // world)
    per_step = c.batch.sequences * length
    text = prepare.read(c.data, cache_folder(c.data.cache))
    activations = micro * cost.activation_bytes(spec, length, 2 if precision == "bfloat16" else 4)
    state = cost.training_bytes(spec)
    rows: dict[str, Any] = {
        "spec": f"{spec.name}: {short(cost.count(spec).total)} parameters, {spec.depth} layers, width {spec.width}",
        "data": f"{text.name}: {text.files:,} file(s), {size(text.size)}",
        "tokenizer": c.tokenizer or f"byte-level BPE of {spec.vocab_size} tokens, trained on the data",
        "step": f"{c.batch.sequences} sequences of {length} = {per_step:,} tokens, {micro} sequences at a time",
        "run": f"{c.steps} steps = {short(c.steps * per_step)} tokens, "
        f"{short(float(c.steps * per_step) * cost.training_flops(spec, length))}FLOP",
        "learning rate": optim.describe(c),
        "memory": f"{size(state / world)} weights, gradients, moments + about {size(activations)} activations a rank",
        "device": f"{device}, {world} rank(s)",
        "precision": f"{precision} ({why})",
        "disk": f"{size((c.checkpoint.keep + 1) * 0.75 * state)} in {out_folder(c, spec)} while saving",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)
    print_targets(c.spec, targets(spec))
