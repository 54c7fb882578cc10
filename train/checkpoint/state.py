"""What a checkpoint holds of a run, and a run that goes on from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spec.errors import UserError
from train import optim, quant
from train.checkpoint.folder import STATE, TENSORS
from train.checkpoint.tensors import CheckpointException, Reader, quiet, reason
from train.watch import Guard

if TYPE_CHECKING:
    from train.loop import Run

VERSION = 2
"""Version of training/state.json and of the tensors' names."""

OPTIMIZER = "optimizer/"

RESEED = 2**32
"""Seeds of a run that goes on with another number of ranks lie this far apart from step to step."""


def tensors(run: Run) -> dict[str, Tensor]:
    """What this rank has, as it is: its shards of the weights and of the optimizer's state, and its random states."""
    named = {f"model/{name}": p.detach() for name, p in run.decoder.named_parameters()}
    named |= {f"{OPTIMIZER}{name}": t for name, t in optim.state(run.optimizer).items()}
    return named | {f"random/{run.ranks.rank}/{k}": t for k, t in random_state(run.ranks.device).items()}


def state(run: Run) -> dict[str, Any]:
    """Counters and the data's place, as JSON holds them."""
    d = run.ranks.degrees
    return {
        "version": VERSION,
        "step": run.step,
        "skipped": run.skipped,
        "skipped_in_a_row": run.skipped_in_a_row,
        "world": run.ranks.world,
        "degrees": {"pp": d.pp, "replicate": d.replicate, "dp": d.dp, "tp": d.tp},
        "torch": torch.__version__,
        "data": run.batches.state.as_dict(),
        "watch": run.guard.as_dict(),
        "quant": _scored(run, run.step),
        "scaler": None if run.scaler is None else run.scaler.state(),
    }


def read(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises `UserError`."""
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        version = found.get("version")
    except OSError as e:
        raise UserError(f"{folder}: cannot be resumed: {e}") from None
    except (ValueError, AttributeError) as e:
        raise _damaged(folder, e) from None
    if version != VERSION:
        raise UserError(
            f"{folder / STATE}: version {version} is not {VERSION} (resume with the allotrope that wrote it, "
            f"or begin from its weights: --init {folder} --out ANOTHER)"
        )
    return found


def restore(run: Run, folder: Path) -> dict[str, Any]:
    """Continue from a checkpoint, on any number of ranks, however sharded; returns its state.json.

    Every rank reads its own part. With as many ranks as wrote it, random states go on too, and all is bit for bit what
    it was. Raises `UserError` where the data changed, or where the checkpoint is damaged or of another model.
    """
    saved = read(folder)
    try:
        there = run.batches.resumed(saved["data"], saved["step"])
        world, counters = saved["world"], {k: saved[k] for k in ("step", "skipped", "skipped_in_a_row")}
    except (KeyError, TypeError) as e:
        raise _damaged(folder, e) from None
    quiet()
    try:
        reader = Reader(folder / TENSORS)
        shapes = {name: shape for name, (shape, _) in reader.tensors.items()}
        kept = {n.removeprefix(OPTIMIZER): shape for n, shape in shapes.items() if n.startswith(OPTIMIZER)}
        moments = optim.wanted(run.optimizer, kept)
        random = random_state(run.ranks.device) if world == run.ranks.world else {}
        into = {f"model/{name}": p.detach() for name, p in run.decoder.named_parameters()}
        into |= {f"{OPTIMIZER}{name}": t for name, t in moments.items()}
        into |= {f"random/{run.ranks.rank}/{k}": t for k, t in random.items()}
        reader.load(into, run.ranks.control)
    except UserError:
        raise
    except (Exception, CheckpointException) as e:  # whatever unpickling half a file may raise
        raise _damaged(folder, e) from None
    optim.load_state(run.optimizer, moments)
    if random:
        restore_random_state(random, run.ranks.device)
    else:
        torch.manual_seed(run.config.seed + run.ranks.rank + RESEED * saved["step"])
    run.batches.state = there
    run.guard = Guard.of(saved.get("watch", {}))
    if saved.get("quant") != _scored(run, saved["step"]):  # the losses of its checkpoints are another measure
        run.guard.forget()
        saved["best"] = None
    if run.scaler is not None and saved.get("scaler"):
        run.scaler.load_state(saved["scaler"])
    for name, value in counters.items():
        setattr(run, name, value)
    return saved


def _scored(run: Run, step: int) -> dict[str, Any] | None:
    """What a validation loss after `step` steps is of: the recipe that the weights are rounded by, or none."""
    c = run.config
    return quant.recipe(c.quant).to_dict() if c.rounds(step) else None


def _damaged(folder: Path, error: BaseException) -> UserError:
    return UserError(
        f"{folder}: cannot be resumed, the training state is damaged: {reason(error)} "
        "(remove this folder to go on from the one before it)"
    )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, by device type."""
    out = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "xpu"):
        out[device.type] = getattr(torch, device.type).get_rng_state(device)
    if device.type == "mps":
        out["mps"] = torch.mps.get_rng_state()
    return out


def restore_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back."""
    torch.set_rng_state(states["cpu"])
    if device.type in ("cuda", "xpu") and device.type in states:
        getattr(torch, device.type).set_rng_state(states[device.type], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
