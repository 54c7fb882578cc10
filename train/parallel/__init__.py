"""Ranks, devices, precision and sharding."""

from __future__ import annotations

from train.parallel.compiling import Shapes, choose_compile, compile_layer
from train.parallel.decoder import build
from train.parallel.device import choose_device, describe, keep_memory
from train.parallel.limits import check, check_batch
from train.parallel.mesh import Degrees, Ranks, degrees, ranks, world_size
from train.parallel.peak import peak_flops
from train.parallel.pipeline import Stage, check_passes, spans
from train.parallel.precision import DTYPES, Scaler, autocast, choose_precision, convert_to_fp8, prepare, scaler
from train.parallel.recompute import recomputing
from train.parallel.shard import accumulating, allocate, settle, shard, whole

__all__ = [
    "DTYPES",
    "Degrees",
    "Ranks",
    "Scaler",
    "Shapes",
    "Stage",
    "accumulating",
    "allocate",
    "autocast",
    "build",
    "check",
    "check_batch",
    "check_passes",
    "choose_compile",
    "choose_device",
    "choose_precision",
    "compile_layer",
    "convert_to_fp8",
    "degrees",
    "describe",
    "keep_memory",
    "peak_flops",
    "prepare",
    "ranks",
    "recomputing",
    "scaler",
    "settle",
    "shard",
    "spans",
    "whole",
    "world_size",
]
