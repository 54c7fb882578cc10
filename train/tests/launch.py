"""Trainings in processes of their own: `python -m train`, torchrun, and ranks that run a function of a test."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import yaml
from torch.distributed import TCPStore  # type: ignore[attr-defined]

ROOT = Path(__file__).parents[2]


def start(
    options: dict[str, Any],
    folder: Path,
    *argv: str,
    ranks: int | None = None,
    restarts: int = 0,
    limit: int | None = None,
) -> subprocess.Popen[str]:
    """`python -m train`, or under torchrun where `ranks` are given, which are started again so many times; `limit` is
    the largest file that it may write, in bytes."""
    file = folder / f"{Path(options['out']).name}.yaml"
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    several = ["-m", *launch] if ranks is not None else []
    return subprocess.Popen(
        [sys.executable, *several, "-m", "train", "--config", str(file), *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE if ranks is None else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def spawn(function: Callable[..., None], world: int, *args: Any, starts: int = 1) -> None:
    """Run `function(rank, ports, *args)` in `world` processes, which may `begin` once at each of `starts` ports.

    The stores that they meet in are open before, so nobody can take a port in between.
    """
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(starts)]
    mp.spawn(function, ([s.port for s in stores], *args), nprocs=world)  # type: ignore[attr-defined]


def begin(rank: int, world: int, port: int) -> None:
    """Let this process be a rank as torchrun starts them."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
