"""Calibrated rounding: a text is run through the model layer by layer, and every tensor is rounded for what it saw.

Importing this needs no torch; `calibrate` does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backends.base import Planned
from convert.calibrate.settings import EFFORTS, Settings
from convert.calibrate.store import Rounding
from spec.errors import MissingDependency

if TYPE_CHECKING:
    from convert.calibrate.estimate import Expected
    from convert.recipe import Recipe
    from convert.sources import Source

__all__ = ["EFFORTS", "Choose", "Progress", "Rounding", "Settings", "calibrate", "check", "expected"]

Progress = Callable[[str, int, int], None]
"""Called with a stage's name (`measure`, `sensitivity`, `calibrate`) and its units (layers) done and in all."""
Choose = Callable[[Mapping[str, float] | None], Sequence[Planned]]
"""Gains by tensor (`convert.recipe.plan`), or none, to the storage of every parameter."""


def expected(source: Source, settings: Settings, planned: Sequence[Planned]) -> Expected:
    """What `calibrate` will take for a plan: tokens, seconds, bytes. Reads the text, no weight, and needs no torch.
    Raises `UserError` where there is nothing in the text to calibrate on."""
    from convert.calibrate.estimate import expected as estimated

    return estimated(source, settings, planned)


def check() -> None:
    """Whether what calibrating needs is installed. Raises `MissingDependency`."""
    if importlib.util.find_spec("torch") is None:
        raise MissingDependency("--effort good and best run the model, which needs torch: pip install "
                                "'allotrope[train]' (or --effort fast)")  # fmt: skip


def calibrate(
    source: Source,
    recipe: Recipe | str,
    settings: Settings,
    folder: str | Path,
    progress: Progress | None = None,
    planned: Choose | None = None,
) -> Rounding:
    """Round a source's matrices for a text, layer by layer, into a folder.

    source: open, without a rounding. recipe: levels. planned: the plan of measured gains, or of none; by default
    `convert.recipe.plan` of the recipe. What has a native level there is measured and not rounded. folder: made where
    it is missing; one that an interrupted run of the same source, recipe, settings and text left goes on from its last
    whole layer, bit for bit as if it had never stopped, and one that is finished is only opened. Memory: a few layers
    and their statistics, nothing that grows with the model's depth (the disk holds the residual stream before each
    layer). Raises `UserError`; what is whole in the folder stays.
    """
    check()
    from convert.calibrate.driver import run

    return run(source, recipe, settings, Path(folder), progress or (lambda *_: None), planned)
