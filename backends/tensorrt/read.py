"""Reading an artifact's weights back, in canonical names and rows, from the graph that lies beside the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backends import narrow
from backends.base import Arithmetic, Floats, Planned, Values
from backends.folder import MARK, read_mark
from backends.reading import own_mark, read_back, tokenizer_problems
from backends.tensorrt import graph
from backends.tensorrt.build import ENGINE
from backends.tensorrt.support import OPTIONS, levels
from spec.errors import UserError
from spec.params import params


class Artifact:
    """See `backends.base.Artifact`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mark = own_mark(path, "tensorrt", levels(), OPTIONS)
        self.source = self.spec = mark.source
        self.level, self.receipt, self.compute = mark.level, mark.receipt, mark.options["compute"]
        self.made_for: dict[str, str] = read_mark(path).get("engine", {})
        """`gpu` and `tensorrt`, the version."""
        if not isinstance(self.made_for, dict):
            raise UserError(f"{path / MARK}: engine: is no mapping")
        self._weights = graph.reader(path, self.spec)
        self._shapes = {p.name: p.shape for p in params(self.spec)}

    @property
    def session(self) -> int | None:
        """Tokens of the session whose rotary tables are fixed in the graph."""
        return graph.session(self.spec)

    @property
    def arithmetic(self) -> Arithmetic:
        """Activations and caches have the compute type."""
        return Arithmetic(self.compute, self.compute)

    def problems(self, planned: Sequence[Planned]) -> dict[str, str]:
        """Tensors, constants and files of the tokenizer that are not as planned, and an engine that is not there."""
        lost = {} if (self.path / ENGINE).is_file() else {ENGINE: "missing"}
        lost |= tokenizer_problems(self.path, read_back(self.path), self.spec.context)
        return lost | self._weights.problems(planned, self.compute)

    def rows(self, name: str, start: int, stop: int) -> Values:
        """Rows of a canonical tensor as the graph holds them."""
        return self._weights.rows(name, start, stop)

    def rows_together(self, name: str, level: str) -> int:
        """All rows of a matrix whose largest weight decides how each is rounded."""
        return self._shapes[name][0] if level == "nvfp4" else 1

    def expected(self, name: str, level: str, start: int, values: Floats) -> Floats:
        """The source's rows rounded to the level."""
        return narrow.quantize(values, level).dequantize() if level in narrow.LEVELS else graph.rounded(values, level)


def open_artifact(path: str | Path) -> Artifact:
    """Open a folder that this program wrote. Raises `UserError`."""
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder")
    return Artifact(Path(path))
