"""The artifact's place on disk: one conversion at a time, a partial name until it is whole, the old file safe."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spec.errors import UserError

PARTIAL = ".partial"


def check(out: Path, suffix: str, force: bool) -> None:
    """Whether `out` may be written; artifacts keep their suffix, so that no other file is taken for one. Raises
    `UserError`."""
    if suffix and out.suffix != suffix and not out.is_dir():
        raise UserError(f"--out {out}: must end with {suffix}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name the file")
    if out.exists() and not force:
        raise UserError(f"--out {out}: exists; --force replaces it once the new one is whole and verified")
    parent = out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--out {out}: {parent} is no folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {parent} is not writable")


def check_space(out: Path, need: int) -> None:
    """Whether `need` bytes are free where `out` goes. Raises `UserError`."""
    parent = out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    stale = partial(out)
    with suppress(OSError):  # what a killed conversion left behind is overwritten
        free += stale.stat().st_blocks * 512
    if need > free:
        raise UserError(f"--out {out}: needs {need / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free on its disk")


def partial(out: Path) -> Path:
    """Where an artifact grows."""
    return out.with_name(out.name + PARTIAL)


@contextmanager
def reserved(out: Path, *beside: Path) -> Iterator[Path]:
    """The partial path of `out`, for this process alone. What still has a partial name at the end, of `out` or of the
    files `beside` it, is deleted.

    Raises `UserError` where another conversion writes the same output.
    """
    lock = out.with_name(out.name + ".lock")
    fd = _locked(out, lock)
    path = partial(out)
    try:
        path.unlink(missing_ok=True)
        yield path
    finally:
        for left in (path, *map(partial, beside), lock):
            with suppress(OSError):
                left.unlink(missing_ok=True)
        os.close(fd)


def _locked(out: Path, lock: Path) -> int:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise UserError(f"--out {out}: another conversion is writing it") from None
            # whoever held it before may have deleted the file between open and flock
            with suppress(FileNotFoundError):
                if lock.stat().st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None


def publish(path: Path, out: Path) -> None:
    """Give a whole file its name, durably. Raises `UserError`."""
    try:
        path.replace(out)
        folder = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise UserError(f"--out {out}: {e.strerror}") from None


def staged(out: Path, text: str) -> Path:
    """A small file beside the artifact, whole under its partial name; `publish` names it. Raises `UserError`."""
    path = partial(out)
    try:
        with path.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:  # `reserved` deletes what there is of it
        raise UserError(f"{out}: {e.strerror}") from None
    return path
