"""Processes that make shards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

from spec.errors import UserError

if TYPE_CHECKING:
    from train.data.tokens import Job

ALONE = 32 * 2**20
"""Bytes of text up to which this process does the work: starting others takes longer."""

_job: Job | None = None
_has_ended: Any = None


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def run(job: Job, shards: Sequence[int], count: int, progress: Callable[[int], None]) -> None:
    """Make the shards with `count` processes. Raises what `make` raises, when the others have ended."""
    from train.data.tokens import make

    if min(count, len(shards)) < 2 or sum(job.size(n) for n in shards) <= ALONE:
        for n in shards:
            make(job, n, progress)
        return
    context = get_context("spawn")
    ended = context.RawValue("b", 0)  # without a lock, which a process that is killed could keep
    pool = ProcessPoolExecutor(min(count, len(shards)), context, _begin, (job, ended))
    try:
        pending = {pool.submit(_make, n): n for n in shards}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                progress(job.size(pending.pop(future)))
    except BrokenProcessPool:
        raise UserError(
            "data: a process that tokenised has died (out of memory? lower --data.workers; in a program of your own: "
            "start the work under `if __name__ == '__main__':`); what is done is kept"
        ) from None
    finally:
        ended.value = 1
        pool.shutdown(cancel_futures=True)


class _Ended(Exception):
    """Another process failed, or the user ended the work: nobody waits for this shard."""


def _begin(job: Job, ended: Any) -> None:
    global _job, _has_ended
    _job, _has_ended = job, ended
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all of them
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)  # it was killed: nobody wants the work

    threading.Thread(target=follow, daemon=True).start()


def _make(shard: int) -> None:
    from train.data.tokens import make

    def check(done: int) -> None:
        if _has_ended.value:
            raise _Ended

    assert _job is not None
    make(_job, shard, check)
