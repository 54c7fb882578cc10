"""Where figures go besides the journal, behind one small interface."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from spec.errors import MissingDependency
from train.config import Watch


class Tracker(Protocol):
    """Takes a run's figures. What it raises is reported once, and the training goes on without it."""

    def begin(self, config: Mapping[str, Any], step: int) -> None:
        """Open it. What it has of later steps than `step` no longer counts: the run was resumed, or rolled back."""
        ...

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The figures of a step, by name."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """What the model wrote after the prompt `name`."""
        ...

    def close(self) -> None:
        """Everything is on its way when this returns. It may be begun again."""
        ...


class TensorBoard:
    """Event files in OUT/training/tensorboard."""

    def __init__(self, folder: Path, watch: Watch) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def begin(self, config: Mapping[str, Any], step: int) -> None:
        """A file of events, which tells TensorBoard to forget what came after `step`."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1, flush_secs=30)
        if step == 0:
            self._writer.add_text("config", "\n".join(f"    {line}" for line in _lines(config)), 0)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One scalar a figure."""
        for name, value in values.items():
            self._writer.add_scalar(_grouped(name), value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text under the prompt's name, in a block that Markdown leaves alone."""
        block = "\n".join(f"    {line}" for line in (name + text).splitlines())
        self._writer.add_text(f"samples/{name or 'beginning of a document'}", block, step)

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def _grouped(name: str) -> str:
    """The figure's place on the dashboard: validation and speed apart."""
    group = "validation" if name.startswith("val_") else "train"
    group = "system" if name in ("seconds", "data_wait", "mfu", "memory") or "per_second" in name else group
    return f"{group}/{name}"


def _lines(config: Mapping[str, Any]) -> list[str]:
    import yaml

    return yaml.safe_dump(dict(config), sort_keys=False).splitlines()


class Wandb:
    """A Weights & Biases run; its id is kept in OUT/training/wandb-run-id, so that a resumed run is the same one."""

    def __init__(self, folder: Path, watch: Watch) -> None:
        self._folder, self._watch = folder, watch
        self._run: Any = None

    def begin(self, config: Mapping[str, Any], step: int) -> None:
        """A new run, or the one that there was."""
        import wandb

        file = self._folder / "wandb-run-id"
        if not file.is_file() or step == 0:
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = wandb.init(
            project=self._watch.wandb_project,
            name=self._folder.parent.name,
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=wandb_mode(self._watch.wandb_mode),
            dir=str(self._folder),
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # An own axis: W&B's counter never goes back, and a resumed run repeats steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One call a step."""
        self._run.log({_grouped(name): value for name, value in values.items()} | {"step": step})

    def text(self, step: int, name: str, text: str) -> None:
        """As HTML, whose text is escaped."""
        import html

        import wandb

        shown = f"<pre><b>{html.escape(name)}</b>{html.escape(text)}</pre>"
        self._run.log({f"samples/{name or 'beginning'}": wandb.Html(shown), "step": step})

    def close(self) -> None:
        """Finish the run; it waits for the upload."""
        if self._run is not None:
            self._run.finish()
        self._run = None


def wandb_mode(chosen: str) -> Any:
    """`online` or `offline`: W&B would ask on the terminal for a key that it does not have."""
    if chosen != "auto":
        return chosen
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    import wandb

    return "online" if wandb.login(prompt=False, verify=False) else "offline"


TRACKERS: dict[str, tuple[str, Callable[[Path, Watch], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "wandb": ("wandb", Wandb),
}
"""By name: the package it needs, and what makes it of the run's training folder."""


def trackers(watch: Watch, folder: Path) -> list[tuple[str, Tracker]]:
    """The chosen ones. Raises `MissingDependency` for one whose package is not installed."""
    out: list[tuple[str, Tracker]] = []
    for name in watch.trackers:
        package, make = TRACKERS[name]
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(f"watch.trackers: {name} is not installed (pip install 'allotrope[tracking]')")
        out.append((name, make(folder, watch)))
    return out
