"""mlx-lm's own architectures: what each really carries."""

from __future__ import annotations

from pathlib import Path

from backends.mlx.layout import BUNDLED, Fit, bundled
from spec.config import Spec
from spec.errors import UserError


def choose(spec: Spec, level: str, compute: str) -> Fit:
    return bundled(spec, compute)


def named(carrier: str, spec: Spec, level: str, compute: str, path: Path) -> Fit:
    if carrier == BUNDLED:
        return bundled(spec, compute)
    raise UserError(f"{path}: {carrier}: no carrier")


def obstacle(spec: Spec, level: str, compute: str) -> str:
    return ""
