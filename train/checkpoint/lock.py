"""One run at a time in a folder."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spec.errors import UserError
from train.parallel import Ranks

log = logging.getLogger(__name__)

LOCK = ".training.lock"
WAIT = 5.0
"""Seconds in which a run that was killed, and that a launcher starts again, has let go of its folder."""
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextmanager
def alone(out: Path, ranks: Ranks) -> Iterator[None]:
    """Rank 0 holds a lock of the folder inside the block; the kernel takes it back however the process ends.

    Raises `UserError` on every rank where another run has it, or nothing can be written there.
    """
    from filelock import FileLock, Timeout

    lock, why = FileLock(out / LOCK, timeout=WAIT, thread_local=False), None
    new = not out.exists()
    if ranks.first:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            why = f"{out}: another run is training there (wait for its end, or choose another --out)"
        except OSError as e:
            if e.errno in NO_LOCKS:
                log.warning("%s: its disk has no locks; see that no other run is training there", out)
            else:
                why = f"{out}: cannot be written: {e.strerror}"
    try:
        if why := ranks.agree(why):
            raise UserError(why)
        yield
    finally:
        if lock.is_locked:
            if new and [p.name for p in out.iterdir()] == [LOCK]:  # a run that was refused leaves nothing
                (out / LOCK).unlink()
                with suppress(OSError):
                    out.rmdir()
            lock.release()
