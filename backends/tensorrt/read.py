"""Reading an artifact's weights back, in canonical names and rows, from the graph that lies beside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backends.base import Arithmetic, Floats, Planned, Values
from backends.folder import marked_spec, read_mark
from backends.tensorrt import graph
from backends.tensorrt.build import ENGINE
from spec.errors import UserError


class Artifact:
    """See `backends.base.Artifact`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mark = read_mark(path)
        self.source = self.spec = marked_spec(mark, path)
        self.level: str = str(mark.get("level"))
        self.receipt: dict[str, Any] = mark.get("receipt", {})
        self.compute: str = mark.get("options", {}).get("compute", "f16")
        self.made_for: dict[str, str] = mark.get("engine", {})
        """`gpu` and `tensorrt`, the version."""
        self._weights = graph.reader(path, self.spec)

    @property
    def session(self) -> int | None:
        """Tokens of the session whose rotary tables are fixed in the graph."""
        return graph.session(self.spec)

    @property
    def arithmetic(self) -> Arithmetic:
        """Activations and caches have the compute type."""
        return Arithmetic(self.compute, self.compute)

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """Tensors and constants that are not as planned, and an engine that is not there."""
        lost = {} if (self.path / ENGINE).is_file() else {ENGINE: "missing"}
        return lost | self._weights.problems(planned, self.compute)

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows of a canonical tensor as the graph holds them."""
        return self._weights.rows(name, start, stop)

    def expected(self, name: str, level: str, start: int, values: Floats) -> Floats:
        """The source's rows rounded to the level's float type."""
        return graph.rounded(values, level)


def open_artifact(path: str | Path) -> Artifact:
    """Open a folder that this program wrote. Raises `UserError`."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder")
    return Artifact(Path(path))
