"""Ranks, devices, precision and sharding."""

from __future__ import annotations

from train.parallel.limits import check
from train.parallel.mesh import Degrees, Ranks, choose_device, degrees, ranks, world_size
from train.parallel.pipeline import Stage, check_passes, spans
from train.parallel.precision import DTYPES, autocast, choose_precision
from train.parallel.shard import accumulating, like, settle, shard, whole

__all__ = [
    "DTYPES",
    "Degrees",
    "Ranks",
    "Stage",
    "accumulating",
    "autocast",
    "check",
    "check_passes",
    "choose_device",
    "choose_precision",
    "degrees",
    "like",
    "ranks",
    "settle",
    "shard",
    "spans",
    "whole",
    "world_size",
]
