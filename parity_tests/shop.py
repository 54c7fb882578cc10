"""What tests of wrong artifacts share: checkpoints, their artifacts, each made once, and the verification of any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import backends
from convert.pipeline import Result, convert
from convert.sources import open_source
from convert.verify.report import Check
from convert.verify.run import Session, door
from parity_tests.checkpoints import VOCAB, write_checkpoint
from spec import Spec

E = TypeVar("E")


@dataclass(frozen=True)
class FileMutant(Generic[E]):
    """A wrong artifact: what is done to it through its format's editor, and which check must notice."""

    change: Callable[[E], Any]
    killer: str
    feature: str = "llama"
    level: str = "q4"


class Shop:
    """Specs by name, and what a backend makes of them."""

    def __init__(self, folder: Path, backend: str, specs: Mapping[str, Spec]) -> None:
        self.folder, self.backend, self.specs = folder, backend, specs
        self.checkpoint: Callable[[str], Path] = cache(self._checkpoint)
        self.artifact: Callable[[str, str], Path] = cache(lambda f, level: self.converted(f, level, f"{f}.{level}").out)

    def _checkpoint(self, feature: str) -> Path:
        """With a tokenizer where the vocabulary is its own."""
        spec = self.specs[feature]
        return write_checkpoint(self.folder / feature, spec, tokenizer=spec.vocab_size == VOCAB)

    def converted(self, feature: str, level: str, name: str) -> Result:
        """An artifact of that name, not verified."""
        suffix = backends.get(self.backend).suffix or f"-{self.backend}"
        return convert(self.checkpoint(feature), self.backend, level, self.folder / f"{name}{suffix}", verify=False)

    def session(self, artifact: Path, feature: str, level: str) -> Session:
        """The verification of an artifact that should be `feature`'s."""
        source = open_source(self.checkpoint(feature))
        return Session(source, door(self.backend).open_artifact(artifact, source.spec, level, 1), level)


def outcome(session: Session, name: str) -> Check:
    """One check by its name."""
    check: Any = getattr(session, name)()
    return check
