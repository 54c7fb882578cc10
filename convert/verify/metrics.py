"""Distances between logits. Shapes: T tokens, V vocab."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_ROWS = 64


def nmse(y: Array, ref: Array) -> float:
    """Squared error over the reference's energy; infinite where anything is not finite."""
    if y.shape != ref.shape:
        raise ValueError(f"logits of shape {y.shape} against {ref.shape}")
    error = energy = 0.0
    y2, ref2 = y.reshape(-1, y.shape[-1]), ref.reshape(-1, ref.shape[-1])
    with np.errstate(all="ignore"):  # NaN and Inf are an answer here
        for r in range(0, len(ref2), _ROWS):
            b = ref2[r : r + _ROWS].astype(np.float64)
            error += float(np.square(y2[r : r + _ROWS].astype(np.float64) - b).sum())
            energy += float(np.square(b).sum())
    total = error / energy if energy > 0 else (0.0 if error == 0 else math.inf)
    return total if math.isfinite(total) else math.inf


def typical(y: Array, ref: Array) -> float:
    """The median token's squared error over the mean token's energy: what an NMSE is without the few tokens that went
    another way at a router's near tie. y, ref [..., T, V]."""
    if y.shape != ref.shape:
        raise ValueError(f"logits of shape {y.shape} against {ref.shape}")
    with np.errstate(all="ignore"):
        errors = np.square(y.astype(np.float64) - ref).sum(-1)
        energy = np.square(ref.astype(np.float64)).sum(-1).mean()
        total = float(np.median(errors) / energy) if energy > 0 else (0.0 if not errors.any() else math.inf)
    return total if math.isfinite(total) else math.inf


def log_softmax(x: Array) -> NDArray[np.float64]:
    """Over the last axis, in float64."""
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@dataclass
class Quality:
    """Token by token: how far a distribution q (the artifact) is from p (the original). Natural logarithms."""

    kl: list[float] = field(default_factory=list)
    """KL(p || q) at every position."""
    nll_ref: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    """-log probability of the token that follows, where one follows."""
    agree: list[bool] = field(default_factory=list)
    """Whether both put the same token first."""
    gap: list[float] = field(default_factory=list)
    """The reference's lead of its first token over its second, in logits."""

    def add(self, ref: Array, logits: Array, targets: Array) -> None:
        """ref, logits [T, V]; targets [T] the token after each position (-1 where there is none)."""
        for r in range(0, len(ref), _ROWS):
            p, q = log_softmax(ref[r : r + _ROWS]), log_softmax(logits[r : r + _ROWS])
            t = np.asarray(targets[r : r + _ROWS])
            self.kl += np.maximum((np.exp(p) * (p - q)).sum(-1), 0).tolist()
            self.agree += (p.argmax(-1) == q.argmax(-1)).tolist()
            top = np.partition(p, -2, axis=-1)[:, -2:] if p.shape[-1] > 1 else np.zeros((len(p), 2))
            self.gap += (top[:, 1] - top[:, 0]).tolist()
            at, valid = np.arange(len(t)), t >= 0
            self.nll_ref += (-p[at[valid], t[valid]]).tolist()
            self.nll += (-q[at[valid], t[valid]]).tolist()

    def summary(self) -> dict[str, float]:
        """Means with their standard errors. `top1_clear` forgives near-ties (gaps under 1e-3): rounding decides."""
        kl, agree, gap = np.array(self.kl), np.array(self.agree), np.array(self.gap)
        out = {
            "kl_mean": float(kl.mean()),
            "kl_se": standard_error(kl),
            "kl_999": float(np.quantile(kl, 0.999)),
            "kl_max": float(kl.max()),
            "top1": float(agree.mean()),
            "top1_clear": float((agree | (gap < 1e-3)).mean()),
        }
        if self.nll:
            nll, ref = np.array(self.nll), np.array(self.nll_ref)
            out |= {
                "nll": float(nll.mean()),
                "nll_se": standard_error(nll),
                "nll_ref": float(ref.mean()),
                "delta_nll": float((nll - ref).mean()),
                "delta_nll_se": standard_error(nll - ref),
            }
        return out


def standard_error(x: Array) -> float:
    """Of the mean; 0 for fewer than two values."""
    return float(np.std(x, ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0
