"""How a calibration runs: what a user chooses."""

from __future__ import annotations

from dataclasses import dataclass

from spec.errors import UserError, nearest

EFFORTS = ("fast", "good", "best")
"""`fast` reads no text and needs no torch: the scale search alone. The others calibrate."""


TOKENS = {"good": 32768, "best": 131072}
"""Calibration tokens by effort, where no number is given."""


@dataclass(frozen=True)
class Settings:
    """Choices of a calibration. Raises `UserError` for what is none."""

    text: str = "stdlib"
    """A UTF-8 file, a folder of them, JSON lines with a `text` each, or `stdlib` for text that Python brings."""
    effort: str = "good"
    """`good` or `best`."""
    tokens: int | None = None
    """Calibration tokens at most; none: the effort's own number."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes a CUDA device where there is one."""
    seed: int = 0
    """Of the sampled labels, and of random ids where the source has no tokenizer."""
    threads: int | None = None
    """Threads of torch; none: one for each core."""

    def __post_init__(self) -> None:
        if self.effort not in EFFORTS[1:]:
            raise UserError(f"--effort {self.effort}: no such effort ({nearest(self.effort, EFFORTS)})")
        for name, value in (("tokens", self.tokens), ("threads", self.threads)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
