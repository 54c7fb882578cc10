"""A run's folder, and checkpoints that are whole or not there."""

from __future__ import annotations

from train.checkpoint.folder import (
    CONFIG,
    STATE,
    TENSORS,
    RunFolder,
    Snapshot,
    clear,
    newest,
    number,
    occupied,
    random_state,
    read,
    restore_random_state,
    steps,
    write,
)

__all__ = [
    "CONFIG",
    "STATE",
    "TENSORS",
    "RunFolder",
    "Snapshot",
    "clear",
    "newest",
    "number",
    "occupied",
    "random_state",
    "read",
    "restore_random_state",
    "steps",
    "write",
]
