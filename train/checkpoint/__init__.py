"""Checkpoints: saved beside the training, whole or not there, and read back on any number of ranks."""

from __future__ import annotations

from train.checkpoint.export import check as check_exports
from train.checkpoint.files import write
from train.checkpoint.folder import CONFIG, STATE, TENSORS, RunFolder, clear, newest, number, occupied, steps, unsaved
from train.checkpoint.lock import alone
from train.checkpoint.saver import Best, Saver, best_of
from train.checkpoint.state import read, restore

__all__ = [
    "CONFIG",
    "STATE",
    "TENSORS",
    "Best",
    "RunFolder",
    "Saver",
    "alone",
    "best_of",
    "check_exports",
    "clear",
    "newest",
    "number",
    "occupied",
    "read",
    "restore",
    "steps",
    "unsaved",
    "write",
]
