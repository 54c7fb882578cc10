"""A run's folder, and checkpoints that are whole or not there.

    OUT/spec.yaml model.safetensors tokenizer.json tokenizer_config.json    the newest checkpoint, ready to convert
    OUT/training/                  config.yaml train.jsonl loss.png
    OUT/checkpoints/step-000500/   the same four files, and training/ with all that resuming needs
    OUT/checkpoints/best           a link to the step whose validation loss is the lowest

A step's folder is written under another name, flushed to the disk and renamed as a whole, so that model and training
state are always of one step. OUT's own files are then replaced, one rename each; only the weights ever change, and
where they are several files the index that names them is what is replaced. Resuming reads the newest step folder.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backends.safetensors import INDEX, WEIGHTS
from backends.torch.checkpoint import flush
from spec.config import Spec
from spec.errors import UserError
from spec.load import dump
from train.checkpoint.files import write

STATE, TENSORS, CONFIG = "training/state.json", "training/tensors", "training/config.yaml"
SHARDS = "model-step-*-of-*.safetensors"
"""What OUT calls the weights where they are several files: each step has names of its own."""
UNSAVED = {"training", "checkpoints", "exports"}
OURS = ("spec.yaml", WEIGHTS, INDEX, "tokenizer.json", "tokenizer_config.json", "training", "checkpoints", "exports")
"""What a run owns in its folder, beside `SHARDS`."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, and the files that every checkpoint of it repeats."""

    path: Path
    spec: Spec
    tokenizer: Mapping[str, bytes]

    def step(self, number: int) -> Path:
        """A checkpoint's folder."""
        return self.path / "checkpoints" / f"step-{number:06d}"

    def partial(self, number: int) -> Path:
        """What it is called until it is whole."""
        return self.path / "checkpoints" / f".step-{number:06d}.partial"

    def begin(self, number: int) -> Path:
        """An empty folder for a checkpoint to come."""
        partial = self.partial(number)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "training").mkdir(parents=True)
        return partial

    def commit(self, number: int, files: Mapping[str, bytes]) -> Path:
        """Add the small files, and give the folder its name: all that is in it is on the disk."""
        partial, folder = self.partial(number), self.step(number)
        for name, content in {"spec.yaml": dump(self.spec).encode(), **self.tokenizer, **files}.items():
            write(partial / name, content)
        for inner in (partial / TENSORS, partial / "training", partial):
            flush(inner)
        partial.rename(folder)
        flush(folder.parent)
        return folder

    def abandon(self, number: int) -> None:
        """Drop what a failed save left."""
        shutil.rmtree(self.partial(number), ignore_errors=True)

    def publish(self, folder: Path) -> None:
        """Put a step's files into OUT by hard links (copies where there are none), what names the weights last."""
        for name in (*self.tokenizer, "spec.yaml"):
            self._link(folder / name, self.path / name)
        if (folder / WEIGHTS).exists():
            self._link(folder / WEIGHTS, self.path / WEIGHTS)
            (self.path / INDEX).unlink(missing_ok=True)
            kept = set()
        else:
            table = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            names = {file: file.replace("model-", f"model-{folder.name}-", 1) for file in table["weight_map"].values()}
            for file, name in names.items():
                self._link(folder / file, self.path / name)
            table["weight_map"] = {tensor: names[file] for tensor, file in table["weight_map"].items()}
            partial = self.path / f".{INDEX}.partial"
            write(partial, (json.dumps(table, indent=2) + "\n").encode())
            partial.replace(self.path / INDEX)
            flush(self.path)
            (self.path / WEIGHTS).unlink(missing_ok=True)  # readers take it before an index
            kept = set(names.values())
        for old in self.path.glob(SHARDS):
            if old.name not in kept:
                old.unlink(missing_ok=True)
        flush(self.path)

    def _link(self, source: Path, target: Path) -> None:
        partial = target.with_name(f".{target.name}.partial")
        if target.exists() and target.samefile(source):
            return
        partial.unlink(missing_ok=True)
        try:
            partial.hardlink_to(source)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            shutil.copyfile(source, partial)
            flush(partial)
        partial.replace(target)

    def mark_best(self, number: int) -> None:
        """Let checkpoints/best be this step. Nothing where the disk has no links; state.json says it too."""
        link, partial = self.path / "checkpoints" / "best", self.path / "checkpoints" / ".best.partial"
        with suppress(OSError, NotImplementedError):
            if link.is_symlink() and link.readlink() == Path(self.step(number).name):
                return
            partial.unlink(missing_ok=True)
            partial.symlink_to(self.step(number).name, target_is_directory=True)
            partial.replace(link)

    def prune(self, keep: int, held: Collection[int] = ()) -> None:
        """Drop all but the newest `keep` checkpoints and those of the steps in `held`."""
        for old in steps(self.path)[:-keep]:
            if number(old) in held:
                continue
            trash = old.with_name(f".{old.name}.old")  # half a folder must not look like a checkpoint
            try:
                old.rename(trash)
            except OSError:
                continue
            shutil.rmtree(trash, ignore_errors=True)

    def clean(self) -> None:
        """Drop what a killed process left: checkpoints that were being written or removed."""
        for left in (self.path / "checkpoints").glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        for left in self.path.glob(".*.partial"):
            left.unlink(missing_ok=True)

    def refused(self, step: int, why: str) -> UserError:
        """Why a step could not be saved, and what there is all the same."""
        found = newest(self.path)
        intact = f"the checkpoint of step {number(found)} is intact" if found else "no earlier checkpoint exists"
        return UserError(
            f"{self.path}: cannot save step {step}: {why} ({intact}; make room and continue with --resume)"
        )


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


def unsaved(out: Path) -> bool:
    """Whether a run was begun there that ended before its first checkpoint: no weights are lost with it."""
    return (out / CONFIG).is_file() and newest(out) is None and {n for n in OURS if (out / n).exists()} <= UNSAVED


def clear(out: Path) -> None:
    """Remove a run, and nothing else that lies in its folder."""
    for path in [*(out / name for name in OURS), *out.glob(SHARDS)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
