"""How to open a GGUF file for verification: llama.cpp rounds by the type of each weight, and its graph is proved on a
small float32 copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

import backends
from backends.base import Runtime, Values
from backends.gguf.read import Artifact
from backends.gguf.runtime import load
from backends.gguf.twin import twin, twin_spec
from convert.recipe import Held
from convert.verify import artifact, numeric
from convert.verify.artifact import ArtifactRows
from convert.verify.emulate import Typed, activation_type
from convert.verify.run import Twin
from spec.config import LongRopeScaling, Rope, Spec

Array = NDArray[Any]


class Door(artifact.Door):
    """How GGUF files are opened."""

    def __init__(self) -> None:
        super().__init__(backends.get("gguf"))

    def open_artifact(
        self, path: Path, spec: Spec, level: str, threads: int | None, held: Held | None = None
    ) -> Shipped:
        """A file that should carry `spec`. Raises `UserError` where it is no whole GGUF."""
        return Shipped(self.backend, path, Artifact(path, spec), spec, level, threads, held)


class Shipped(artifact.Shipped):
    """A GGUF file; see `convert.verify.run.Shipped`."""

    artifact: Artifact

    @property
    def precision(self) -> str:
        """The float16 KV cache is there whatever the weights are."""
        return numeric.coarsest(["f16", *(activation_type(t) for t in self.artifact.types())])

    def weights(self, name: str) -> Any:
        """Dequantized weights that know how the input of their product is rounded."""
        return _weights(self.artifact, name)

    def stored(self) -> Packed:
        """The file's weights in canonical names."""
        return Packed(self.artifact, self._planned)

    def emulate(self, ids: Array, length: int) -> numeric.Emulation:
        """llama.cpp's roundings on a CPU."""
        return numeric.emulate(self.spec, self.weights, ids, length)

    def load(self, context: int) -> Runtime:
        """llama.cpp as anyone would run it on a CPU, whose roundings are the ones that are emulated."""
        return self._load(context, gpu=False)

    def twin(self, folder: Path) -> Twin:
        """The shipped metadata over a few layers in float32, in llama.cpp without any rounding but float32's."""
        small, spec = twin(self.path, folder / "twin.gguf"), twin_spec(self.spec)
        what = f"float32 twin of {spec.depth} of {self.spec.depth} layers against float64"
        runtime = load(small, threads=self.threads, exact=True, context=_twin_context(spec))
        copy = Artifact(small, spec)
        return Twin(spec, lambda name: _weights(copy, name), runtime, what, copy.session or runtime.context, True)


def _weights(found: Artifact, name: str) -> Any:
    rows = ArtifactRows(found, name, found.shapes[name])
    return rows[:] if len(rows.shape) == 1 else Typed(rows, activation_type(found.type(name)))


def _twin_context(spec: Spec) -> int | None:
    """A session long enough for the long rotary tables where there are two sets: the artifact's own, short session
    uses the others."""
    positions = [b.attention.position for b in spec.layers]
    scalings = [p.scaling for p in positions if isinstance(p, Rope) and isinstance(p.scaling, LongRopeScaling)]
    longest = max((s.original_context for s in scalings), default=0)
    return longest + 64 if longest > 0 and longest + 64 <= spec.context else None


class Packed(artifact.Packed):
    """What lies in the file; see `packing.Stored`. Position rows that nothing reaches are not in it."""

    _artifact: Artifact

    def compare(self, name: str, start: int, block: Values) -> str:
        """An empty string where the file holds the canonical rounding of these rows, else what differs."""
        first, last = self._artifact.reached(name)
        low, high = max(start, first), min(start + block.shape[0], last)
        return super().compare(name, low, block[low - start : high - start]) if low < high else ""

    def hashed(self, name: str) -> bool | None:
        """Whether the tensor has the receipt's content hash; none where a part of it is not in the file."""
        whole = self._artifact.reached(name) == (0, self._plan[name].shape[0])
        return super().hashed(name) if whole else None
