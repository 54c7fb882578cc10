"""Ranks, devices, precision and sharding."""

from __future__ import annotations

from train.parallel.mesh import Degrees, Ranks, choose_device, degrees, ranks, world_size
from train.parallel.precision import DTYPES, autocast, choose_precision
from train.parallel.shard import accumulating, like, shard, whole

__all__ = [
    "DTYPES",
    "Degrees",
    "Ranks",
    "accumulating",
    "autocast",
    "choose_device",
    "choose_precision",
    "degrees",
    "like",
    "ranks",
    "shard",
    "whole",
    "world_size",
]
