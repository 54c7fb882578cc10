"""What a run tells of itself."""

from __future__ import annotations

from train.watch.report import Journal, Metrics, Watch, history, plot

__all__ = ["Journal", "Metrics", "Watch", "history", "plot"]
