"""What a run tells of itself."""

from __future__ import annotations

from train.watch.board import Board
from train.watch.environment import environment
from train.watch.guard import Guard, Verdict
from train.watch.journal import Journal, history
from train.watch.metrics import TIMING, Meter, Metrics, Score, by_name
from train.watch.png import plot
from train.watch.profile import Profile
from train.watch.samples import Sampler

__all__ = [
    "TIMING",
    "Board",
    "Guard",
    "Journal",
    "Meter",
    "Metrics",
    "Profile",
    "Sampler",
    "Score",
    "Verdict",
    "by_name",
    "environment",
    "history",
    "plot",
]
