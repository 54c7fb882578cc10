"""What is done about a loss that goes wrong, and a validation that no longer improves. All of it is in the checkpoint,
so that a resumed run decides as the uninterrupted one would."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from train.config import Watch


@dataclass(frozen=True)
class Verdict:
    """A step whose update must not be applied."""

    action: str
    """`skip`, `rollback` or `stop`."""
    reason: str
    finite: bool = True


@dataclass
class Guard:
    """The last applied steps, and the best validation."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rollbacks: int = 0
    best: float | None = None
    """Lowest validation loss so far."""
    stale: int = 0
    """Validations since then."""

    def judge(self, w: Watch, loss: float, norm: float, *, warm: bool) -> Verdict | None:
        """Whether a step's loss and gradient norm are to be kept from the optimizer. `warm` is after the warm-up.

        A loss is a spike beyond mean + k max(std, mean / 100), a norm beyond k times the median, each over the window.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._act(w, w.nonfinite, f"loss {loss:g} and gradient norm {norm:g} are not finite", finite=False)
        if w.spike == "off" or not warm or len(self.losses) < w.spike_window:
            return None
        mean = statistics.fmean(self.losses)
        limit = mean + w.spike_std * max(statistics.pstdev(self.losses), abs(mean) / 100)
        if loss > limit:
            return self._act(w, w.spike, f"loss {loss:.4f} is above {limit:.4f} (watch.spike_std={w.spike_std:g})")
        median = statistics.median(self.norms)
        if w.spike_norm is not None and norm > w.spike_norm * median:
            rule = f"is above {w.spike_norm:g} times the median {median:.4g} (watch.spike_norm)"
            return self._act(w, w.spike, f"gradient norm {norm:.4g} {rule}")
        return None

    def _act(self, w: Watch, action: str, reason: str, *, finite: bool = True) -> Verdict:
        if action == "rollback" and self.rollbacks >= w.rollbacks:
            return Verdict("stop", f"{reason}, and the run was rolled back watch.rollbacks={w.rollbacks} times", finite)
        return Verdict(action, reason, finite)

    def applied(self, w: Watch, loss: float, norm: float) -> None:
        """Remember a step that the optimizer has seen."""
        if w.spike != "off":
            self.losses = [*self.losses, loss][-w.spike_window :]
            self.norms = [*self.norms, norm][-w.spike_window :]

    def scored(self, loss: float) -> None:
        """Remember a validation."""
        better = self.best is None or loss < self.best
        self.best, self.stale = (loss, 0) if better else (self.best, self.stale + 1)

    def forget(self) -> None:
        """Begin anew: what comes is another loss."""
        self.losses, self.norms, self.best, self.stale = [], [], None, 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data; JSON gives every float back bit for bit."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Guard:
        """From `as_dict`; what an older checkpoint does not have is as at the start."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
