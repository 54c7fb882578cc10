"""What a verification found, as data: JSON between processes, a table for people, Markdown for the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


class Status(StrEnum):
    """How a check ended."""

    PASS = "PASS"
    FAIL = "FAIL"
    XFAIL = "XFAIL"
    NOT_RUN = "NOT_RUN"
    EMULATED = "EMULATED"


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    status: Status
    measured: float | None = None
    """What was measured: an NMSE, a count of differing tensors or strings, a KL divergence in nats."""
    gate: float | None = None
    """What it must not exceed (quality: the budget, which flags but does not fail)."""
    reason: str = ""
    """Why it failed or did not run, in one line; otherwise what was compared."""
    flags: tuple[str, ...] = ()
    """What a reader must not overlook though the check did not fail."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def margin(self) -> float | None:
        """measured / gate; below 1 is good."""
        if self.measured is None or self.gate is None:
            return None
        if self.gate == 0:
            return 0.0 if self.measured == 0 else math.inf
        return self.measured / self.gate


@dataclass
class Report:
    """All checks of one artifact."""

    artifact: str
    backend: str
    level: str
    source: str
    tokens: int = 0
    """Tokens that the numeric checks compared."""
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something was checked. NOT_RUN and EMULATED do not hold an artifact back."""
        return bool(self.checks) and all(c.status is not Status.FAIL for c in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [c for c in self.checks if c.status is Status.FAIL]

    @property
    def summary(self) -> str:
        """What failed, in one line."""
        return "; ".join(f"{c.name}: {c.reason}" for c in self.failures) or "nothing could be checked"

    @property
    def flagged(self) -> list[str]:
        """What to tell the user even though the artifact is let through."""
        out = [
            f"{c.name}: {c.status} ({c.reason})" for c in self.checks if c.status in (Status.NOT_RUN, Status.EMULATED)
        ]
        return out + [f"{c.name}: {flag}" for c in self.checks for flag in c.flags]

    def __getitem__(self, name: str) -> Check:
        for c in self.checks:
            if c.name == name:
                return c
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinite and undefined numbers become strings."""
        data = asdict(self)
        for raw, check in zip(data["checks"], self.checks, strict=True):
            raw["margin"] = check.margin
        return {"ok": self.ok, **plain(data)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        fields = {k: v for k, v in data.items() if k not in ("ok", "checks")}
        return cls(**fields, checks=[check_from(c) for c in data["checks"]])

    def table(self) -> Table:
        """A rich table."""
        from rich.table import Table

        table = Table(
            title=f"{self.artifact}: {self.level} on {self.backend}, {self.tokens} tokens", title_justify="left"
        )
        for column in ("check", "status", "measured", "gate", "margin", "what"):
            table.add_column(column, justify="right" if column in ("measured", "gate", "margin") else "left")
        style = {Status.PASS: "", Status.FAIL: "bold red"}
        for c, row in zip(self.checks, self._rows(), strict=True):
            table.add_row(*row, style="yellow" if c.flags else style.get(c.status, "yellow"))
        return table

    def markdown(self) -> str:
        """The same table in Markdown."""
        lines = ["| check | status | measured | gate | margin | what |", "|---|---|---|---|---|---|"]
        return "\n".join(lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in self._rows()])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for c in self.checks:
            what = "; ".join(t for t in (c.reason, *c.flags) if t)
            status = f"{c.status}, flagged" if c.flags else str(c.status)
            yield c.name, status, number(c.measured), number(c.gate), number(c.margin), what


def check_from(data: dict[str, Any]) -> Check:
    """A check from plain data."""
    data = {k: v for k, v in data.items() if k != "margin"}
    data["flags"] = tuple(data.get("flags", ()))
    for key in ("measured", "gate"):
        if isinstance(data.get(key), str):
            data[key] = float(data[key])
    return Check(**{**data, "status": Status(data["status"])})


def number(x: float | None) -> str:
    """Short and unambiguous: whole numbers as they are, others with three digits."""
    if x is None:
        return "-"
    return str(int(x)) if float(x).is_integer() and abs(x) < 1e6 else f"{x:.2e}" if abs(x) < 0.01 else f"{x:.3g}"


def plain(data: Any) -> Any:
    """Data that strict JSON can hold."""
    if isinstance(data, dict):
        return {str(k): plain(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [plain(v) for v in data]
    if hasattr(data, "item"):
        data = data.item()
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def dumps(data: Any) -> str:
    """Strict JSON in one line."""
    return json.dumps(plain(data), allow_nan=False)
