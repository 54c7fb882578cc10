"""A run's folder, and checkpoints that are whole or not there.

    OUT/spec.yaml model.safetensors tokenizer.json tokenizer_config.json    the newest checkpoint, ready to convert
    OUT/training/                  config.yaml train.jsonl loss.png
    OUT/checkpoints/step-000500/   the same four files, and training/ with all that resuming needs

A step's folder is written under another name, flushed to the disk and renamed as a whole, so that model and training
state are always of one step. OUT's own files are then replaced, one rename each; only the weights ever change. Resuming
reads the newest step folder.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.torch.checkpoint import WEIGHTS, save_weights
from spec.config import Spec
from spec.errors import UserError
from spec.load import dump

VERSION = 1
"""Version of training/state.json."""

STATE, TENSORS, CONFIG = "training/state.json", "training/state.safetensors", "training/config.yaml"
OURS = ("spec.yaml", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "training", "checkpoints")
"""What a run owns in its folder."""


@dataclass(frozen=True)
class Snapshot:
    """Everything of one step, on the CPU."""

    step: int
    model: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    """Optimizer moments and random states by name."""
    state: Mapping[str, Any]
    """Counters and the data's place, as JSON holds them."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and the files that every checkpoint of it repeats."""

    path: Path
    spec: Spec
    tokenizer: Mapping[str, bytes]

    def save(self, snapshot: Snapshot, config: str, keep: int) -> Path:
        """Write one step's folder, publish its files in OUT, and drop all but the newest `keep` folders.

        Raises `UserError` where the disk refuses; every earlier checkpoint is then as it was.
        """
        folder = self.path / "checkpoints" / f"step-{snapshot.step:06d}"
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            try:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "training").mkdir(parents=True)
                self._fill(partial, snapshot, config)
                partial.rename(folder)
                flush(folder.parent)
            except (OSError, UserError) as e:
                shutil.rmtree(partial, ignore_errors=True)
                raise UserError(self._refused(snapshot.step, e)) from None
        try:
            self.publish(folder)
        except OSError as e:
            raise UserError(self._refused(snapshot.step, e)) from None
        self._prune(keep)
        return folder

    def _fill(self, partial: Path, snapshot: Snapshot, config: str) -> None:
        save_weights(snapshot.model, partial / WEIGHTS)
        save_weights(snapshot.tensors, partial / TENSORS)
        state = {"version": VERSION, "step": snapshot.step, **snapshot.state}
        small = {
            "spec.yaml": dump(self.spec).encode(),
            STATE: (json.dumps(state, indent=2) + "\n").encode(),
            CONFIG: config.encode(),
            **self.tokenizer,
        }
        for name, content in small.items():
            write(partial / name, content)
        for name in (WEIGHTS, TENSORS):  # safetensors makes its files readable by their owner alone
            (partial / name).chmod((partial / STATE).stat().st_mode)
        flush(partial / "training")
        flush(partial)

    def publish(self, folder: Path) -> None:
        """Put a step's files into OUT by hard links (copies where there are none), the weights last."""
        for name in (*self.tokenizer, "spec.yaml", WEIGHTS):
            target, partial = self.path / name, self.path / f".{name}.partial"
            if target.exists() and target.samefile(folder / name):
                continue
            partial.unlink(missing_ok=True)
            try:
                partial.hardlink_to(folder / name)
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                shutil.copyfile(folder / name, partial)
                flush(partial)
            partial.replace(target)
        flush(self.path)

    def _prune(self, keep: int) -> None:
        for old in steps(self.path)[:-keep]:
            trash = old.with_name(f".{old.name}.old")  # half a folder must not look like a checkpoint
            try:
                old.rename(trash)
            except OSError:
                continue
            shutil.rmtree(trash, ignore_errors=True)

    def _refused(self, step: int, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        found = newest(self.path)
        intact = f"the checkpoint of step {number(found)} is intact" if found else "no earlier checkpoint exists"
        return f"{self.path}: cannot save step {step}: {reason} ({intact}; make room and continue with --resume)"


def write(path: Path, content: bytes) -> None:
    """A small file, on the disk when this returns."""
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def flush(path: Path) -> None:
    """A file or folder to the disk."""
    if path.is_dir() and os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def steps(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((p for p in (out / "checkpoints").glob("step-*") if p.name[5:].isdecimal()), key=number)


def newest(out: Path) -> Path | None:
    """The newest whole checkpoint."""
    found = steps(out)
    return found[-1] if found else None


def number(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name[5:])


def occupied(out: Path) -> str | None:
    """The first thing in `out` that a new run would overwrite."""
    return next((name for name in OURS if (out / name).exists()), None)


def clear(out: Path) -> None:
    """Remove a run, and nothing else that lies in its folder."""
    for name in OURS:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's counters, and its optimizer moments and random states by name. Raises `UserError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except OSError as e:
        raise UserError(f"{folder}: cannot be resumed: {e}") from None
    except (ValueError, SafetensorError) as e:
        raise UserError(f"{folder}: cannot be resumed, the training state is damaged: {e}") from None
    if state.get("version") != VERSION:
        raise UserError(f"{folder / STATE}: version {state.get('version')} is not {VERSION} (use its allotrope)")
    return state, tensors


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, by device type."""
    out = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        out["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        out["mps"] = torch.mps.get_rng_state()
    return out


def restore_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
